"""Shards of a run: computed one after another on one device, and put together to the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esm_packed.runners.index import FastaIndex
from esm_packed.runners.pipeline import Pipeline, ShardInput
from esm_packed.runners.plan import Plan
from esm_packed.runners.progress import Advance
from esm_packed.runners.rundir import RunDirectory
from esm_packed.runners.store import (
    STATUS_COMPUTED,
    EmbeddingWriter,
    Shard,
    StoredProblem,
    StoreError,
    read_shard,
    write_shard,
)

_BLOCK_RECORDS = 1 << 16


@dataclass(frozen=True)
class Run:
    """A run under way: where it is worked on, what is to be done, and the records of its inputs."""

    directory: RunDirectory
    plan: Plan
    index: FastaIndex
    max_length: int

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
        return np.minimum(lengths, self.max_length) if self.max_length else lengths

    def read(self, shard: int) -> Shard | None:
        """A finished shard; None, and its file removed, if there is none that can be trusted."""
        path = self.directory.shard_path(shard)
        try:
            found = read_shard(path, shard, self.plan.hash)
            if len(found.status) == len(self.computed(shard)):
                return found
        except FileNotFoundError:
            return None
        except StoreError:
            pass
        path.unlink(missing_ok=True)
        return None


def compute_shards(run: Run, shards: Iterable[int], pipeline: Pipeline) -> None:
    """Compute `shards`, in this order, and write each to its file."""

    def write(number: int, shard: Shard) -> None:
        write_shard(run.directory.shard_path(number), shard, number, run.plan.hash)

    pipeline.run((_input_of(run, number) for number in shards), write)


def _input_of(run: Run, number: int) -> ShardInput:
    start, stop = run.plan.records(number)
    records = run.computed(number)
    residues = run.index.token_ids(start, stop, run.max_length)

    return ShardInput(number, [residues[record - start] for record in records.tolist()])


def merge(
    run: Run,
    shards: Callable[[int], Shard],
    writer: EmbeddingWriter,
    layers: Sequence[int],
    advance: Advance,
) -> None:
    """Append all shards in input order, rows of copied records from where they were computed.

    Args:
        run: the run, all of whose shards are finished.
        shards: reads one.
        writer: of the output.
        layers: kept.
        advance: told of bytes of embeddings written.
    """
    reasons: dict[int, str] = {}
    for number in range(run.plan.num_shards):
        shard = shards(number)
        start, stop = run.plan.records(number)
        records = run.computed(number)
        sources = np.array(run.index.first_same[start:stop])
        status = np.empty(stop - start, np.uint8)
        rows = {
            layer: np.empty((stop - start, computed.shape[1]), computed.dtype)
            for layer, computed in shard.embeddings.items()
        }
        here = sources >= start
        place = np.searchsorted(records, sources[here])
        earlier, which = np.unique(sources[~here], return_inverse=True)
        status[here] = shard.status[place]
        if len(earlier):
            status[~here] = writer.status(earlier)[which]
        for layer in layers:
            rows[layer][here] = shard.embeddings[layer][place]
            if len(earlier):
                rows[layer][~here] = writer.embeddings(layer, earlier)[which]
        sequence_ids = run.index.sequence_ids(start, stop)
        writer.write_rows(
            start,
            sequence_ids=sequence_ids,
            lengths=np.array(run.index.lengths[start:stop]),
            embedded_lengths=run.embedded_lengths(start, stop),
            status=status,
            embeddings=rows,
        )
        reasons.update((int(records[row]), reason) for row, reason in shard.reasons.items())
        writer.write_problems(
            [
                StoredProblem(sequence_ids[row], "", 0, reasons[int(sources[row])])
                for row in np.flatnonzero(status != STATUS_COMPUTED).tolist()
            ]
        )
        advance(sum(values.nbytes for values in rows.values()))
