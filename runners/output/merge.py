"""The shards of a run put together to its output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from esm_packed.layouts import LAYOUTS
from esm_packed.runners.output.layout import StoredComparison, StoredProblem
from esm_packed.runners.output.writer import EmbeddingWriter
from esm_packed.runners.state.plan import Plan
from esm_packed.runners.state.request import STORE_DTYPES
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_NOT_COMPUTED, Shard, StoreError
from esm_packed.runners.system.files import whole_or_nothing
from esm_packed.runners.system.memory import RowBuffers, Rows
from esm_packed.runners.watch.console import Advance, Console

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


def _merge_run(run: Run, console: Console, overwrite: bool, partial: bool) -> int:
    plan, index, output = run.plan, run.index, run.directory.output
    store_dtype = STORE_DTYPES[plan.identity["store_dtype"]]
    total = index.num_records * plan.hidden_size * len(plan.layers) * np.dtype(store_dtype).itemsize
    made_by: list[Mapping[str, str]] = []
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
        num_missing = merge(run, _read_ahead(run, made_by, partial), writer, advance)
        writer.write_plan(plan.identity, plan.input_names)
        writer.write_attributes({**_attributes(plan, made_by), "complete": int(not num_missing)})
    return num_missing


def _read_ahead(run: Run, made_by: list[Mapping[str, str]], partial: bool) -> Iterator[Shard]:
    """All shards in their order, each read and verified while the one before it is written.

    Args:
        run: whose shards they are.
        made_by: collects what made them.
        partial: rows of NaN come in the place of those that are not there or not whole.

    Raises:
        DamagedShardError: one is not there or not whole, unless `partial`.
    """
    buffers = RowBuffers(), RowBuffers()
    last = run.plan.num_shards - 1
    with ThreadPoolExecutor(1, "shard reader") as reader:
        ahead = reader.submit(run.read, 0, buffers[0])
        for number in range(last + 1):
            shard = ahead.result()
            if shard is None and not partial:
                raise DamagedShardError(number)
            if number < last:
                ahead = reader.submit(run.read, number + 1, buffers[(number + 1) % 2])
            if shard is None:
                shard = _not_computed(run, number)
            elif shard.made_by not in made_by:
                made_by.append(shard.made_by)
            yield shard


def _not_computed(run: Run, number: int) -> Shard:
    """What stands for a shard that is not there."""
    num_rows = len(run.computed(number))
    shape, dtype = (num_rows, run.plan.hidden_size), STORE_DTYPES[run.plan.identity["store_dtype"]]
    return Shard(
        np.full(num_rows, STATUS_NOT_COMPUTED, np.uint8),
        {layer: np.full(shape, np.nan, dtype) for layer in run.plan.layers},
        dict.fromkeys(range(num_rows), "not computed yet"),
    )


def merge(run: Run, shards: Iterable[Shard], writer: EmbeddingWriter, advance: Advance) -> int:
    """Append all shards in input order, rows of copied records from where they were computed.

    Args:
        run: whose shards they are.
        shards: all of them, in their order; each is used before the next is asked for.
        writer: of the output.
        advance: told of bytes of embeddings written.

    Returns:
        How many records are not computed.
    """
    num_missing = 0
    reasons: dict[int, str] = {}
    buffers = RowBuffers()
    for number, shard in enumerate(shards):
        start, stop = run.plan.records(number)
        records = run.computed(number)
        sources = np.array(run.index.first_same[start:stop])
        status, rows = shard.status, shard.embeddings
        if len(records) < stop - start:
            status, rows = _with_copies(shard, records, sources, start, writer, buffers)
        sequence_ids = run.index.sequence_ids(start, stop)
        writer.write_rows(
            start,
            sequence_ids=sequence_ids,
            lengths=np.array(run.index.lengths[start:stop]),
            embedded_lengths=run.embedded_lengths(start, stop),
            status=status,
            modified=run.index.modified(start, stop),
            embeddings=rows,
        )
        reasons.update((int(records[row]), reason) for row, reason in shard.reasons.items())
        writer.write_problems(
            [
                StoredProblem(sequence_ids[row], "", 0, reasons[int(sources[row])])
                for row in np.flatnonzero(status != STATUS_COMPUTED).tolist()
            ]
        )
        writer.write_comparisons(
            [
                StoredComparison(sequence_ids[int(records[row]) - start], comparison)
                for row, comparison in shard.comparisons.items()
            ]
        )
        num_missing += int(np.count_nonzero(status == STATUS_NOT_COMPUTED))
        advance(sum(values.nbytes for values in rows.values()))
    return num_missing


def _with_copies(
    shard: Shard,
    records: npt.NDArray[np.int64],
    sources: npt.NDArray[np.int64],
    start: int,
    writer: EmbeddingWriter,
    buffers: RowBuffers,
) -> tuple[npt.NDArray[np.uint8], Mapping[int, Rows]]:
    """Status and rows of all records of a shard, the copied ones included.

    Args:
        shard: what was computed of it.
        records: (num_computed,) records that were computed.
        sources: (num_records,) for each record of the shard the one that was computed in its place.
        start: first record of the shard; sources before it are read from the output.
        writer: of the output.
        buffers: hold the rows.
    """
    here = sources >= start
    place = np.zeros(len(sources), np.int64)
    place[here] = np.searchsorted(records, sources[here])
    earlier, which = np.unique(sources[~here], return_inverse=True)
    status = np.empty(len(sources), np.uint8)
    status[here] = shard.status[place[here]]
    if len(earlier):
        status[~here] = writer.status(earlier)[which]
    rows = {}
    for layer, computed in shard.embeddings.items():
        rows[layer] = buffers.rows(layer, (len(sources), computed.shape[1]), computed.dtype)
        if len(records):
            np.take(computed, place, axis=0, out=rows[layer], mode="clip")
        if len(earlier):
            rows[layer][~here] = writer.embeddings(layer, earlier)[which]
    return status, rows


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
