"""A run and its shards: what each holds, which are finished, and their computation."""

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
from esm_packed.runners.state.parts import PartsFolder
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
"""What of the rules for the input makes another run."""

SCORED = Array(LOG_PROBABILITIES, "float32", 20, "site")
"""What a scoring run keeps."""

_BLOCK_RECORDS = 1 << 16


def input_identity(index: FastaIndex) -> dict[str, Any]:
    """What of the inputs, and of the rules for them, tells two runs apart."""
    return {
        "inputs": [{"size": file.size, "sha256": file.sha256} for file in index.inputs],
        **{name: getattr(index.options, name) for name in IDENTIFYING_RULES},
    }


@dataclass(frozen=True)
class Run:
    """A run under way: where it is worked on, what is to be done, and the records of its inputs."""

    directory: RunDirectory
    plan: Plan
    index: FastaIndex

    @staticmethod
    def open(directory: RunDirectory) -> Run:
        """The run that a directory holds.

        Raises:
            PlanError: its plan cannot be read, or the index is not that of the plan.
            QueriesError: it is a scoring run whose queries cannot be read.
            InputError: its index cannot be read, or an input has changed.
            OSError: there is none.
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
        """Items of all shards, copied records included."""
        return self.index.num_records

    def describe(self) -> str:
        """What it does, for people."""
        residues = counted(self.index.total_residues, "residue")
        return f"embedding {counted(self.index.num_records, 'sequence')}, {residues}"

    def counted_items(self, number: int) -> str:
        """So many of what it computes, for people."""
        return counted(number, "sequence")

    def is_computed(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the records [start, stop) are computed; the others are copies of an earlier record."""
        computed = np.empty(stop - start, np.bool_)
        for first in range(start, stop, _BLOCK_RECORDS):
            last = min(first + _BLOCK_RECORDS, stop)
            computed[first - start : last - start] = self.index.first_same[first:last] == np.arange(
                first, last
            )
        return computed

    def computed(self, shard: int) -> npt.NDArray[np.int64]:
        """Numbers of the records of a shard that are computed."""
        start, stop = self.plan.records(shard)
        return start + np.flatnonzero(self.is_computed(start, stop))

    def embedded_lengths(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Residues of the records [start, stop) that are embedded."""
        lengths = np.array(self.index.lengths[start:stop])
        return np.minimum(lengths, self.plan.max_length) if self.plan.max_length else lengths

    def residues(self, shard: int) -> int:
        """Residues that computing a shard takes, those in several windows counted as often."""
        lengths, windows = self.item_lengths(shard), self.plan.windows
        return int((windows.num_residues(lengths) if windows else lengths).sum())

    def item_lengths(self, shard: int) -> npt.NDArray[np.int64]:
        """Residues of each item of a shard."""
        start, stop = self.plan.records(shard)
        return self.embedded_lengths(start, stop)[self.computed(shard) - start].astype(np.int64)

    def finished(self, shards: Iterable[int]) -> list[int]:
        """Those of `shards` whose files are there; what they hold is checked when they are read."""
        there = set(self.directory.finished(self.plan.num_shards))
        return [shard for shard in shards if shard in there]

    @property
    def arrays(self) -> list[Array]:
        """What the file of a shard holds: the plan's outputs."""
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
        """Those of the arrays in which items differ in their numbers of rows."""
        return [array for array in self.arrays if array.is_ragged]

    def row_counts(self, shard: int) -> Mapping[Per, Items]:
        """Rows of each item of a shard, by what a row is for."""
        return row_counts(self.item_lengths(shard))

    def num_rows(self, shard: int) -> dict[Per, int]:
        """Rows of a shard, by what a row is for."""
        return {per: int(counts.sum()) for per, counts in self.row_counts(shard).items()}

    @cached_property
    def total_rows(self) -> dict[Per, int]:
        """Rows of all shards, by what the arrays have a row for."""
        if not self.ragged_arrays:  # no shard needs to be looked at
            return {"sequence": self.index.num_records - self.index.num_identical}
        rows = [self.num_rows(shard) for shard in range(self.plan.num_shards)]
        return {per: sum(each[per] for each in rows) for per in rows[0]}

    @property
    def ragged_bytes(self) -> int:
        """Size of the ragged arrays of all shards."""
        return arrays_bytes(self.ragged_arrays, self.total_rows)

    def shape(self, shard: int) -> ShardShape:
        """Where all that is lies in the file of a shard."""
        return ShardShape(self.arrays, self.row_counts(shard))

    @property
    def parts(self) -> PartsFolder:
        """Where the parts of the output are, if it has any."""
        return PartsFolder(self.directory.output, self.plan.nonce)

    def open_shard(self, shard: int) -> ShardReader | None:
        """A finished shard, to be read; None, and its file removed, if there is none that can be trusted."""
        path = self.directory.shard_path(shard)
        try:
            return ShardReader(path, shard, self.plan.hash, self.shape(shard), self.parts.path)
        except FileNotFoundError:
            return None
        except StoreError:
            self.discard(shard)
            return None

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is finished and all of it can be trusted; if it cannot, its file is removed."""
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
        """Remove the file of a shard, which is not finished then."""
        self.directory.shard_path(shard).unlink(missing_ok=True)

    def output(self, shard: int) -> AbstractContextManager[ShardWriter]:
        """The file of a shard, to be filled; it is finished when the block ends well.

        Raises:
            OSError: the disk is full or fails.
        """
        return self._output(self.directory.shard_path(shard), shard, self.shape(shard))

    def piece_output(self, shard: int, first: int, last: int) -> AbstractContextManager[ShardWriter]:
        """A file for the items [first, last) of those that a shard computes, in the scratch folder."""
        return self._output(self._piece(shard, first, last), shard, self.shape(shard).piece(first, last))

    def take_piece(self, shard: int, first: int, last: int, whole: ShardWriter) -> None:
        """Move what `piece_output` has filled to the file of the shard.

        Raises:
            StoreError: it is not there, or not what was written.
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
        """What computing a shard needs.

        Args:
            shard: its number.
            num_compared: how many sequences of the whole run are to be compared with FP32; each shard has its
                share of them, always the same ones.
        """
        start, stop = self.plan.records(shard)
        records = self.computed(shard)
        residues = self.index.token_ids(start, stop, self.plan.max_length)
        compared = self._compared(shard, len(records), num_compared)
        return ShardInput(shard, [residues[record - start] for record in records.tolist()], compared)

    def _compared(self, shard: int, num_items: int, num_compared: int) -> list[int]:
        """Items of a shard that are compared with FP32, as places among those that are computed."""
        total = self.plan.num_shards
        share = min(num_compared * (shard + 1) // total - num_compared * shard // total, num_items)
        random = np.random.default_rng([int(self.plan.hash[:16], 16), shard])
        return np.sort(random.choice(num_items, share, replace=False)).tolist() if share else []


@dataclass(frozen=True)
class ScoringRun(Run):
    """A run whose items are queries: copies of proteins, of which log-probabilities are read at sites."""

    @cached_property
    def queries(self) -> Queries:
        """What is computed.

        Raises:
            QueriesError: it cannot be read.
        """
        return Queries.read(self.directory.queries_path, self.plan.hash)

    @property
    def num_items(self) -> int:
        """Queries of all shards."""
        return len(self.queries)

    def describe(self) -> str:
        """What it does, and how much more than the input it computes."""
        computed, given = int(self.queries.lengths.sum(dtype=np.int64)), self.index.total_residues
        return (
            f"scoring {counted(self.index.num_records, 'protein')}: computing "
            f"{self.counted_items(self.num_items)}, {counted(computed, 'residue')}, "
            f"{computed / given:,.1f} times the input"
        )

    def counted_items(self, number: int) -> str:
        """So many copies of proteins, for people."""
        return "1 copy" if number == 1 else f"{number:,} copies"

    def computed(self, shard: int) -> npt.NDArray[np.int64]:
        """Numbers of the queries of a shard."""
        return np.arange(*self.plan.records(shard))

    def item_lengths(self, shard: int) -> npt.NDArray[np.int64]:
        """Residues of each query of a shard."""
        return self.queries.lengths[slice(*self.plan.records(shard))].astype(np.int64)

    @property
    def arrays(self) -> list[Array]:
        """What the file of a shard holds."""
        return [SCORED]

    def row_counts(self, shard: int) -> Mapping[Per, Items]:
        """Rows of each query of a shard, by what a row is for."""
        start, stop = self.plan.records(shard)
        return {**super().row_counts(shard), "site": np.diff(self.queries.ends[start : stop + 1])}

    def input_of(self, shard: int, num_compared: int = 0) -> ShardInput:
        """What computing a shard needs; see `Run.input_of`."""
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
