"""A run and its shards: what each holds, which are finished, and their computation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.index import FastaIndex, reopen_index
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import Plan, PlanError
from esm_packed.runners.state.shard import Shard, StoreError, read_shard, write_shard
from esm_packed.runners.system.memory import RowBuffers

IDENTIFYING_RULES = ("invalid", "duplicates", "gaps", "full_header")
"""What of the rules for the input makes another run."""

_BLOCK_RECORDS = 1 << 16


@dataclass(frozen=True)
class ShardInput:
    """What a shard computes.

    Args:
        number: of the shard.
        token_ids: the residues of each of its records.
        compared: records, as places in `token_ids`, that are also computed in FP32 on their own.
    """

    number: int
    token_ids: Sequence[npt.NDArray[np.uint8]]
    compared: Sequence[int] = ()


@dataclass(frozen=True)
class Run:
    """A run under way: where it is worked on, what is to be done, and the records of its inputs."""

    directory: RunDirectory
    plan: Plan
    index: FastaIndex

    @classmethod
    def open(cls, directory: RunDirectory) -> Run:
        """The run that a directory holds.

        Raises:
            PlanError: its plan cannot be read, or the index is not that of the plan.
            InputError: its index cannot be read, or an input has changed.
            OSError: there is none.
        """
        run = cls(directory, Plan.read(directory.plan_path), reopen_index(directory.index_path))
        found = {
            "inputs": [{"size": file.size, "sha256": file.sha256} for file in run.index.inputs],
            **{name: getattr(run.index.options, name) for name in IDENTIFYING_RULES},
        }
        if run.index.num_records != run.plan.starts[-1] or any(
            run.plan.identity[name] != value for name, value in found.items()
        ):
            raise PlanError(
                f"{directory.index_path}: not the index of this plan; repeat the command that began the run"
            )
        return run

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
        """Residues that computing a shard takes."""
        start, _ = self.plan.records(shard)
        return int(self.embedded_lengths(*self.plan.records(shard))[self.computed(shard) - start].sum())

    def finished(self, shards: Iterable[int]) -> list[int]:
        """Those of `shards` whose files are there; what they hold is checked when they are read."""
        there = set(self.directory.finished(self.plan.num_shards))
        return [shard for shard in shards if shard in there]

    def read(self, shard: int, buffers: RowBuffers | None = None) -> Shard | None:
        """A finished shard; None, and its file removed, if there is none that can be trusted.

        Args:
            shard: its number.
            buffers: as `store.read_shard` takes them.
        """
        path = self.directory.shard_path(shard)
        try:
            found = read_shard(path, shard, self.plan.hash, buffers)
            if self._fits(found, len(self.computed(shard))):
                return found
        except FileNotFoundError:
            return None
        except StoreError:
            pass
        path.unlink(missing_ok=True)
        return None

    def _fits(self, shard: Shard, num_rows: int) -> bool:
        """Whether a shard has a status, and a row for each layer, of `num_rows` records."""
        shapes = {layer: rows.shape for layer, rows in shard.embeddings.items()}
        return shard.status.shape == (num_rows,) and shapes == dict.fromkeys(
            self.plan.layers, (num_rows, self.plan.hidden_size)
        )

    def write(self, number: int, shard: Shard) -> None:
        """Write a shard, which is finished then.

        Raises:
            OSError: the disk is full or fails.
        """
        directory = self.directory
        write_shard(directory.shard_path(number), directory.scratch_path, shard, number, self.plan.hash)

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
        total = self.plan.num_shards
        share = min(num_compared * (shard + 1) // total - num_compared * shard // total, len(records))
        random = np.random.default_rng([int(self.plan.hash[:16], 16), shard])
        compared = np.sort(random.choice(len(records), share, replace=False)).tolist() if share else []
        return ShardInput(shard, [residues[record - start] for record in records.tolist()], compared)
