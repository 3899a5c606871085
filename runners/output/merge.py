"""Merge the shards of a run into its output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.alphabet import sequence_hashes
from esm_packed.files import whole_or_nothing
from esm_packed.layouts import LAYOUTS
from esm_packed.outputs import Per, kind_of, layer_of
from esm_packed.runners.output.blocks import Block, ShardNotes, blocks_ahead
from esm_packed.runners.output.joining import make_parts
from esm_packed.runners.output.layout import HASH, StoredComparison, StoredProblem
from esm_packed.runners.output.names import STARTS, dataset_of
from esm_packed.runners.output.parts import Part
from esm_packed.runners.output.writer import EmbeddingWriter
from esm_packed.runners.state.parts import remove_unused_parts
from esm_packed.runners.state.plan import Plan
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import (
    STATUS_COMPUTED,
    STATUS_NOT_COMPUTED,
    Items,
    StoreError,
    arrays_bytes,
)
from esm_packed.runners.watch.console import Advance, Console

_COPIES_AT_ONCE = 256
_HASHED_AT_ONCE = 1024
MOST_COMMAND_BYTES = 16_384
"""Maximum size of the command in the output: all attributes together are limited to 64 KB."""


@dataclass(frozen=True)
class MergeOptions:
    """How to create the output.

    Args:
        overwrite: replace an existing output.
        partial: give records of missing or damaged shards a row of NaN and the corresponding status.
        compression: none or gzip.
        in_parts: leave ragged arrays in files next to the output; not with `partial`.
        keep_run: also keep the run's parts, which hold the ragged arrays of its shards.
    """

    overwrite: bool = False
    partial: bool = False
    compression: str = "none"
    in_parts: bool = False
    keep_run: bool = False


def merge_run(run: Run, console: Console, options: MergeOptions) -> int:
    """Create the output of a run whose shards are all finished.

    Args:
        run: the run.
        console: shows the progress.
        options: how to create the output.

    Returns:
        Number of records that were not computed; 0 unless the output is partial.

    Raises:
        DamagedShardError: a shard turns out to be unfinished; no output is created.
        StoreError: the output exists by now and may not be replaced.
        UsageError: something not created by esm-packed is in the place of the parts.
        OSError: the disk is full or has failed.
    """
    shards = range(run.plan.num_shards)
    missing = frozenset(shard for shard in shards if options.partial and not run.is_whole(shard))
    num_rows = _num_rows(run, missing)
    try:
        with console.progress("merging", "B", arrays_bytes(run.arrays, num_rows)) as advance:
            in_parts = options.in_parts and bool(run.ragged_arrays)
            parts = make_parts(run, options.compression, advance) if in_parts else {}
            num_missing = _merge(run, options, missing, parts, num_rows, advance)
    except FileExistsError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    if not num_missing:  # otherwise the run continues, and its shards may have rows in parts
        is_used = in_parts or options.keep_run
        remove_unused_parts(run.directory.output, run.parts.attribute if is_used else None)
    return num_missing


def _num_rows(run: Run, missing: frozenset[int]) -> dict[Per, int]:
    """Return the output's row counts, by what a row stands for: one per record, or those of whole shards."""
    lacking = [run.num_rows(shard) for shard in missing]
    rows = {per: total - sum(each[per] for each in lacking) for per, total in run.total_rows.items()}
    return {**rows, "sequence": run.index.num_records}


def _merge(
    run: Run,
    options: MergeOptions,
    missing: frozenset[int],
    parts: Mapping[Per, Sequence[Part]],
    num_rows: Mapping[Per, int],
    advance: Advance,
) -> int:
    plan, index, output = run.plan, run.index, run.directory.output
    copied = [array for array in run.arrays if not (array.is_ragged and parts)]
    with (
        whole_or_nothing(output, run.directory.scratch_path, overwrite=options.overwrite) as temporary,
        EmbeddingWriter(
            temporary,
            num_sequences=index.num_records,
            starts=[STARTS[per] for per in dict.fromkeys(array.per for array in run.ragged_arrays)],
            compression=options.compression,
        ) as writer,
    ):
        for array in run.arrays:
            dataset = dataset_of(kind_of(array.name), layer_of(array.name), plan.layers)
            if array in copied:
                writer.create(array, dataset, num_rows[array.per])
            else:
                attribute, files = run.parts.attribute, parts[array.per]
                writer.create_virtual(array, dataset, num_rows[array.per], attribute, files)
        writer.write_problems(
            [StoredProblem(left.sequence_id, left.file, left.line, left.reason) for left in index.problems]
        )
        append = _Append(run, writer, advance)
        with blocks_ahead(run, range(plan.num_shards), copied, missing) as found:
            for each in found:
                if isinstance(each, ShardNotes):
                    append.begin(each, has_rows=each.number not in missing)
                else:
                    append.add(each)
        writer.write_plan(plan.identity, plan.input_names)
        attributes = {**_attributes(plan, append.made_by), "complete": int(not append.num_missing)}
        if parts:
            attributes["parts"] = run.parts.attribute
            writer.write_parts(parts)
        writer.write_attributes(attributes)
    return append.num_missing


class _Append:
    """Appends shards in input order, taking rows of copied records from where they were computed.

    Args:
        run: the run with the shards.
        writer: writer of the output.
        advance: called with the number of array bytes written.

    Attributes:
        made_by: the devices, backends and versions that computed the shards.
        num_missing: number of records that were not computed.
    """

    def __init__(self, run: Run, writer: EmbeddingWriter, advance: Advance) -> None:
        self.made_by: list[Mapping[str, str]] = []
        self.num_missing = 0
        self._run = run
        self._writer = writer
        self._advance = advance
        self._reasons: dict[int, str] = {}
        self._num_rows: dict[Per, int] = dict.fromkeys((array.per for array in run.ragged_arrays), 0)
        self._first_row = dict(self._num_rows)
        self._records = np.zeros(0, np.int64)
        self._sources = np.zeros(0, np.int64)
        self._bounds = 0, 0

    def begin(self, shard: ShardNotes, *, has_rows: bool) -> None:
        """Append everything of a shard except its arrays.

        Args:
            shard: the notes on the shard.
            has_rows: whether the shard exists.
        """
        run = self._run
        if shard.made_by and shard.made_by not in self.made_by:
            self.made_by.append(shard.made_by)
        self._bounds = start, stop = run.plan.records(shard.number)
        self._records = records = run.computed(shard.number)
        self._sources = sources = np.array(run.index.first_same[start:stop])
        computed = np.full(len(records), STATUS_COMPUTED, np.uint8)
        for item, each in shard.statuses.items():
            computed[item] = each.status
            self._reasons[int(records[item])] = each.reason
        status = self._with_copies("status", computed)
        lengths, embedded_lengths = np.array(run.index.lengths[start:stop]), run.embedded_lengths(start, stop)
        columns = {
            "lengths": lengths,
            "embedded_lengths": embedded_lengths,
            "truncated": embedded_lengths < lengths,
            "status": status,
            "modified": run.index.modified(start, stop),
            "sequence_hash": _hashes(run, start, stop),
        }
        for per, starts in self._starts(shard.number, has_rows).items():
            columns[STARTS[per]] = self._with_copies(STARTS[per], starts)
        sequence_ids = run.index.sequence_ids(start, stop)
        self._writer.write_rows(start, sequence_ids, columns)
        self._writer.write_problems(
            [
                StoredProblem(sequence_ids[row], "", 0, self._reasons[int(sources[row])])
                for row in np.flatnonzero(status != STATUS_COMPUTED).tolist()
            ]
        )
        self._writer.write_comparisons(
            [
                StoredComparison(sequence_ids[int(records[item]) - start], comparison)
                for item, comparison in shard.comparisons.items()
            ]
        )
        self.num_missing += int(np.count_nonzero(status == STATUS_NOT_COMPUTED))

    def _starts(self, shard: int, has_rows: bool) -> dict[Per, Items]:
        """Return each item's first row in ragged arrays, by what a row stands for; -1 if there is none."""
        counts = self._run.row_counts(shard)
        if not has_rows:
            return {per: np.full(len(counts[per]), -1) for per in self._num_rows}
        self._first_row = dict(self._num_rows)
        for per in self._num_rows:
            self._num_rows[per] += int(counts[per].sum())
        return {per: first + np.cumsum(counts[per]) - counts[per] for per, first in self._first_row.items()}

    def add(self, block: Block) -> None:
        """Append a block of an array."""
        array, first, rows = block
        if array.is_ragged:
            self._writer.write(array.name, self._first_row[array.per] + first, rows)
            self._advance(rows.nbytes)
            return
        start, stop = self._bounds
        last = first + len(rows)
        begin = int(self._records[first]) if first else start
        end = int(self._records[last]) if last < len(self._records) else stop
        step = 2 * len(rows) or _COPIES_AT_ONCE
        for row in range(begin, end, step):
            here = slice(row, min(row + step, end))
            values = rows
            if end - begin > len(rows):
                values = self._with_copies(array.name, rows, slice(first, last), here)
            self._writer.write(array.name, row, values)
        self._advance((end - begin) * array.row_bytes)

    def _with_copies(
        self,
        name: str,
        values: npt.NDArray[Any],
        items: slice = slice(None),
        rows: slice | None = None,
    ) -> npt.NDArray[Any]:
        """Return the values of an array or a column for all records, including copied ones.

        Args:
            name: the array or column, which holds the values of earlier records.
            values: values of `items`.
            items: items of the shard.
            rows: rows of the output; None for all of the shard.
        """
        start, _ = self._bounds
        sources = self._sources if rows is None else self._sources[rows.start - start : rows.stop - start]
        return _with_copies(values, self._records[items], sources, partial(self._writer.read, name))


def _hashes(run: Run, start: int, stop: int) -> npt.NDArray[np.bytes_]:
    """Return the hashes of the embedded residues of records [start, stop)."""
    hashes = np.empty(stop - start, HASH)
    for first in range(start, stop, _HASHED_AT_ONCE):
        token_ids = run.index.token_ids(first, min(first + _HASHED_AT_ONCE, stop), run.plan.max_length)
        hashes[first - start : first - start + len(token_ids)] = sequence_hashes(token_ids)
    return hashes


def _with_copies(
    values: npt.NDArray[Any],
    records: npt.NDArray[np.int64],
    sources: npt.NDArray[np.int64],
    earlier: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Return the values of all records, including copied ones.

    Args:
        values: (num_computed, ...) values of `records`.
        records: (num_computed,) records that were computed, ascending.
        sources: (n,) the record that was computed in place of each record.
        earlier: returns the values of ascending records before `records`, which are already in the output.
    """
    is_earlier = sources < records[0] if len(records) else np.ones(len(sources), np.bool_)
    found = np.empty((len(sources), *values.shape[1:]), values.dtype)
    if len(records):
        np.take(values, np.searchsorted(records, sources), axis=0, out=found, mode="clip")
    if is_earlier.any():
        wanted, which = np.unique(sources[is_earlier], return_inverse=True)
        found[is_earlier] = earlier(wanted)[which]
    return found


def _attributes(plan: Plan, made_by: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the root attributes; values that differ between shards are listed."""
    identity = plan.identity
    packing = {"algorithm": LAYOUTS[identity["layout"]].algorithm, "token_budget": plan.token_budget}
    made = {
        name: "; ".join(sorted({str(each.get(name, "unknown")) for each in made_by}))
        for name in ("device", "attention_backend", "matmul", "versions", "disabled")
    }
    return {
        "kinds": list(identity["kinds"]),
        "layers": np.array(plan.layers, np.int32),
        "model_name": plan.model_name,
        "model_sha256": identity["model_sha256"],
        "dtype": identity["dtype"],
        "store_dtype": identity["store_dtype"],
        "max_length": plan.max_length,
        **({"windows": list(plan.windows)} if plan.windows else {}),
        "packing": json.dumps(packing),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _cut(plan.command),
        **made,
    }


def _cut(command: str) -> str:
    """Return a command as UTF-8, truncated to fit into an attribute."""
    text = command.encode("utf-8", "replace")
    return text[:MOST_COMMAND_BYTES].decode("utf-8", "ignore") + "..." * (len(text) > MOST_COMMAND_BYTES)
