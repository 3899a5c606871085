"""The shards of a run put together to its output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.files import whole_or_nothing
from esm_packed.layouts import LAYOUTS
from esm_packed.runners.output.layout import StoredComparison, StoredProblem
from esm_packed.runners.output.writer import EmbeddingWriter
from esm_packed.runners.state.plan import Plan
from esm_packed.runners.state.request import STORE_DTYPES
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import (
    STATUS_COMPUTED,
    STATUS_NOT_COMPUTED,
    Comparison,
    ItemStatus,
    Rows,
    StoreError,
    mean_of,
)
from esm_packed.runners.system.queues import Ahead
from esm_packed.runners.watch.console import Advance, Console

BLOCKS_AHEAD = 4
"""Blocks that are read and verified while the one before them is written."""

_COPIES_AT_ONCE = 256
MOST_COMMAND_BYTES = 16_384
"""Of the command in the output: all attributes together end at 64 KB."""


class DamagedShardError(RuntimeError):
    """A shard is not there or not what was written; its file has been removed.

    Args:
        shard: its number.
    """

    def __init__(self, shard: int) -> None:
        super().__init__(f"shard {shard} is missing or damaged")
        self.shard = shard


def merge_run(run: Run, console: Console, *, overwrite: bool, partial: bool = False) -> int:
    """Make the output of a run, all of whose shards are finished.

    Args:
        run: whose output it is.
        console: shows how far it is.
        overwrite: replace an output that is there.
        partial: give records of shards that are missing or damaged a row of NaN, with the status for it.

    Returns:
        How many records are not computed; 0 unless `partial`.

    Raises:
        DamagedShardError: one of them turns out not to be; there is no output then.
        StoreError: the output exists by now and may not be replaced.
        OSError: the disk is full or fails.
    """
    try:
        return _merge_run(run, console, overwrite, partial)
    except FileExistsError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error


def _merge_run(run: Run, console: Console, overwrite: bool, is_partial: bool) -> int:
    plan, index, output = run.plan, run.index, run.directory.output
    store_dtype = STORE_DTYPES[plan.identity["store_dtype"]]
    total = index.num_records * plan.hidden_size * len(plan.layers) * np.dtype(store_dtype).itemsize
    with (
        whole_or_nothing(output, run.directory.scratch_path, overwrite=overwrite) as temporary,
        EmbeddingWriter(
            temporary,
            num_sequences=index.num_records,
            hidden_size=plan.hidden_size,
            layers=plan.layers,
            store_dtype=store_dtype,
        ) as writer,
        console.progress("merging", "B", total) as advance,
    ):
        writer.write_problems(
            [StoredProblem(left.sequence_id, left.file, left.line, left.reason) for left in index.problems]
        )
        with Ahead(_blocks_of(run, is_partial), BLOCKS_AHEAD, "shard reader") as blocks:
            made_by, num_missing = _append(run, blocks, writer, advance)
        writer.write_plan(plan.identity, plan.input_names)
        writer.write_attributes({**_attributes(plan, made_by), "complete": int(not num_missing)})
    return num_missing


@dataclass(frozen=True, eq=False)
class _Shard:
    """What is to be said of a shard beside its arrays."""

    number: int
    statuses: Mapping[int, ItemStatus]
    comparisons: Mapping[int, Comparison] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)


class _Block(NamedTuple):
    """Embeddings in a layer of the items from `first` on of those that a shard computes."""

    shard: _Shard
    layer: int
    first: int
    rows: Rows


def _blocks_of(run: Run, is_partial: bool) -> Iterator[_Block]:
    """The blocks of all shards in their order, verified; later ones are read into the same memory.

    Args:
        run: whose shards they are.
        is_partial: give rows of NaN in place of a shard that is not there or not whole.

    Raises:
        DamagedShardError: one is not there or not whole.
    """
    buffers: Iterator[bytearray] | None = None
    for number in range(run.plan.num_shards):
        if is_partial and not run.is_whole(number):
            yield from _not_computed(run, number)
            continue
        reader = run.open_shard(number)
        if reader is None:
            raise DamagedShardError(number)
        buffers = buffers or cycle([bytearray(reader.shape.block_bytes) for _ in range(BLOCKS_AHEAD + 2)])
        shard = _Shard(number, reader.statuses, reader.comparisons, reader.made_by)
        try:
            with reader:
                for layer in run.plan.layers:
                    array = reader.shape.arrays[mean_of(layer)]
                    for start, stop in reader.shape.blocks(array):
                        yield _Block(shard, layer, start, reader.block(array, start, stop, next(buffers)))
        except StoreError as error:
            run.discard(number)
            raise DamagedShardError(number) from error


def _not_computed(run: Run, number: int) -> Iterator[_Block]:
    """What stands for a shard that is not there."""
    shape = run.shape(number)
    status = ItemStatus(STATUS_NOT_COMPUTED, "not computed yet")
    shard = _Shard(number, dict.fromkeys(range(shape.num_items), status))
    for layer in run.plan.layers:
        array = shape.arrays[mean_of(layer)]
        for start, stop in shape.blocks(array):
            yield _Block(shard, layer, start, np.full((stop - start, array.columns), np.nan, array.dtype))


def _append(
    run: Run, blocks: Iterable[_Block], writer: EmbeddingWriter, advance: Advance
) -> tuple[list[Mapping[str, str]], int]:
    """Append all shards in input order, rows of copied records from where they were computed.

    Args:
        run: whose shards they are.
        blocks: of all shards, in their order; each is used before the next is asked for.
        writer: of the output.
        advance: told of bytes of embeddings written.

    Returns:
        What made the shards, and how many records are not computed.
    """
    made_by: list[Mapping[str, str]] = []
    num_missing = 0
    reasons: dict[int, str] = {}
    for shard, of_shard in groupby(blocks, key=attrgetter("shard")):
        if shard.made_by and shard.made_by not in made_by:
            made_by.append(shard.made_by)
        start, stop = run.plan.records(shard.number)
        records = run.computed(shard.number)
        sources = np.array(run.index.first_same[start:stop])
        num_missing += _append_columns(run, shard, records, sources, reasons, writer)
        for _, layer, first, rows in of_shard:
            last = first + len(rows)
            begin = int(records[first]) if first else start
            end = int(records[last]) if last < len(records) else stop
            step = 2 * len(rows) or _COPIES_AT_ONCE
            for row in range(begin, end, step):
                here = slice(row, min(row + step, end))
                if end - begin > len(rows):
                    earlier = partial(writer.embeddings, layer)
                    copied = sources[here.start - start : here.stop - start]
                    writer.write_embeddings(
                        layer, row, _with_copies(rows, records[first:last], copied, earlier)
                    )
                else:
                    writer.write_embeddings(layer, row, rows)
            advance((end - begin) * rows.shape[1] * rows.itemsize)
    return made_by, num_missing


def _append_columns(
    run: Run,
    shard: _Shard,
    records: npt.NDArray[np.int64],
    sources: npt.NDArray[np.int64],
    reasons: dict[int, str],
    writer: EmbeddingWriter,
) -> int:
    """Append all of a shard but its embeddings.

    Args:
        run: whose shard it is.
        shard: what is to be said of it.
        records: (num_computed,) records that were computed.
        sources: (num_records,) for each record of the shard the one that was computed in its place.
        reasons: why records were not simply computed; those of this shard are added.
        writer: of the output.

    Returns:
        How many of its records are not computed.
    """
    start, stop = run.plan.records(shard.number)
    sequence_ids = run.index.sequence_ids(start, stop)
    computed = np.full(len(records), STATUS_COMPUTED, np.uint8)
    for item, each in shard.statuses.items():
        computed[item] = each.status
        reasons[int(records[item])] = each.reason
    status = _with_copies(computed, records, sources, writer.status)
    writer.write_rows(
        start,
        sequence_ids=sequence_ids,
        lengths=np.array(run.index.lengths[start:stop]),
        embedded_lengths=run.embedded_lengths(start, stop),
        status=status,
        modified=run.index.modified(start, stop),
    )
    writer.write_problems(
        [
            StoredProblem(sequence_ids[row], "", 0, reasons[int(sources[row])])
            for row in np.flatnonzero(status != STATUS_COMPUTED).tolist()
        ]
    )
    writer.write_comparisons(
        [
            StoredComparison(sequence_ids[int(records[item]) - start], comparison)
            for item, comparison in shard.comparisons.items()
        ]
    )
    return int(np.count_nonzero(status == STATUS_NOT_COMPUTED))


def _with_copies(
    values: npt.NDArray[Any],
    records: npt.NDArray[np.int64],
    sources: npt.NDArray[np.int64],
    earlier: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Values of all records, the copied ones included.

    Args:
        values: (num_computed, ...) of `records`.
        records: (num_computed,) that were computed, ascending.
        sources: (n,) for each record the one that was computed in its place.
        earlier: gives those of ascending records that are before `records` and in the output already.
    """
    is_earlier = sources < records[0] if len(records) else np.ones(len(sources), np.bool_)
    found = np.empty((len(sources), *values.shape[1:]), values.dtype)
    if len(records):
        np.take(values, np.searchsorted(records, sources), axis=0, out=found, mode="clip")
    if is_earlier.any():
        wanted, which = np.unique(sources[is_earlier], return_inverse=True)
        found[is_earlier] = earlier(wanted)[which]
    return found


def _attributes(plan: Plan, made_by: Sequence[Mapping[str, str]]) -> dict[str, str | int]:
    """Root attributes; what differed between shards is listed."""
    identity = plan.identity
    packing = {"algorithm": LAYOUTS[identity["layout"]].algorithm, "token_budget": plan.token_budget}
    made = {
        name: "; ".join(sorted({str(each[name]) for each in made_by}))
        for name in ("device", "attention_backend", "versions", "disabled")
    }
    return {
        "model_name": plan.model_name,
        "model_sha256": identity["model_sha256"],
        "dtype": identity["dtype"],
        "store_dtype": identity["store_dtype"],
        "max_length": plan.max_length,
        "packing": json.dumps(packing),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _cut(plan.command),
        **made,
    }


def _cut(command: str) -> str:
    """A command as UTF-8 that fits into an attribute."""
    text = command.encode("utf-8", "replace")
    return text[:MOST_COMMAND_BYTES].decode("utf-8", "ignore") + "..." * (len(text) > MOST_COMMAND_BYTES)
