"""Read and verify the finished shards of a run, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import NamedTuple

import numpy as np

from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import (
    STATUS_NOT_COMPUTED,
    Array,
    Comparison,
    ItemStatus,
    Rows,
    ShardReader,
    StoreError,
)
from esm_packed.runners.system.queues import Ahead

BLOCKS_AHEAD = 4
"""Number of blocks to read and verify ahead while a block is written."""


class DamagedShardError(RuntimeError):
    """A shard is missing or damaged; its file has been removed.

    Args:
        shard: its number.
    """

    def __init__(self, shard: int) -> None:
        super().__init__(f"shard {shard} is missing or damaged")
        self.shard = shard


@dataclass(frozen=True, eq=False)
class ShardNotes:
    """Information on a shard other than its arrays."""

    number: int
    statuses: Mapping[int, ItemStatus]
    comparisons: Mapping[int, Comparison] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)


class Block(NamedTuple):
    """Rows of an array, starting at row `first` of the shard whose notes were yielded last."""

    array: Array
    first: int
    rows: Rows


@contextmanager
def whole_shard(run: Run, shard: int) -> Iterator[ShardReader]:
    """Context manager to read a finished shard.

    Raises:
        DamagedShardError: the shard is missing or damaged; also raised if reads within the block find damage.
    """
    reader = run.open_shard(shard)
    if reader is None:
        raise DamagedShardError(shard)
    try:
        with reader:
            yield reader
    except StoreError as error:
        run.discard(shard)
        raise DamagedShardError(shard) from error


@contextmanager
def blocks_ahead(
    run: Run, shards: Sequence[int], arrays: Sequence[Array], missing: frozenset[int] = frozenset()
) -> Iterator[Iterator[ShardNotes | Block]]:
    """Context manager to read shards in order, ahead in a thread: notes of each, then its verified blocks.

    The rows of a block are valid until the next block is requested.

    Args:
        run: the run with the shards.
        shards: their numbers.
        arrays: arrays to read from each.
        missing: missing shards, which yield rows of NaN, and no rows of ragged arrays.

    Raises:
        DamagedShardError: any other shard is missing or damaged.
    """
    with Ahead(_blocks(run, shards, arrays, missing), BLOCKS_AHEAD, "shard reader") as blocks:
        yield iter(blocks)


def _blocks(
    run: Run, shards: Sequence[int], arrays: Sequence[Array], missing: frozenset[int]
) -> Iterator[ShardNotes | Block]:
    buffers: Iterator[bytearray] | None = None
    for number in shards:
        if number in missing:
            yield from _not_computed(run, number, arrays)
            continue
        with whole_shard(run, number) as reader:
            shape = reader.shape
            buffers = buffers or cycle([bytearray(shape.block_bytes) for _ in range(BLOCKS_AHEAD + 2)])
            yield ShardNotes(number, reader.statuses, reader.comparisons, reader.made_by)
            for array in arrays:
                for start, stop in shape.blocks(array):
                    yield Block(array, start, reader.block(array, start, stop, next(buffers)))


def _not_computed(run: Run, number: int, arrays: Sequence[Array]) -> Iterator[ShardNotes | Block]:
    """Yield notes and rows of NaN in place of a missing shard."""
    shape = run.shape(number)
    status = ItemStatus(STATUS_NOT_COMPUTED, "not computed yet")
    yield ShardNotes(number, dict.fromkeys(range(shape.num_items), status))
    for array in arrays:
        if not array.is_ragged:
            for start, stop in shape.blocks(array):
                yield Block(array, start, np.full((stop - start, array.columns), np.nan, array.dtype))
