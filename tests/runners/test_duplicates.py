"""Equal IDs and identical sequences: found by hashes sorted on disk, each confirmed."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexing import error_of, firsts_of, hashes_by_length, read
from tokens import decode

from esm_packed.runners.input import build, scan
from esm_packed.runners.input import duplicates as hashes_module
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import InputError, ReadOptions
from esm_packed.runners.input.index import Problem


def test_a_duplicate_names_both_places(tmp_path: Path) -> None:
    message = error_of(tmp_path, b">x\nMK\n>a\nMKL\n", b"\xef\xbb\xbf>y\nW\n\n>a z\nL\n")
    assert message.startswith("1.fa, line 4, record 'a': the same ID as in 0.fa, line 3 (--duplicates")
    with pytest.raises(InputError, match=r"0\.fa, line 1, record 'x': the same ID as in .*0\.fa, line 1"):
        build_index([str(tmp_path / "0.fa")] * 2, tmp_path / "work", ReadOptions())


def test_the_first_of_several_duplicates_is_reported(tmp_path: Path) -> None:
    text = b"".join(b">%d\nMK\n" % number for number in [*range(50), *range(40, 90), *range(50)])
    lines = error_of(tmp_path, text).splitlines()
    assert lines[:2] == [
        "60 problems in the input:",
        "  0.fa, line 101, record '40': the same ID as in 0.fa, line 81",
    ]


def test_only_equal_ids_are_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scan, build):
        monkeypatch.setattr(module, "hashes_of", hashes_by_length)
    made, records = read(tmp_path, b">a\nM\n>b\nK\n>a\nL\n>c\nV\n>b\nW\n>a__2\nR", duplicates="rename")
    assert [name for name, _ in records] == ["a", "b", "a__3", "c", "b__2", "a__2"]
    assert made.num_duplicates == 2


def test_the_first_duplicate_stays(tmp_path: Path) -> None:
    made, records = read(
        tmp_path, b">a\nM\n>b\nK\n>a\nL\n", b">b\nV\n", b">c\nVV\n>a\nW\n>d\nR\n", duplicates="first"
    )
    assert records == [("a", "M"), ("b", "K"), ("c", "VV"), ("d", "R")]
    assert made.num_duplicates == 3
    names = [str(tmp_path / f"{number}.fa") for number in range(3)]
    assert made.problems == [
        Problem("a", names[0], 5, f"the same ID as in {names[0]}, line 1"),
        Problem("b", names[1], 1, f"the same ID as in {names[0]}, line 3"),
        Problem("a", names[2], 3, f"the same ID as in {names[0]}, line 1"),
    ]
    assert made.lengths.tolist() == [1, 1, 2, 1]


def test_renamed_duplicates_collide_with_nothing(tmp_path: Path) -> None:
    text = b">a\nM\n>a__2\nK\n>a\nL\n>a\nV\n>a__2\nW\n>a__4\nR\n>a\nE\n"
    made, records = read(tmp_path, text, duplicates="rename")
    assert [name for name, _ in records] == ["a", "a__2", "a__3", "a__5", "a__2__2", "a__4", "a__6"]
    assert (made.num_duplicates, made.problems) == (4, [])


def test_a_record_left_out_is_no_duplicate(tmp_path: Path) -> None:
    assert read(tmp_path, b">a\nMJ\n>a\nMK\n", invalid="skip")[1] == [("a", "MK")]


@settings(max_examples=2 * settings().max_examples)
@given(
    sequences=st.lists(st.text("MKV", min_size=1, max_size=3), min_size=1, max_size=40),
    in_memory=st.sampled_from([1, 2, 5, 1 << 20]),
    collide=st.booleans(),
)
def test_identical_sequences_are_found_by_sorting_on_disk(
    sequences: list[str], in_memory: int, collide: bool
) -> None:
    """Also where nothing fits into memory, and where hashes are equal although sequences are not."""
    text = "".join(
        f">n{number}\n{residues[:1].lower()}\n{residues[1:]}*\n" for number, residues in enumerate(sequences)
    )
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashes_module, "ROWS_IN_MEMORY", in_memory)
        patch.setattr(hashes_module, "_RECORDS_AT_ONCE", in_memory + 2)
        if collide:
            patch.setattr(scan, "hashes_of", hashes_by_length)
        path = Path(folder, "a.fa")
        path.write_text(text)
        made = build_index([str(path)], Path(folder, "work"), ReadOptions())
        assert made.first_same.tolist() == firsts_of(sequences)
        assert made.num_identical == len(sequences) - len(set(sequences))
        assert [decode(sequence) for sequence in made.token_ids(0, len(sequences))] == sequences


@settings(max_examples=2 * settings().max_examples)
@given(
    values=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60),
    in_memory=st.integers(1, 9),
)
def test_rows_are_sorted_by_hash_and_record(values: list[tuple[int, int]], in_memory: int) -> None:
    digits = np.zeros((len(values), 16), dtype=np.uint8)
    digits[:, [7, 8]] = np.array(values)  # the highest byte of one half and the lowest of the other
    hashes = digits.view(np.uint64)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashes_module, "ROWS_IN_MEMORY", in_memory)
        path = Path(folder, "rows")
        path.write_bytes(hashes_module.hash_rows(hashes, 0).tobytes())
        hashes_module.sort_rows(path)
        rows = np.fromfile(path, dtype=hashes_module.ROW)
        assert rows["record"].tolist() == sorted(
            range(len(values)), key=lambda record: (values[record], record)
        )
        for number, value in enumerate(values):
            found = hashes_module.records_with(rows, *hashes[number].tolist())
            assert found.tolist() == [record for record, other in enumerate(values) if other == value]
        assert hashes_module.records_with(rows, 2**64 - 1, 0).tolist() == []
        assert [path.name for path in Path(folder).iterdir()] == ["rows"]


def test_identical_sequences_over_several_files_and_left_out_records(tmp_path: Path) -> None:
    contents = (
        b">a\nMK\n>a\nVW\n>b\nJ\n>c\nVW\n",
        gzip.compress(b">d\nm\n;x\nk*\n>c\nMK\n>e\nM-\n>f\nV W"),
        b">g\nVW\n>h\nMKV",
    )
    made, records = read(tmp_path, *contents, duplicates="first", invalid="skip")
    assert [name for name, _ in records] == ["a", "c", "d", "f", "g", "h"]
    assert made.first_same.tolist() == [0, 1, 0, 1, 1, 5]
    assert made.num_identical == 3


@settings(max_examples=4 * settings().max_examples)
@given(pieces=st.lists(st.binary(max_size=20), min_size=1, max_size=30), gap=st.binary(max_size=9))
def test_hashes_depend_on_the_piece_alone(pieces: list[bytes], gap: bytes) -> None:
    text, begins, ends = gap, [], []
    for piece in pieces:
        begins.append(len(text))
        text += piece
        ends.append(len(text))
        text += gap
    hashes = [tuple(row) for row in hashes_module.hashes_of(text, np.array(begins), np.array(ends)).tolist()]
    for piece, halves in zip(pieces, hashes, strict=True):
        alone = hashes_module.hashes_of(piece, np.array([0]), np.array([len(piece)]))
        assert tuple(alone[0].tolist()) == halves
    assert len(set(hashes)) == len(set(pieces))
    for half in (0, 1):
        assert len({row[half] for row in hashes}) == len(set(pieces))


def test_hashes_of_like_pieces_are_spread_evenly() -> None:
    """Residues are small numbers, and most differences between sequences are small too."""
    base = np.random.default_rng(5).integers(4, 24, size=60, dtype=np.uint8)
    pieces = {base.tobytes()}
    for first in range(60):
        for second in range(first):
            swapped = base.copy()
            swapped[[first, second]] = swapped[[second, first]]
            pieces.add(swapped.tobytes())
            changed = base.copy()
            changed[first], changed[second] = 4 + first % 20, 4 + second % 20
            pieces.add(changed.tobytes())
    text = b"".join(sorted(pieces))
    ends = np.arange(60, len(text) + 1, 60)
    hashes = hashes_module.hashes_of(text, ends - 60, ends)
    for half in (0, 1):
        assert len(np.unique(hashes[:, half])) == len(pieces)
        for shift in range(0, 64, 8):
            counts = np.bincount((hashes[:, half] >> np.uint64(shift)).astype(np.uint8), minlength=256)
            mean = len(pieces) / 256
            assert np.square(counts - mean).sum() / mean < 255 + 6 * (2 * 255) ** 0.5  # chi-squared
