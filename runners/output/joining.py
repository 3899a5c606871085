"""Ragged arrays of neighbouring shards joined to the parts of an output: one copy, shard by shard.

A shard loses its ragged arrays as soon as the part that has them is on disk, so that the disk never holds
more than one part twice. The part keeps the shard's checksums in the shard's manifest, and if a process is
killed in between, or a part is damaged, the next one finds out which shards must be computed again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from esm_packed.files import whole_or_nothing
from esm_packed.outputs import Per
from esm_packed.runners.output.blocks import ShardNotes, blocks_ahead, whole_shard
from esm_packed.runners.output.names import STARTS
from esm_packed.runners.output.parts import Part
from esm_packed.runners.output.writer import ArrayWriter
from esm_packed.runners.state.parts import MOST_PARTS, PART_FORMAT
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import arrays_bytes
from esm_packed.runners.watch.console import Advance

PART_BYTES = 1 << 30
"""Of a part, at least, where there are not more than `MOST_PARTS` parts of this size."""

PARTS_FROM_BYTES = 50_000_000_000
"""Of ragged arrays from which on parts are made unless asked otherwise."""


def wants_parts(run: Run, asked: bool | None) -> bool:
    """Whether the output of a run has parts: as asked, or if it is large."""
    if asked is not None or not run.ragged_arrays:
        return bool(asked)
    return run.ragged_bytes >= PARTS_FROM_BYTES


def make_parts(run: Run, compression: str, advance: Advance) -> dict[Per, list[Part]]:
    """Make the parts of an output, as far as they are not there.

    Args:
        run: all of whose shards are finished.
        compression: as `ArrayWriter` takes it.
        advance: told of bytes that are in a part.

    Returns:
        The parts in row order, by what their rows are for.

    Raises:
        DamagedShardError: a shard, or its rows in a part, is missing or damaged.
        UsageError: something that is not ours is where the parts go.
        OSError: the disk is full or fails.
    """
    folder = run.parts
    folder.make(run.directory.scratch_path)
    parts: dict[Per, list[Part]] = {array.per: [] for array in run.ragged_arrays}
    for number, shards in enumerate(_groups(run)):
        name = f"{number:05}.h5"
        firsts = _first_rows(run, shards)
        path = folder.path / name
        if not path.is_file() or not _are_in_part(run, shards, name):
            with whole_or_nothing(path, run.directory.scratch_path) as temporary:
                _write_part(run, shards, firsts, ArrayWriter(temporary, compression), advance)
            for shard, first in zip(shards, firsts, strict=False):
                _leave_in_part(run, shard, name, first)
        else:
            advance(arrays_bytes(run.ragged_arrays, firsts[-1]))
        for per, earlier in parts.items():
            first_row = earlier[-1].first_row + earlier[-1].num_rows if earlier else 0
            earlier.append(Part(name, path.stat().st_size, first_row, firsts[-1][per]))
    return parts


def _first_rows(run: Run, shards: list[int]) -> list[dict[Per, int]]:
    """First rows of each shard in its part, and at the end their number, by what a row is for."""
    firsts: list[dict[Per, int]] = [dict.fromkeys(STARTS, 0)]
    for shard in shards:
        num_rows = run.num_rows(shard)
        firsts.append({per: first + num_rows[per] for per, first in firsts[-1].items()})
    return firsts


def _groups(run: Run) -> Iterator[list[int]]:
    """Shards of each part."""
    num_shards = run.plan.num_shards
    number = max(1, min(MOST_PARTS, num_shards, run.ragged_bytes // PART_BYTES))
    for shards in np.array_split(np.arange(num_shards), number):
        yield shards.tolist()


def _are_in_part(run: Run, shards: list[int], name: str) -> bool:
    """Whether the ragged arrays of all of these shards have moved to a part, and are whole."""
    for shard in shards:
        with whole_shard(run, shard) as reader:
            if reader.part != name:
                return False
            reader.verify()
    return True


def _write_part(
    run: Run, shards: list[int], firsts: list[dict[Per, int]], writer: ArrayWriter, advance: Advance
) -> None:
    with writer:
        for array in run.ragged_arrays:
            writer.create(array, array.name, firsts[-1][array.per])
        first_of, first = dict(zip(shards, firsts, strict=False)), firsts[0]
        with blocks_ahead(run, shards, run.ragged_arrays) as found:
            for each in found:
                if isinstance(each, ShardNotes):
                    first = first_of[each.number]
                else:
                    writer.write(each.array.name, first[each.array.per] + each.first, each.rows)
                    advance(each.rows.nbytes)
        writer.write_attributes({"format": PART_FORMAT, "plan_hash": run.plan.hash})


def _leave_in_part(run: Run, shard: int, name: str, first: dict[Per, int]) -> None:
    path, scratch = run.directory.shard_path(shard), run.directory.scratch_path
    with whole_shard(run, shard) as reader:
        reader.write_without_ragged(path, scratch, name, first)
