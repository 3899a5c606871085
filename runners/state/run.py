"""A run and its shards: what they hold, which are finished, and what computing them needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.outputs import LOG_PROBABILITIES, Per, kind_of, num_columns, per_of
from esm_packed.rows import row_counts
from esm_packed.runners.input.index import FastaIndex, reopen_index
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.parts import PartsDirectory
from esm_packed.runners.state.plan import Plan, PlanError
from esm_packed.runners.state.queries import Queries
from esm_packed.runners.state.request import STORE_DTYPES
from esm_packed.runners.state.shard import (
    Array,
    Items,
    ShardInput,
    ShardReader,
    ShardShape,
    ShardWriter,
    StoreError,
    arrays_bytes,
    shard_output,
)
from esm_packed.runners.system.terminal import counted

IDENTIFYING_RULES = ("invalid", "duplicates", "gaps", "full_header")
"""The input rules that are part of a run's identity."""

SCORED = Array(LOG_PROBABILITIES, "float32", 20, "site")
"""The output of a scoring run."""

_BLOCK_RECORDS = 1 << 16


def input_identity(index: FastaIndex) -> dict[str, Any]:
    """Return the part of a run's identity that comes from the inputs and the rules for them."""
    return {
        "inputs": [{"size": file.size, "sha256": file.sha256} for file in index.inputs],
        **{name: getattr(index.options, name) for name in IDENTIFYING_RULES},
    }


@dataclass(frozen=True)
class Run:
    """A run: its directory, its plan, and the index of its inputs."""

    directory: RunDirectory
    plan: Plan
    index: FastaIndex

    @staticmethod
    def open(directory: RunDirectory) -> Run:
        """Open the run in a directory.

        Raises:
            PlanError: its plan cannot be read, or the index does not match the plan.
            QueriesError: it is a scoring run whose queries cannot be read.
            InputError: its index cannot be read, or an input has changed.
            OSError: there is no run.
        """
        plan = Plan.read(directory.plan_path)
        kind = ScoringRun if plan.is_scoring else Run
        run = kind(directory, plan, reopen_index(directory.index_path))
        if run.num_items != plan.starts[-1] or any(
            plan.identity[name] != value for name, value in input_identity(run.index).items()
        ):
            raise PlanError(
                f"{directory.index_path}: not the index of this plan; rerun the command that began the run"
            )
        return run

    @property
    def num_items(self) -> int:
        """Number of items of all shards, including copied records."""
        return self.index.num_records

    def describe(self) -> str:
        """Describe the run, for display."""
        residues = counted(self.index.total_residues, "residue")
        return f"embedding {counted(self.index.num_records, 'sequence')}, {residues}"

    def counted_items(self, number: int) -> str:
        """Format a number of items, for display."""
        return counted(number, "sequence")

    def is_computed(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return a mask of the records [start, stop) to compute; the others copy an earlier record."""
        computed = np.empty(stop - start, np.bool_)
        for first in range(start, stop, _BLOCK_RECORDS):
            last = min(first + _BLOCK_RECORDS, stop)
            computed[first - start : last - start] = self.index.first_same[first:last] == np.arange(
                first, last
            )
        return computed

    def computed(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the records of a shard that are computed."""
        start, stop = self.plan.records(shard)
        return start + np.flatnonzero(self.is_computed(start, stop))

    def embedded_lengths(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Return the number of residues to embed of each record in [start, stop)."""
        lengths = np.array(self.index.lengths[start:stop])
        return np.minimum(lengths, self.plan.max_length) if self.plan.max_length else lengths

    def residues(self, shard: int) -> int:
        """Return the number of residues computed for a shard, counted once per window that contains them."""
        lengths, windows = self.item_lengths(shard), self.plan.windows
        return int((windows.num_residues(lengths) if windows else lengths).sum())

    def item_lengths(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the number of residues of each item of a shard."""
        start, stop = self.plan.records(shard)
        return self.embedded_lengths(start, stop)[self.computed(shard) - start].astype(np.int64)

    def finished(self, shards: Iterable[int]) -> list[int]:
        """Return those of `shards` whose files exist; their content is checked when they are read."""
        there = set(self.directory.finished(self.plan.num_shards))
        return [shard for shard in shards if shard in there]

    @property
    def arrays(self) -> list[Array]:
        """The arrays in the file of a shard: the plan's outputs."""
        store_dtype = STORE_DTYPES[self.plan.identity["store_dtype"]]
        return [
            Array(
                name,
                "float32" if kind_of(name) == "unmasked_nll" else store_dtype,
                num_columns(name, self.plan.hidden_size),
                per_of(name),
            )
            for name in self.plan.outputs
        ]

    @property
    def ragged_arrays(self) -> list[Array]:
        """The arrays in which items have different numbers of rows."""
        return [array for array in self.arrays if array.is_ragged]

    def row_counts(self, shard: int) -> Mapping[Per, Items]:
        """Return the number of rows of each item of a shard, by what a row stands for."""
        return row_counts(self.item_lengths(shard))

    def num_rows(self, shard: int) -> dict[Per, int]:
        """Return the number of rows of a shard, by what a row stands for."""
        return {per: int(counts.sum()) for per, counts in self.row_counts(shard).items()}

    @cached_property
    def total_rows(self) -> dict[Per, int]:
        """Number of rows of all shards, by what a row stands for."""
        if not self.ragged_arrays:  # no need to look at the shards
            return {"sequence": self.index.num_records - self.index.num_identical}
        rows = [self.num_rows(shard) for shard in range(self.plan.num_shards)]
        return {per: sum(each[per] for each in rows) for per in rows[0]}

    @property
    def ragged_bytes(self) -> int:
        """Size in bytes of the ragged arrays of all shards."""
        return arrays_bytes(self.ragged_arrays, self.total_rows)

    def shape(self, shard: int) -> ShardShape:
        """Return the layout of the file of a shard."""
        return ShardShape(self.arrays, self.row_counts(shard))

    @property
    def parts(self) -> PartsDirectory:
        """The directory with the parts of the output, if it has any."""
        return PartsDirectory(self.directory.output, self.plan.nonce)

    def open_shard(self, shard: int) -> ShardReader | None:
        """Open a finished shard; None if it is missing, or damaged, in which case its file is removed."""
        path = self.directory.shard_path(shard)
        try:
            return ShardReader(path, shard, self.plan.hash, self.shape(shard), self.parts.path)
        except FileNotFoundError:
            return None
        except StoreError:
            self.discard(shard)
            return None

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is finished and passes verification; if it is damaged, its file is removed."""
        reader = self.open_shard(shard)
        if reader is None:
            return False
        try:
            with reader:
                reader.verify()
        except StoreError:
            self.discard(shard)
            return False
        return True

    def discard(self, shard: int) -> None:
        """Remove the file of a shard, which then counts as unfinished."""
        self.directory.shard_path(shard).unlink(missing_ok=True)

    def output(self, shard: int) -> AbstractContextManager[ShardWriter]:
        """Context manager to write the file of a shard; the shard is finished if the block succeeds.

        Raises:
            OSError: the disk is full or has failed.
        """
        return self._output(self.directory.shard_path(shard), shard, self.shape(shard))

    def piece_output(self, shard: int, first: int, last: int) -> AbstractContextManager[ShardWriter]:
        """Like `output`, for a scratch file with the items [first, last) of those that a shard computes."""
        return self._output(self._piece(shard, first, last), shard, self.shape(shard).piece(first, last))

    def take_piece(self, shard: int, first: int, last: int, whole: ShardWriter) -> None:
        """Move the items written with `piece_output` to the file of the shard.

        Raises:
            StoreError: the piece is missing or damaged.
        """
        path, shape = self._piece(shard, first, last), self.shape(shard).piece(first, last)
        try:
            with ShardReader(path, shard, self.plan.hash, shape) as piece:
                whole.write_piece(piece, first)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: was removed while it was in use; rerun the same command") from error
        path.unlink()

    def _piece(self, shard: int, first: int, last: int) -> Path:
        return self.directory.scratch_path / f"{shard:05}.{first}-{last}.piece"

    def _output(self, path: Path, shard: int, shape: ShardShape) -> AbstractContextManager[ShardWriter]:
        return shard_output(path, self.directory.scratch_path, shard, self.plan.hash, shape)

    def input_of(self, shard: int, num_compared: int = 0) -> ShardInput:
        """Return the input of a shard.

        Args:
            shard: its number.
            num_compared: number of sequences of the whole run to compare with FP32; each shard has a fixed
                share of them.
        """
        start, stop = self.plan.records(shard)
        records = self.computed(shard)
        residues = self.index.token_ids(start, stop, self.plan.max_length)
        compared = self._compared(shard, len(records), num_compared)
        return ShardInput(shard, [residues[record - start] for record in records.tolist()], compared)

    def _compared(self, shard: int, num_items: int, num_compared: int) -> list[int]:
        """Return the items of a shard to compare with FP32, as indices into those that are computed."""
        total = self.plan.num_shards
        share = min(num_compared * (shard + 1) // total - num_compared * shard // total, num_items)
        if not share:
            return []
        random = np.random.default_rng([int(self.plan.hash[:16], 16), shard])
        chosen: list[int] = np.sort(random.choice(num_items, share, replace=False)).tolist()
        return chosen


@dataclass(frozen=True)
class ScoringRun(Run):
    """A run whose items are queries: copies of proteins, with log-probabilities read at given sites."""

    @cached_property
    def queries(self) -> Queries:
        """The queries to compute.

        Raises:
            QueriesError: the queries cannot be read.
        """
        return Queries.read(self.directory.queries_path, self.plan.hash)

    @property
    def num_items(self) -> int:
        """Number of queries of all shards."""
        return len(self.queries)

    def describe(self) -> str:
        """Describe the run, and how many times the input it computes."""
        computed, given = int(self.queries.lengths.sum(dtype=np.int64)), self.index.total_residues
        return (
            f"scoring {counted(self.index.num_records, 'protein')}: computing "
            f"{self.counted_items(self.num_items)}, {counted(computed, 'residue')}, "
            f"{computed / given:,.1f} times the input"
        )

    def counted_items(self, number: int) -> str:
        """Format a number of copies of proteins, for display."""
        return "1 copy" if number == 1 else f"{number:,} copies"

    def computed(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the queries of a shard."""
        return np.arange(*self.plan.records(shard))

    def item_lengths(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the number of residues of each query of a shard."""
        return self.queries.lengths[slice(*self.plan.records(shard))].astype(np.int64)

    @property
    def arrays(self) -> list[Array]:
        """The arrays in the file of a shard."""
        return [SCORED]

    def row_counts(self, shard: int) -> Mapping[Per, Items]:
        """Return the number of rows of each query of a shard, by what a row stands for."""
        start, stop = self.plan.records(shard)
        return {**super().row_counts(shard), "site": np.diff(self.queries.ends[start : stop + 1])}

    def input_of(self, shard: int, num_compared: int = 0) -> ShardInput:
        """Return the input of a shard; see `Run.input_of`."""
        start, stop = self.plan.records(shard)
        copies, places = [], []
        record, token_ids = -1, np.zeros(0, np.uint8)
        for number in range(start, stop):
            if self.queries.records[number] != record:
                record = int(self.queries.records[number])
                (token_ids,) = self.index.token_ids(record, record + 1)
            query = self.queries[number]
            copies.append(query.copy_of(token_ids))
            places.append(query.places)
        return ShardInput(shard, copies, self._compared(shard, len(copies), num_compared), sites=places)
