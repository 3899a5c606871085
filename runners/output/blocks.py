"""The finished shards of a run, read block by block and verified."""

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
"""Blocks that are read and verified while the one before them is written."""


class DamagedShardError(RuntimeError):
    """A shard is not there or not what was written; its file has been removed.

    Args:
        shard: its number.
    """

    def __init__(self, shard: int) -> None:
        super().__init__(f"shard {shard} is missing or damaged")
        self.shard = shard


@dataclass(frozen=True, eq=False)
class ShardNotes:
    """What is to be said of a shard beside its arrays."""

    number: int
    statuses: Mapping[int, ItemStatus]
    comparisons: Mapping[int, Comparison] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)


class Block(NamedTuple):
    """Rows of an array, from row `first` of the shard on whose notes came last."""

    array: Array
    first: int
    rows: Rows


@contextmanager
def whole_shard(run: Run, shard: int) -> Iterator[ShardReader]:
    """A finished shard, for reading.

    Raises:
        DamagedShardError: it is not there or not whole; what is read within the block may raise it, too.
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
    """Of shards, in their order, the notes and then blocks, verified, and read ahead by a thread.

    A block's rows are there until the next one is asked for.

    Args:
        run: whose shards they are.
        shards: their numbers.
        arrays: that are read of each.
        missing: shards that are not there: of these there are rows of NaN, and none of ragged arrays.

    Raises:
        DamagedShardError: another one is not there or not whole.
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
    """What stands for a shard that is not there."""
    shape = run.shape(number)
    status = ItemStatus(STATUS_NOT_COMPUTED, "not computed yet")
    yield ShardNotes(number, dict.fromkeys(range(shape.num_items), status))
    for array in arrays:
        if not array.is_ragged:
            for start, stop in shape.blocks(array):
                yield Block(array, start, np.full((stop - start, array.columns), np.nan, array.dtype))
