"""Files of shards: what is written in any order is read back, or refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from kept_shards import read_all
from nursery import names_in

from esm_packed.rows import row_counts
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.state import shard as shard_module
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import Plan
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import (
    STATUS_FAILED,
    STATUS_RECOMPUTED,
    Array,
    Comparison,
    ItemStatus,
    Rows,
    ShardReader,
    ShardShape,
    ShardWriter,
    StoreError,
    shard_output,
)

ARRAYS = [
    Array("mean/3", "float32", 12),
    Array("per_residue/6", "float16", 5, per="residue"),
    Array("mean/6", "float16", 12),
    Array("pairs", "float16", 1, per="pair"),
    Array("logits", "float32", 3, per="residue"),
]
LENGTHS = [3, 0, 7, 1, 1, 20, 4]
STATUSES = {2: ItemStatus(STATUS_RECOMPUTED, "recomputed"), 4: ItemStatus(STATUS_FAILED, "not finite")}
COMPARISONS = {5: Comparison(0.5, 1e-3, 1e-4)}
MADE_BY = {"device": "cpu"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of each array, of which the last is not full."""
    monkeypatch.setattr(shard_module, "BLOCK_BYTES", 100)


@pytest.fixture
def shape() -> ShardShape:
    return ShardShape(ARRAYS, row_counts(LENGTHS))


def rows_of(shape: ShardShape, items: list[int]) -> dict[str, Rows]:
    """Rows of `items`, which tell their array, item and place."""
    rows = {}
    for number, array in enumerate(shape.arrays.values()):
        counts = [shape.starts(array)[item + 1] - shape.starts(array)[item] for item in items]
        values = [
            np.arange(count * array.columns).reshape(count, array.columns) + 100 * item + number / 4
            for item, count in zip(items, counts, strict=True)
        ]
        rows[array.name] = np.concatenate(values or [np.zeros((0, array.columns))]).astype(array.dtype)
    return rows


def fill(writer: ShardWriter, groups: list[list[int]]) -> None:
    for items in groups:
        statuses = {key: STATUSES[key] for key in items if key in STATUSES}
        comparisons = {key: COMPARISONS[key] for key in items if key in COMPARISONS}
        writer.write(np.array(items, np.int64), rows_of(writer.shape, items), statuses, comparisons)
    writer.made_by = MADE_BY


def write(path: Path, shape: ShardShape, groups: list[list[int]], number: int = 3) -> None:
    with shard_output(path, path.parent, number, "plan", shape) as writer:
        fill(writer, groups)


def check(path: Path, shape: ShardShape) -> None:
    """See that a file holds what `write` wrote.

    Raises:
        StoreError: it says itself that it does not.
    """
    with ShardReader(path, 3, "plan", shape) as reader:
        reader.verify()
        expected = rows_of(shape, list(range(shape.num_items)))
        assert {name: read_all(reader, name).tobytes() for name in shape.arrays} == {
            name: rows.tobytes() for name, rows in expected.items()
        }
        assert reader.statuses == STATUSES
        assert reader.status.tolist() == [0, 0, STATUS_RECOMPUTED, 0, STATUS_FAILED, 0, 0]
        assert reader.comparisons == COMPARISONS
        assert reader.made_by == MADE_BY


@pytest.mark.parametrize(
    "groups",
    [[[0, 1, 2, 3, 4, 5, 6]], [[5], [0, 1], [], [6, 3], [4, 2]], [[6], [5], [4], [3], [2], [1], [0]]],
)
def test_a_shard_is_read_as_it_was_written(
    tmp_path: Path, shape: ShardShape, groups: list[list[int]]
) -> None:
    path = tmp_path / "00003.shard"
    write(path, shape, groups)
    check(path, shape)
    assert names_in(tmp_path) == ["00003.shard"]
    for number, plan in ((4, "plan"), (3, "another plan")):
        with pytest.raises(StoreError, match="another run's"):
            ShardReader(path, number, plan, shape)


def test_bytes_do_not_depend_on_the_order_in_which_items_come(tmp_path: Path, shape: ShardShape) -> None:
    write(tmp_path / "a", shape, [[0, 1, 2, 3, 4, 5, 6]])
    write(tmp_path / "b", shape, [[1, 0, 2], [5, 3], [4, 6]])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_item_that_is_missing_leaves_no_file(tmp_path: Path, shape: ShardShape) -> None:
    with pytest.raises(ValueError, match="shard 3: 2 items are not written"):
        write(tmp_path / "00003.shard", shape, [[0, 2, 3], [5, 4]])
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("change", ["a row less", "a row more", "a column less"])
def test_rows_that_do_not_fit_their_items_are_refused(tmp_path: Path, shape: ShardShape, change: str) -> None:
    rows = rows_of(shape, [5, 6])
    values = rows["logits"]
    changed = {
        "a row less": values[:-1],
        "a row more": values.repeat(2, 0)[:25],
        "a column less": values[:, 1:],
    }
    with (
        pytest.raises(ValueError, match="logits of 2 items"),
        shard_output(tmp_path / "00003.shard", tmp_path, 3, "plan", shape) as writer,
    ):
        writer.write(np.array([5, 6]), rows | {"logits": changed[change]})
    assert names_in(tmp_path) == []


def test_a_disk_that_is_full_leaves_no_file(
    tmp_path: Path, shape: ShardShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    room = len(LENGTHS) * 50

    def limited(file: int, data: bytes, offset: int) -> int:
        if offset + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "00003.shard", shape, [list(range(7))])
    assert names_in(tmp_path) == []


def test_short_writes_and_reads_are_completed(
    tmp_path: Path, shape: ShardShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda file, data, offset: preadv(file, [data[0][:7]], offset))
    write(tmp_path / "00003.shard", shape, [list(range(7))])
    check(tmp_path / "00003.shard", shape)


def test_parts_make_the_whole(tmp_path: Path, shape: ShardShape) -> None:
    """An item that failed on its own has rows of NaN, as many as it is long."""
    parts = {first: tmp_path / f"part{first}" for first in (0, 3)}
    for (first, path), last in zip(parts.items(), (2, 7), strict=True):
        with shard_output(path, tmp_path, 3, "plan", shape.piece(first, last)) as writer:
            items = list(range(first, last))
            statuses = {item - first: status for item, status in STATUSES.items() if item in items}
            comparisons = {item - first: each for item, each in COMPARISONS.items() if item in items}
            writer.write(np.arange(last - first), rows_of(shape, items), statuses, comparisons)
            writer.made_by = MADE_BY
    with shard_output(tmp_path / "whole", tmp_path, 3, "plan", shape) as writer:
        writer.write_failed(2, "its worker died")
        for first, last in ((3, 7), (0, 2)):
            with ShardReader(parts[first], 3, "plan", shape.piece(first, last)) as piece:
                writer.write_piece(piece, first)
    with ShardReader(tmp_path / "whole", 3, "plan", shape) as reader:
        assert reader.statuses == STATUSES | {2: ItemStatus(STATUS_FAILED, "its worker died")}
        assert reader.comparisons == COMPARISONS
        assert reader.made_by == MADE_BY
        expected = rows_of(shape, list(range(7)))
        for name, array in shape.arrays.items():
            start, stop = shape.starts(array)[2:4]
            expected[name][start:stop] = np.nan
            np.testing.assert_array_equal(read_all(reader, name), expected[name])


def test_damage_is_found_in_the_block_that_has_it(tmp_path: Path, shape: ShardShape) -> None:
    path = tmp_path / "00003.shard"
    write(path, shape, [list(range(7))])
    content = bytearray(path.read_bytes())
    array = shape.arrays["per_residue/6"]
    content[shape.offset(array, 13)] ^= 1
    path.write_bytes(content)
    with ShardReader(path, 3, "plan", shape) as reader:
        buffer = bytearray(shape.block_bytes)
        for each in shape.arrays.values():
            for start, stop in shape.blocks(each):
                if each == array and start <= 13 < stop:
                    with pytest.raises(StoreError, match="damaged"):
                        reader.block(each, start, stop, buffer)
                else:
                    reader.block(each, start, stop, buffer)
        with pytest.raises(StoreError, match="damaged"):
            reader.verify()


@pytest.mark.parametrize("change", ["an item less", "a length", "columns", "dtype", "an array less", "order"])
def test_a_shard_of_another_shape_is_not_that_of_the_plan(
    tmp_path: Path, shape: ShardShape, change: str
) -> None:
    """Whole and with the right checksums, as a mistake in a program would write it."""
    arrays, lengths = list(ARRAYS), list(LENGTHS)
    if change == "an item less":
        lengths = lengths[:-1]
    elif change == "a length":
        lengths[0] += 1
    elif change == "columns":
        arrays[0] = arrays[0]._replace(columns=11)
    elif change == "dtype":
        arrays[0] = arrays[0]._replace(dtype="int32")
    elif change == "an array less":
        del arrays[0]
    else:
        arrays.reverse()
    path = tmp_path / "00003.shard"
    other = ShardShape(arrays, row_counts(lengths))
    write(path, other, [list(range(other.num_items))])
    with pytest.raises(StoreError, match="not the arrays of this run"):
        ShardReader(path, 3, "plan", shape)


@pytest.mark.parametrize("seed", range(4))
def test_a_shard_cut_short_or_altered_is_never_another_shard(
    tmp_path: Path, shape: ShardShape, seed: int
) -> None:
    """Whatever bytes a disk makes of a shard, it reads as what was written or is refused."""
    path = tmp_path / "00003.shard"
    write(path, shape, [list(range(7))])
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(250):
        content = bytearray(whole)
        kind = rng.integers(3)
        if kind == 0:
            content = content[: rng.integers(len(whole))]
        elif kind == 1:
            for place in rng.integers(len(whole), size=rng.integers(1, 4)):
                content[place] = rng.integers(256)
        else:
            start = int(rng.integers(len(whole)))
            stop = min(len(whole), start + int(rng.integers(1, 4096)))
            content[start:stop] = bytes(stop - start)
        path.write_bytes(content)
        try:
            check(path, shape)
        except StoreError:
            refused += 1
    assert refused > 200


def test_a_shard_that_cannot_be_trusted_is_not_finished(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "out.h5")
    directory.make()
    fasta = tmp_path / "in.fa"
    fasta.write_text("".join(f">{number}\nMKV{'A' * number}\n" for number in range(7)))
    index = build_index([str(fasta)], directory.index_path, ReadOptions())
    identity = {"kinds": ["mean"], "layers": [3, 6], "max_length": 5, "store_dtype": "fp32"}
    run = Run(directory, Plan(identity, (), (0, 7), hidden_size=12), index)
    path = directory.shard_path(0)
    for offset in (0, -1):  # in a row, and in the notes
        with run.output(0) as writer:
            writer.write(np.arange(7), dict.fromkeys(("mean/3", "mean/6"), np.ones((7, 12), np.float32)))
        assert run.finished([0]) == [0]
        assert run.is_whole(0)
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)
        assert not run.is_whole(0)
        assert run.finished([0]) == [], "it would be taken for finished again"
    assert run.open_shard(0) is None
