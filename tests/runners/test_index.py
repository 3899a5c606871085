"""The index: what it gives, when it is opened again, and what becomes of a damaged one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from indexing import known_of, read, records_of
from tokens import decode

from esm_packed.runners.input import blocks, build
from esm_packed.runners.input import index as index_module
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import InputError, ReadOptions
from esm_packed.runners.input.index import open_index, reopen_index

NAMES = ["first_same.bin", "index.json", "names.bin", "records.bin", "tokens.bin"]


def test_ranges_over_several_files(tmp_path: Path) -> None:
    made, records = read(tmp_path, b">a\nMKV\n>b\nL\n", b">c\nWWWW\n", b">d\nRR\n>e\nEEE\n")
    for start in range(6):
        for stop in range(start, 6):
            assert made.sequence_ids(start, stop) == [name for name, _ in records[start:stop]]
            for max_length in (0, 1, 3, 100):
                cut = [residues[: max_length or None] for _, residues in records[start:stop]]
                assert list(map(decode, made.token_ids(start, stop, max_length))) == cut
    for start, stop in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(ValueError, match="got"):
            made.token_ids(start, stop)
        with pytest.raises(ValueError, match="got"):
            made.sequence_ids(start, stop)
    with pytest.raises(ValueError, match="max_length"):
        made.token_ids(0, 1, -1)


def test_a_range_is_one_read_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"".join(b">%d\nMKV\n;note\nL\n" % number for number in range(1000))
    made, _ = read(tmp_path, text, text.replace(b">", b">x"))
    reads: list[int] = []

    def counting(descriptor: int, num_bytes: int, position: int) -> bytes:
        reads.append(num_bytes)
        return pread(descriptor, num_bytes, position)

    pread = os.pread
    monkeypatch.setattr(os, "pread", counting)
    assert len(made.token_ids(10, 1500)) == 1490
    assert len(reads) == 2  # its rows, and its residues
    assert len(made.sequence_ids(10, 1500)) == 1490
    assert len(reads) == 4


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_inputs_are_not_needed_again(tmp_path: Path, pack: Any) -> None:
    made, records = read(tmp_path, pack(b">a\nMK\n>b\nVW\n"))
    (tmp_path / "0.fa").unlink()
    assert records_of(made) == records
    assert known_of(reopen_index(tmp_path / "work")) == known_of(made)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "0.fa"

    def append(_: int) -> None:
        if path.stat().st_size < 20:
            with path.open("ab") as file:
                file.write(b">c\nMKVLW\n")

    path.write_bytes(b">a\nMK\n>b\nVW\n")
    with pytest.raises(InputError, match=r"0\.fa: the file was changed while it was being read"):
        build_index([str(path)], tmp_path / "work", ReadOptions(), progress=append)


def test_index_on_disk_is_rebuilt(tmp_path: Path) -> None:
    read(tmp_path, gzip.compress(b">a\nMK\n>b\nVWL\n"))
    made, _ = read(tmp_path, b">c\nMKV\n")
    assert made.lengths.tolist() == [3]
    assert made.lengths.dtype == made.lengths[0:1].dtype == np.int32
    assert made.first_same.tolist() == [0]
    assert made.first_same.dtype == made.first_same[0:1].dtype == np.int64
    names = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert names == NAMES


@pytest.mark.parametrize(("distinct", "limit"), [(True, 4_000_000), (False, 18_000_000)])
def test_memory_does_not_grow_with_the_file(distinct: bool, limit: int, tmp_path: Path) -> None:
    path = tmp_path / "many.fa"
    letters = bytes.maketrans(b"0123456789", b"LAGVSERTID")
    numbers = [b"%08d" % (number if distinct else 0) for number in range(40_000)]
    records = [
        b">n%d\n%s%s\n" % (number, b"MKVLWEDRHK" * 50, digits.translate(letters))
        for number, digits in enumerate(numbers)
    ]
    path.write_bytes(b"".join(records))
    del numbers, records
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        made = build_index([str(path)], tmp_path / "work", ReadOptions(), chunk_size=1 << 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.num_records == 40_000
    assert made.num_identical == (0 if distinct else 39_999)
    assert peak < limit


def test_an_index_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b">s\nMKV\n>a\nRR\n")))
    paths = ["-", str(tmp_path / "plain.fa"), str(tmp_path / "packed.gz")]
    Path(paths[1]).write_bytes(b">a\nMKV\n>b\nMJ\n>c\nM*K\n")
    Path(paths[2]).write_bytes(gzip.compress(b">d\nMKV\n>a\nW1\n>\nMK\n"))
    options = ReadOptions(invalid="skip", duplicates="rename")
    made = build_index(paths, tmp_path / "work", options)
    assert [problem.sequence_id for problem in made.problems] == ["b", "c", "a", ""]
    expected = known_of(made)
    assert known_of(open_index(paths, tmp_path / "work", options)) == expected
    (tmp_path / "work").rename(tmp_path / "moved")  # copies are found where the index is
    assert known_of(open_index(paths, tmp_path / "moved", options)) == expected

    assert open_index(paths, tmp_path / "work", options) is None
    assert open_index(paths[:2], tmp_path / "moved", options) is None
    assert open_index(paths[::-1], tmp_path / "moved", options) is None
    assert open_index(paths, tmp_path / "moved", ReadOptions(invalid="skip")) is None
    monkeypatch.setattr(index_module, "_FORMAT_VERSION", 0)
    assert open_index(paths, tmp_path / "moved", options) is None


@pytest.mark.parametrize("name", ["plain.fa", "packed.gz"])
def test_an_index_of_a_changed_input_is_not_opened(name: str, tmp_path: Path) -> None:
    paths = [str(tmp_path / "plain.fa"), str(tmp_path / "packed.gz")]
    Path(paths[0]).write_bytes(b">a\nMKV\n")
    Path(paths[1]).write_bytes(gzip.compress(b">b\nMKV\n"))
    build_index(paths, tmp_path / "work", ReadOptions())
    path, content = tmp_path / name, (tmp_path / name).read_bytes()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns

    def opens() -> bool:
        return open_index(paths, tmp_path / "work", ReadOptions()) is not None

    assert opens()
    os.utime(path, ns=(times[0], times[1] + 1))
    assert opens()  # what it holds is the same
    path.write_bytes(content[:-1])
    assert not opens()
    altered = bytearray(content)
    altered[len(content) // 2] ^= 1
    path.write_bytes(altered)
    os.utime(path, ns=times)
    assert not opens()
    path.unlink()
    assert not opens()
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert opens()


def test_only_a_file_that_may_have_been_touched_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _ = read(tmp_path, b">a\nMKV\n")
    path = tmp_path / "0.fa"
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counting(file: Any, name: str) -> Any:
        hashed.append(name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)

    def is_hashed() -> bool:
        hashed.clear()
        assert open_index([str(path)], tmp_path / "work", ReadOptions()) is not None
        return bool(hashed)

    assert not is_hashed()
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert is_hashed()  # its time of change cannot be chosen
    build_index([str(path)], tmp_path / "work", ReadOptions())
    assert not is_hashed()
    copy = tmp_path / "copy"
    copy.write_bytes(content)
    os.utime(copy, ns=times)
    copy.replace(path)
    assert is_hashed()


def test_the_same_name_in_another_folder_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, residues in (("one", b"MKV"), ("two", b"MKW")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.fa").write_bytes(b">a\n%s\n" % residues)
        os.utime(tmp_path / folder / "a.fa", ns=(0, 0))
    monkeypatch.chdir(tmp_path / "one")
    build_index(["a.fa"], tmp_path / "work", ReadOptions())
    assert open_index(["a.fa"], tmp_path / "work", ReadOptions()) is not None
    monkeypatch.chdir(tmp_path / "two")
    assert open_index(["a.fa"], tmp_path / "work", ReadOptions()) is None


def test_an_index_that_is_not_whole_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b">a\nMKV\n>b\nJ\n>c\nMKV\n"))
    options = ReadOptions(invalid="skip")
    work_dir = tmp_path / "work"
    build_index([str(path)], work_dir, options)
    names = sorted(file.name for file in work_dir.iterdir())
    assert names == NAMES
    expected = known_of(open_index([str(path)], work_dir, options))
    metadata = (work_dir / "index.json").read_bytes()
    for name in names:
        content = (work_dir / name).read_bytes()

        def is_refused(content: bytes, name: str = name) -> bool:
            """When it is opened, or when what is damaged is read; then it is not opened again."""
            (work_dir / name).write_bytes(content)
            made = open_index([str(path)], work_dir, options)
            if made is None:
                return True
            try:
                assert known_of(made) == expected, (name, content)
            except InputError as error:
                assert str(error).startswith(
                    f"{work_dir / name}: damaged or truncated; rerun the command that"
                )
                assert open_index([str(path)], work_dir, options) is None
                (work_dir / "index.json").write_bytes(metadata)
                return True
            return False

        (work_dir / name).unlink()
        assert open_index([str(path)], work_dir, options) is None
        for num_bytes in {0, 1, len(content) // 2, len(content) - 1}:
            assert is_refused(content[:num_bytes]), (name, num_bytes)
        assert is_refused(content + b"\0")
        for place in range(0, len(content), max(1, len(content) // 40)):
            altered = bytearray(content)
            altered[place] ^= 1
            assert is_refused(bytes(altered)), (name, place)
        (work_dir / name).write_bytes(content)
    assert open_index([str(path)], work_dir, options) is not None
    for content in (b"[]", b"{}", b"null", b'{"format_version": 1}', b"\xff"):
        (work_dir / "index.json").write_bytes(content)
        assert open_index([str(path)], work_dir, options) is None


def test_an_index_cut_short_at_any_step_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of a second run ends the process in turn: the first run's index is never taken for it."""
    path = tmp_path / "a.gz"

    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    steps = ("Scan", "_Ids", "sort_rows", "write_firsts", "confirm_firsts", "_find_identical", "seal")
    for module, step in [(build, step) for step in (*steps, "write_metadata")] + [
        (json, "dumps"),
        (Path, "replace"),
    ]:
        path.write_bytes(gzip.compress(b">a\nMKV\n>b\nMKV\n"))
        build_index([str(path)], tmp_path / "work", ReadOptions())
        path.write_bytes(gzip.compress(b">b\nMKV\n>a\nMKW\n"))
        with monkeypatch.context() as patch:
            patch.setattr(module, step, kill)
            with pytest.raises(Killed):
                build_index([str(path)], tmp_path / "work", ReadOptions())
        assert open_index([str(path)], tmp_path / "work", ReadOptions()) is None, step
        made = build_index([str(path)], tmp_path / "work", ReadOptions())
        assert known_of(open_index([str(path)], tmp_path / "work", ReadOptions())) == known_of(made)
        names = sorted(file.name for file in (tmp_path / "work").iterdir())
        assert names == NAMES


def test_a_pipe_is_never_unchanged(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b">a\nMK\n",))
    writer.start()
    build_index([str(pipe)], tmp_path / "work", ReadOptions())
    writer.join()
    assert open_index([str(pipe)], tmp_path / "work", ReadOptions()) is None


@pytest.mark.parametrize("damage", ["cut short", "altered"])
def test_an_index_damaged_in_use_is_an_error(tmp_path: Path, damage: str) -> None:
    made, _ = read(tmp_path, b">a\nMK\n>b\nMK\n>c\nMKV\n")
    work_dir = tmp_path / "work"
    metadata = (work_dir / "index.json").read_bytes()
    for name, use in (
        ("records.bin", lambda: made.lengths[1:3]),
        ("first_same.bin", lambda: made.first_same[0:3]),
        ("names.bin", lambda: made.sequence_ids(1, 2)),
        ("tokens.bin", lambda: made.token_ids(0, 3)),
    ):
        content = (work_dir / name).read_bytes()
        with (work_dir / name).open("r+b") as file:
            if damage == "cut short":
                file.truncate(1)
            else:
                file.write(bytes([content[0] ^ 64]))
        with pytest.raises(InputError, match=f"{name}: damaged or truncated; rerun the command that"):
            use()
        with (work_dir / name).open("r+b") as file:
            file.write(content)
        (work_dir / "index.json").write_bytes(metadata)
        use()


@pytest.mark.parametrize("residues", [blocks.BLOCK_BYTES - 1, blocks.BLOCK_BYTES, 3 * blocks.BLOCK_BYTES + 5])
def test_every_block_has_its_checksum(tmp_path: Path, residues: int) -> None:
    letters = np.random.default_rng(2).choice(list(b"MKVLWEDR"), size=residues).astype(np.uint8)
    made, records = read(tmp_path, b">a\n" + letters.tobytes())
    assert records_of(made) == records == [("a", letters.tobytes().decode())]
    path = tmp_path / "work" / "tokens.bin"
    assert path.stat().st_size == residues + 4 * -(-residues // blocks.BLOCK_BYTES)
    with path.open("r+b") as file:
        file.seek(residues - 1)
        file.write(b"\0")
    with pytest.raises(InputError, match="damaged"):
        made.token_ids(0, 1)
    if residues > blocks.BLOCK_BYTES:
        assert len(made.token_ids(0, 1, blocks.BLOCK_BYTES)[0]) == blocks.BLOCK_BYTES  # not in this block


def test_an_index_in_use_survives_its_replacement(tmp_path: Path) -> None:
    made, _ = read(tmp_path, b">a\nMK\n>b\nMK\n")
    path = tmp_path / "other.fa"
    path.write_bytes(b">c\nMKV\n")
    build_index([str(path)], tmp_path / "work", ReadOptions())
    assert (made.lengths.tolist(), made.first_same.tolist()) == ([2, 2], [0, 0])
