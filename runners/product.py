"""What a run produces from its shards: one file of embeddings or scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from esm_packed.errors import UsageError
from esm_packed.runners.checks import ExistingOutput, check_output, check_suffix, space_of
from esm_packed.runners.input.index import FastaIndex
from esm_packed.runners.output.changes import log_changes
from esm_packed.runners.output.joining import wants_parts
from esm_packed.runners.output.merge import MergeOptions, merge_run
from esm_packed.runners.state.queries import Queries
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.summary import Summary
from esm_packed.runners.watch.console import Console


class Product(Protocol):
    """The file that a run produces; it appears only when it is complete."""

    def existing(self, output: Path, overwrite: bool) -> ExistingOutput | None:
        """Check that the file can be created; return an existing one that may not simply be replaced.

        Raises:
            UsageError: it cannot be created, or the existing file is something else.
        """

    def identity(self, index: FastaIndex) -> Mapping[str, Any]:
        """What identifies the run besides the input, the model and how it computes.

        Raises:
            UsageError: a file that is read for it has an error.
        """

    def queries(self, index: FastaIndex) -> Queries | None:
        """The queries to compute; None to compute each record whole."""

    def space(self, run: Run) -> tuple[int, int]:
        """Bytes of the file, and bytes that the run still needs until it is created."""

    def make(self, run: Run, console: Console) -> None:
        """Create the file.

        Raises:
            DamagedShardError: a shard must be computed again.
            OSError: the disk is full or fails.
        """

    def read(self, summary: Summary) -> None:
        """Add to the summary what only the file knows, including work of earlier processes."""


class EmbeddingOutput:
    """An HDF5 file of embeddings.

    Args:
        request: the request.
    """

    def __init__(self, request: EmbedRequest) -> None:
        self._request = request

    def existing(self, output: Path, overwrite: bool) -> ExistingOutput | None:
        """See `Product`."""
        check_suffix(self._request.output)
        return check_output(output, overwrite)

    def identity(self, index: FastaIndex) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def queries(self, index: FastaIndex) -> None:
        """None: each record is computed whole."""

    def space(self, run: Run) -> tuple[int, int]:
        """See `Product`; parts are included."""
        return space_of(run, self._request.fp32_compare, self._in_parts(run))

    def make(self, run: Run, console: Console) -> None:
        """See `Product`."""
        request = self._request
        options = MergeOptions(
            overwrite=request.overwrite or _is_partial(run),
            compression=request.compression,
            in_parts=self._in_parts(run),
            keep_run=request.keep_run,
        )
        merge_run(run, console, options)
        if request.log_json is not None:
            log_changes(console, request.log_json, run.directory.output)

    def read(self, summary: Summary) -> None:
        """See `Product`."""
        summary.read_output()

    def _in_parts(self, run: Run) -> bool:
        in_parts = wants_parts(run, self._request.parts)
        if in_parts:
            run.parts.check()
        return in_parts


def _is_partial(run: Run) -> bool:
    """Whether the output exists and was created from a part of this run."""
    try:
        existing = check_output(run.directory.output, overwrite=False)
    except UsageError:  # another file, which merging does not replace
        return False
    return existing is not None and existing.plan_hash == run.plan.hash and not existing.is_complete
