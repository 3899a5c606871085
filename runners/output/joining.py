"""Join the ragged arrays of consecutive shards into the parts of an output, copying shard by shard.

A shard loses its ragged arrays as soon as the part that holds them is on disk, so that at most one part is on
disk twice. The checksums of the rows in a part stay in the shard's manifest. If a process is killed in
between, or a part is damaged, the next process can tell which shards must be recomputed.
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
"""Minimum size of a part, larger if there would be more than `MOST_PARTS` parts."""

PARTS_FROM_BYTES = 50_000_000_000
"""Size of the ragged arrays from which parts are made by default."""


def wants_parts(run: Run, asked: bool | None) -> bool:
    """Whether the output of a run has parts: as requested, or by default if it is large."""
    if asked is not None or not run.ragged_arrays:
        return bool(asked)
    return run.ragged_bytes >= PARTS_FROM_BYTES


def make_parts(run: Run, compression: str, advance: Advance) -> dict[Per, list[Part]]:
    """Create the missing parts of an output.

    Args:
        run: a run whose shards are all finished.
        compression: as in `ArrayWriter`.
        advance: called with the number of bytes that have been stored in a part.

    Returns:
        The parts in row order, by what their rows stand for.

    Raises:
        DamagedShardError: a shard, or its rows in a part, is missing or damaged.
        UsageError: something not created by esm-packed is in the place of the parts.
        OSError: the disk is full or has failed.
    """
    made = run.parts
    made.make(run.directory.scratch_path)
    parts: dict[Per, list[Part]] = {array.per: [] for array in run.ragged_arrays}
    for number, shards in enumerate(_groups(run)):
        name = f"{number:05}.h5"
        firsts = _first_rows(run, shards)
        path = made.path / name
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
    """Return the first rows of each shard in its part, then the total number, by what a row stands for."""
    firsts: list[dict[Per, int]] = [dict.fromkeys(STARTS, 0)]
    for shard in shards:
        num_rows = run.num_rows(shard)
        firsts.append({per: first + num_rows[per] for per, first in firsts[-1].items()})
    return firsts


def _groups(run: Run) -> Iterator[list[int]]:
    """Yield the shards of each part."""
    num_shards = run.plan.num_shards
    number = max(1, min(MOST_PARTS, num_shards, run.ragged_bytes // PART_BYTES))
    for shards in np.array_split(np.arange(num_shards), number):
        yield shards.tolist()


def _are_in_part(run: Run, shards: list[int], name: str) -> bool:
    """Whether the ragged arrays of all these shards have moved to the part `name` and pass verification."""
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
