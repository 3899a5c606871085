"""The command `merge`: merges the finished shards of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esm_packed.errors import UsageError
from esm_packed.runners.checks import check_output
from esm_packed.runners.holding import claimed, undisturbed
from esm_packed.runners.output.blocks import DamagedShardError
from esm_packed.runners.output.joining import wants_parts
from esm_packed.runners.output.merge import MergeOptions, merge_run
from esm_packed.runners.output.score_description import SUFFIXES as TABLE_SUFFIXES
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.run import Run
from esm_packed.runners.system.paths import resolved
from esm_packed.runners.watch.console import Console


@dataclass(frozen=True)
class Merged:
    """The result of merging.

    Args:
        is_made: a new output was created.
        already_complete: the complete output already existed.
        missing_shards: missing shards, without which there is no output; 1 at the first damaged one.
        missing_records: records of a partial output that are not computed.
        num_records: records of the run.
    """

    is_made: bool = False
    already_complete: bool = False
    missing_shards: int = 0
    missing_records: int = 0
    num_records: int = 0


def merge_files(
    output: Path,
    console: Console,
    *,
    overwrite: bool = False,
    keep_run: bool = False,
    partial: bool = False,
    compression: str = "none",
    parts: bool | None = None,
) -> Merged:
    """Merge the finished shards of the run of `output`, if all exist.

    Args:
        output: the file to create.
        console: shows the progress.
        overwrite: replace an existing output; a partial one of the same run is always replaced.
        keep_run: keep the run directory.
        partial: create an output from the finished shards, if any, with a row of NaN for each other record.
            The run directory is kept while records are missing, and the command that started the run
            continues it.
        compression: none or gzip.
        parts: leave rows of residues in files next to the output; None: only for large outputs.

    Raises:
        UsageError: there is no such run, other processes are working on it, or parts are requested for a
            partial output.
    """
    if parts and partial:
        raise UsageError("--parts with --partial: a partial output is one file; use only one of them")
    output = resolved(output)
    if output.suffix.lower() in TABLE_SUFFIXES:
        raise UsageError(f"{output}: a table of esm-packed score; rerun the score command to complete it")
    existing = check_output(output, overwrite)
    directory = RunDirectory(output)
    has_run = directory.exists() and directory.plan_path.exists()
    if not has_run and existing is not None and existing.is_complete:
        return Merged(already_complete=True)
    if not has_run:
        raise UsageError(f"{directory.path}: no run to merge; start one with esm-packed embed")
    with undisturbed(directory), claimed(directory, "merging", console):
        run = Run.open(directory)
        existing = check_output(output, overwrite)
        if existing is not None:
            if existing.plan_hash != run.plan.hash:
                raise UsageError(f"{output}: already exists from another run; use --overwrite to replace it")
            if existing.is_complete:
                return Merged(already_complete=True)
            overwrite = True
        if missing := _missing_shards(run, partial):
            return Merged(missing_shards=missing)
        try:
            in_parts = not partial and wants_parts(run, parts)
            options = MergeOptions(overwrite, partial, compression, in_parts, keep_run)
            missing_records = merge_run(run, console, options)
        except DamagedShardError:
            return Merged(missing_shards=1)
        num_records = run.index.num_records
        if not keep_run and not missing_records:
            run.index.close()
            directory.remove()
    return Merged(is_made=True, missing_records=missing_records, num_records=num_records)


def _missing_shards(run: Run, partial: bool) -> int:
    """How many missing shards prevent an output; for a partial one, all shards if none is whole, else 0."""
    finished = run.finished(range(run.plan.num_shards))
    if not partial:
        return run.plan.num_shards - len(finished)
    return 0 if any(run.is_whole(shard) for shard in finished) else run.plan.num_shards
