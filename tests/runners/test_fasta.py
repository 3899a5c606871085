"""The FASTA pass: every rule on real files, and all of them against a slow, obvious parser."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from indexing import error_of, firsts_of, known_of, read, records_of
from tokens import decode

from esm_packed.alphabet import RESIDUE_TO_ID
from esm_packed.runners.input import scan
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import InputError, Modified, ReadOptions
from esm_packed.runners.input.index import Problem, open_index

ROOT = Path(__file__).parents[2]
REAL_FILES = {
    ROOT / "examples" / "proteins.fasta": 35,
    ROOT / "tests" / "data" / "mycoplasma_every_16th.fasta": 30,
}
DATA = ROOT.parent / "shared" / "data"
DATA_COUNTS = {
    "uniref_esm2_1k.fasta": 1000,
    "mycoplasma_genitalium.fasta": 476,
    "swissprot_mito.fasta": 1273,
    "sarscov2.fasta": 12,
    "esm_some_proteins.fasta": 15,
    "esm_few_proteins.fasta": 3,
    "scop_softmask_lower.fasta": 389,
    "diamond_nr300.fasta": 300,
    "libmarv_queries20.fasta": 20,
    "long_real_3000plus.fasta": 70,
}
CHUNK_SIZES = (1, 2, 3, 7, 64, 1 << 22)
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO"


class Refused(Exception):
    """What the slow parser raises where the fast one must raise InputError."""


@dataclass
class SlowResult:
    records: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, int, int]] = field(default_factory=list)  # ID, file, line
    modified: list[Modified] = field(default_factory=list)
    num_replaced: int = 0
    num_duplicates: int = 0


def read_slowly(files: Sequence[bytes], options: ReadOptions) -> SlowResult:
    """All rules, line by line and character by character."""
    result = SlowResult()
    kept: list[tuple[str, str, int, int]] = []
    changes: list[Modified] = []
    for file_number, data in enumerate(files):
        for name, header_line, symbols in slow_records(data, options.full_header):
            residues = ""
            fault_line = 0
            modified = Modified(0)
            if options.gaps == "drop":
                num_before = len(symbols)
                symbols = [symbol for symbol in symbols if symbol[0] not in "-."]
                if len(symbols) < num_before:
                    modified |= Modified.GAPS_DROPPED
            if symbols and symbols[-1][0] == "*":
                symbols.pop()
                modified |= Modified.TRAILING_STOP_DROPPED
            for character, line in symbols:
                if character.isascii() and character.upper() in RESIDUES:
                    residues += character.upper()
                elif options.invalid == "x" and character not in "-.>":
                    residues += "X"
                    result.num_replaced += 1
                    modified |= Modified.RESIDUES_REPLACED
                else:
                    fault_line = fault_line or line
            if not symbols or not name:
                fault_line = header_line
            if not fault_line:
                kept.append((name, residues, file_number, header_line))
                changes.append(modified)
            elif options.invalid == "skip":
                result.left_out.append((name, file_number, fault_line))
            else:
                raise Refused
    if not kept:
        raise Refused

    # Replaced characters are no nucleotides, but X itself is none either.
    first = "".join(residues for _, residues, _, _ in kept[:100])
    if not options.force and sum(residue in "ACGTUN" for residue in first) > 0.9 * len(first):
        raise Refused

    names = {name for name, *_ in kept}
    copies: dict[str, int] = {}
    for (name, residues, file_number, line), modified in zip(kept, changes, strict=True):
        shown = name
        if name in copies:
            result.num_duplicates += 1
            if options.duplicates == "error":
                raise Refused
            if options.duplicates == "first":
                result.left_out.append((name, file_number, line))
                continue
            copies[name] += 1
            while f"{name}__{copies[name]}" in names:
                copies[name] += 1
            shown = f"{name}__{copies[name]}"
            modified |= Modified.RENAMED
        else:
            copies[name] = 1
        result.records.append((shown, residues))
        result.modified.append(modified)
    return result


def slow_records(data: bytes, full_header: bool) -> list[tuple[str, int, list[tuple[str, int]]]]:
    """(ID, line of the header, [(character, line)] of the sequence without white space) of each record."""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Refused from error
    if "\0" in text:
        raise Refused
    records: list[tuple[str, int, list[tuple[str, int]]]] = []
    for line_number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if line.startswith(">"):
            header = line[1:].strip(" \t\v\f")
            name = header if full_header else re.split("[ \t\v\f]", header)[0]
            records.append((name, line_number, []))
        elif line.startswith(";") or not line.strip(" \t\v\f"):
            continue
        elif not records:
            raise Refused
        else:
            records[-1][2].extend(
                (character, line_number) for character in line if character not in " \t\v\f"
            )
    if not records:
        raise Refused
    return records


def compare(files: Sequence[bytes], options: ReadOptions, chunk_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.fa") for number in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        try:
            expected = read_slowly(files, options)
        except Refused:
            with pytest.raises(InputError):
                build_index(
                    [str(path) for path in paths], Path(folder, "work"), options, chunk_size=chunk_size
                )
            return
        made = build_index(
            [str(path) for path in paths], Path(folder, "work"), options, chunk_size=chunk_size
        )
        assert records_of(made) == expected.records
        assert made.modified(0, made.num_records).tolist() == expected.modified
        assert made.num_replaced == expected.num_replaced
        assert made.num_duplicates == expected.num_duplicates
        assert made.first_same.tolist() == firsts_of([residues for _, residues in expected.records])
        assert made.num_identical == np.count_nonzero(made.first_same[:] != np.arange(made.num_records))
        assert known_of(open_index([str(path) for path in paths], Path(folder, "work"), options)) == known_of(
            made
        )
        left_out = [
            (problem.sequence_id, int(Path(problem.file).stem), problem.line) for problem in made.problems
        ]
        assert sorted(left_out) == sorted(expected.left_out)
        middle = made.num_records // 2
        parts = made.token_ids(0, middle, 2) + made.token_ids(middle, made.num_records, 2)
        assert [decode(part) for part in parts] == [residues[:2] for _, residues in expected.records]
        ids = made.sequence_ids(0, middle) + made.sequence_ids(middle, made.num_records)
        assert ids == [name for name, _ in expected.records]


LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\r\r\n", b" \n"])
NAMES = st.sampled_from(
    [b"a", b"b", b"a__2", b"a__3", b"a__2__2", b" c d", b"a >x", b"\xc3\xa9", b"a\xc2\xa0b", b""]
)
NAMES_MOSTLY_NEW = st.one_of(NAMES, st.integers(0, 10**6).map(lambda number: b"n%d" % number))
SEQUENCE_LINES = st.one_of(
    st.sampled_from(
        [b"MKV", b"mkvx", b"W L", b"\tQ\x0b", b"ACGT", b";note > J\xc3\xa9", b"E*", b"R", b"LSUO"]
    ),
    st.sampled_from(
        [b"*", b"", b" ", b"J", b"-", b"M.K", b"7", b"*K", b"\xc3\xbf", b"\x01", b"K>b", b" >b", b" ;"]
    ),
)


@st.composite
def fasta_like(draw: st.DrawFn) -> bytes:
    """Mostly sound records, with now and then something that is not."""
    text = draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b";first\n", b"\n \r\n", b"x\n"]))
    end = draw(LINE_ENDS)
    for name in draw(st.lists(NAMES_MOSTLY_NEW, max_size=6)):
        text += b">" + name + end + b"MKV"
        for line in draw(st.lists(SEQUENCE_LINES, max_size=3)):
            text += draw(st.sampled_from([b"", end, end])) + line
        text += end
    return text.removesuffix(end) if draw(st.booleans()) else text


FRAGMENTS = st.lists(
    st.one_of(
        st.sampled_from(
            [b">", b"\n>", b"\r>", b"\n", b"\r\n", b"\r", b">a", b"\n>b c", b"MKV", b"w", b"*", b"-"]
        ),
        st.sampled_from(
            [b" ", b"\n;", b"J", b"\0", b"\xef\xbb\xbf", b"\xe2\x80\x83", b"\xff", b"\xc3", b"__2"]
        ),
        st.binary(max_size=3),
    ),
    max_size=16,
).map(b"".join)
OPTIONS = st.builds(
    ReadOptions,
    invalid=st.sampled_from(["error", "x", "skip"]),
    duplicates=st.sampled_from(["error", "first", "rename"]),
    gaps=st.sampled_from(["error", "drop"]),
    full_header=st.booleans(),
    force=st.booleans(),
)


@settings(max_examples=5 * settings().max_examples)
@given(
    files=st.lists(fasta_like(), min_size=1, max_size=2), options=OPTIONS, chunk=st.sampled_from(CHUNK_SIZES)
)
@example(files=[b">a\nM\n>a\nK\n>a__2\nL\n>a\nV"], options=ReadOptions(duplicates="rename"), chunk=3)
@example(files=[b">a\nM", b">a\nM"], options=ReadOptions(duplicates="first"), chunk=1)
@example(files=[b">a\nM*K*\n;*\n\n>b\nJ*"], options=ReadOptions(invalid="x"), chunk=2)
@example(files=[b">a\n;x\n>b\n", b">c\nM"], options=ReadOptions(invalid="skip"), chunk=2)
def test_reads_fasta_like_text_as_the_slow_parser_does(
    files: list[bytes], options: ReadOptions, chunk: int
) -> None:
    compare(files, options, chunk)


@settings(max_examples=4 * settings().max_examples)
@given(data=FRAGMENTS, options=OPTIONS, chunk=st.sampled_from(CHUNK_SIZES))
def test_reads_any_bytes_as_the_slow_parser_does(data: bytes, options: ReadOptions, chunk: int) -> None:
    compare([data], options, chunk)


def test_a_chunk_may_end_anywhere() -> None:
    data = (
        b"\xef\xbb\xbf\r\n;c\r\n>a \xc3\xa9 >x\r\nMK V\r\n;>no\r\n\r\nW*\r\n \r\n>b\rlsq\r>c\n"
        b"M\xe2\x80\x83J\n>d\n*\n>a\nEE\n>\nM\n>e\nK*K\n>f\nT-T\n>g\nLL"
    )
    for chunk_size in (*range(1, 9), *range(9, len(data) + 2, 7)):
        compare([data, data], ReadOptions(invalid="skip", duplicates="rename"), chunk_size)
        compare([data], ReadOptions(invalid="skip", duplicates="first", gaps="drop"), chunk_size)


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.name)
def test_real_files(path: Path, tmp_path: Path) -> None:
    check_real_file(path, REAL_FILES[path], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_COUNTS)
def test_larger_real_files(name: str, tmp_path: Path) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    check_real_file(DATA / name, DATA_COUNTS[name], tmp_path)


def check_real_file(path: Path, num_records: int, tmp_path: Path) -> None:
    made = build_index([str(path)], tmp_path, ReadOptions(), chunk_size=5000)
    assert made.num_records == num_records
    assert records_of(made) == read_slowly([path.read_bytes()], ReadOptions()).records
    assert made.inputs == [
        (str(path), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()),
    ]
    assert made.problems == []


@pytest.mark.parametrize(
    ("content", "records"),
    [
        pytest.param(b">a b c\nMK\nVW\n>b\nLL\n", [("a", "MKVW"), ("b", "LL")], id="wrapped"),
        pytest.param(b">a b\r\nMK\r\nVW\r\n", [("a", "MKVW")], id="CRLF"),
        pytest.param(b">a b\rMK\rVW\r>b\rLL\r", [("a", "MKVW"), ("b", "LL")], id="CR"),
        pytest.param(b"\xef\xbb\xbf>a\nMK", [("a", "MK")], id="byte order mark"),
        pytest.param(b">a\nmkvX\n", [("a", "MKVX")], id="lower case"),
        pytest.param(b"\n \n>a\n\nMK\n\n\nVW\n\n>b\nLL\n\n", [("a", "MKVW"), ("b", "LL")], id="blank lines"),
        pytest.param(b">a\n M K\tV\x0b\x0cW \n", [("a", "MKVW")], id="white space"),
        pytest.param(b";x\n>a\n;>b\nMK\n; JJJ\nVW\n;", [("a", "MKVW")], id="comments"),
        pytest.param(b">a\nMKV*", [("a", "MKV")], id="trailing stop"),
        pytest.param(b">a\nMKV*  \n\n;*\n>b\nL\n*\n \n", [("a", "MKV"), ("b", "L")], id="stop, then space"),
        pytest.param(b">a >b;c\nMK\n", [("a", "MK")], id="marks in the header"),
        pytest.param(b"> a b\nMK\n", [("a", "MK")], id="space before the ID"),
        pytest.param(">é☃ x\nMK\n".encode(), [("é☃", "MK")], id="UTF-8 header"),
        pytest.param(b">a\xc2\xa0b c\nMK\n", [("a\xa0b", "MK")], id="only ASCII space ends an ID"),
        pytest.param(b">" + b"n" * 600 + b"\nMK", [("n" * 600, "MK")], id="long header"),
        pytest.param(b">a\nLAGVSERTIDPKQNFYMHWCXBUZO", [("a", RESIDUES)], id="whole alphabet"),
    ],
)
def test_what_is_fine(content: bytes, records: list[tuple[str, str]], tmp_path: Path) -> None:
    assert read(tmp_path, content)[1] == records
    assert read(tmp_path, content, chunk_size=1)[1] == records


def test_lower_case_has_the_ids_of_upper_case(tmp_path: Path) -> None:
    made, _ = read(tmp_path, b">a\n" + RESIDUES.lower().encode())
    np.testing.assert_array_equal(made.token_ids(0, 1)[0], RESIDUE_TO_ID[list(RESIDUES.encode())])
    assert made.token_ids(0, 1)[0].dtype == np.uint8


def test_full_header(tmp_path: Path) -> None:
    _, records = read(tmp_path, b"> a b  >c \r\nMK\r\n>a d\nL", full_header=True)
    assert records == [("a b  >c", "MK"), ("a d", "L")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "0.fa: the file is empty", id="empty file"),
        pytest.param(
            b"\n ;\n", "0.fa, line 2: not FASTA: text before the first '>': ';'", id="indented comment"
        ),
        pytest.param(b"\n;x\n\n", "0.fa: no records", id="only comments"),
        pytest.param(
            b";x\n\nMKV\n>a\nMK", "0.fa, line 3: not FASTA: text before the first '>': 'MKV'", id="not FASTA"
        ),
        pytest.param(b"ID\tx\nmore\n", "0.fa, line 1: not FASTA: text before the first '>'", id="a table"),
        pytest.param(b">a\nMK\n> \nMK\n", "0.fa, line 3, record '': no ID after '>'", id="empty ID"),
        pytest.param(b">a\nMK\n>", "0.fa, line 3, record '': no ID after '>'", id="'>' alone"),
        pytest.param(
            b">a\nMK\n>b\n\n>c\nMK", "0.fa, line 3, record 'b': the record has no residues", id="empty"
        ),
        pytest.param(b">a\n>b\n", "0.fa, line 1, record 'a': the record has no residues", id="only headers"),
        pytest.param(
            b">a\nM\n>b\n*\n", "0.fa, line 3, record 'b': the record has no residues", id="only a stop"
        ),
        pytest.param(b">a x\nMK\nMJ\n", "0.fa, line 3, record 'a': 'J' is not in ESM-2's alphabet", id="J"),
        pytest.param(b">a\r\nMK\r\nM1\r\n", "0.fa, line 3, record 'a': '1' is not in", id="digit, CRLF"),
        pytest.param(b">a\rMK\r\rM1\r", "0.fa, line 4, record 'a': '1' is not in", id="digit, CR"),
        pytest.param(b">a\nM\x01K", "line 2, record 'a': '\\x01' is not in", id="control character"),
        pytest.param(b">a\nM<mask>K", "line 2, record 'a': '<' is not in", id="mask"),
        pytest.param(
            b">a\nM\xc2\xa0K", "line 2, record 'a': U+00A0 NO-BREAK SPACE is not in", id="Unicode space"
        ),
        pytest.param(
            ">a\nMK\n>b\nM\u4e2dK\n".encode(),
            "0.fa, line 4, record 'b': U+4E2D CJK UNIFIED IDEOGRAPH-4E2D is not in",
            id="three bytes",
        ),
        pytest.param(
            ">a\nM\U0001f9ecK".encode(), "0.fa, line 2, record 'a': U+1F9EC DNA DOUBLE HELIX", id="four bytes"
        ),
        pytest.param(
            b">a\nM\n\xef\xbb\xbf>b\nK",
            "line 3, record 'a': U+FEFF ZERO WIDTH NO-BREAK SPACE",
            id="late mark",
        ),
        pytest.param(b">a\nMK*V\n", "line 2, record 'a': '*' (stop) inside the sequence", id="internal stop"),
        pytest.param(b">a\nMK**\n", "line 2, record 'a': '*' (stop) inside the sequence", id="two stops"),
        pytest.param(
            b">a\nMK\nM-K\n", "line 3, record 'a': gap '-' in the sequence: this looks like", id="gap -"
        ),
        pytest.param(
            b">a\nM.K\n", "line 2, record 'a': gap '.' in the sequence: this looks like", id="gap ."
        ),
        pytest.param(b">a\nMK>b\nMK\n", "line 2, record 'a': '>' inside a sequence line", id="'>' inside"),
        pytest.param(b">a\nMK\n>b\nM\0K", "line 4, record 'b': NUL byte", id="NUL"),
        pytest.param(b">a\0\nMK", "line 1, record 'a\\x00': NUL byte", id="NUL in a header"),
        pytest.param(">a\nMK".encode("utf-16"), "line 1: byte 0xff is not valid UTF-8", id="UTF-16"),
        pytest.param(
            b">a \xff\nMK", "line 1, record 'a': byte 0xff is not valid UTF-8", id="header not UTF-8"
        ),
        pytest.param(
            b">a\nMK\n;\xe2\x80\nMK", "line 3, record 'a': byte 0xe2 is not", id="comment not UTF-8"
        ),
        pytest.param(b">a\nMK\xc3", "line 2, record 'a': byte 0xc3 is not valid UTF-8", id="cut character"),
        pytest.param(
            b">a\nMK\n>b\nL\n>a x\nW", "0.fa, line 5, record 'a': the same ID as in 0.fa, line 1", id="twice"
        ),
        pytest.param(
            b">d\nACGTACGTNN\n", "0.fa, line 1, record 'd': this looks like DNA or RNA: 100% of", id="DNA"
        ),
        pytest.param(b"BZh91AY", "0.fa: compressed with bzip2", id="bzip2"),
    ],
)
def test_what_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    for chunk_size in (1, 5, 1 << 22):
        assert message in error_of(tmp_path, content, chunk_size=chunk_size)


def test_what_was_changed_in_a_record_is_flagged(tmp_path: Path) -> None:
    text = b">a-b*\nMKV\n>b\nM-K\n;-*\n>b\nMJ*\n>c\nM.1K*-\n>d\nmkv *\n;-\n>e\n;J-*\nMK\n"
    made, _ = read(tmp_path, text, invalid="x", gaps="drop", duplicates="rename")
    assert made.modified(0, 6).tolist() == [
        0,
        Modified.GAPS_DROPPED,
        Modified.RESIDUES_REPLACED | Modified.TRAILING_STOP_DROPPED | Modified.RENAMED,
        Modified.RESIDUES_REPLACED | Modified.GAPS_DROPPED | Modified.TRAILING_STOP_DROPPED,
        Modified.TRAILING_STOP_DROPPED,
        0,
    ]
    assert made.modified(2, 4).tolist() == made.modified(0, 6)[2:4].tolist()
    assert made.modified(0, 6).dtype == np.uint8


def test_invalid_characters_become_x(tmp_path: Path) -> None:
    made, records = read(tmp_path, ">a\nMJ1*é\u00a0K*\n>b\nMKV\n".encode(), invalid="x")
    assert records == [("a", "MXXXXXK"), ("b", "MKV")]
    assert (made.num_replaced, made.problems) == (5, [])
    assert "gap '-'" in error_of(tmp_path, b">a\nMJ-K", invalid="x")
    assert "'>' inside" in error_of(tmp_path, b">a\nMJ>b\nK", invalid="x")
    assert "no residues" in error_of(tmp_path, b">a\nMJ\n>b\n", invalid="x")


def test_invalid_records_are_left_out(tmp_path: Path) -> None:
    text = b">a\nMK\nMJ\n>b\nMKV\n>c\n>\nMK\n>d\nMK\n>e\nM-\n>f\nM*K\n"
    made, records = read(tmp_path, text, invalid="skip")
    assert records == [("b", "MKV"), ("d", "MK")]
    name = str(tmp_path / "0.fa")
    assert made.problems == [
        Problem("a", name, 3, "'J' is not in ESM-2's alphabet"),
        Problem("c", name, 6, "the record has no residues"),
        Problem("", name, 7, "no ID after '>'"),
        Problem("e", name, 12, "gap '-' in the sequence: this looks like an alignment"),
        Problem("f", name, 14, "'*' (stop) inside the sequence, not at its end"),
    ]
    assert "NUL byte" in error_of(tmp_path, b">a\nM\0K\n>b\nMK", invalid="skip")
    message = error_of(tmp_path, b">a\nMJ\n>b\n\n", invalid="skip")
    assert message.startswith("all 2 records were left out; the first: 0.fa, line 2, record 'a': 'J'")


def test_gaps_are_dropped_on_request(tmp_path: Path) -> None:
    assert read(tmp_path, b">a\n--MK.V-*--\n>b\nL*\n", gaps="drop")[1] == [("a", "MKV"), ("b", "L")]
    assert "record 'a': the record has no residues" in error_of(tmp_path, b">a\n---\n", gaps="drop")


def test_dna_is_judged_by_the_first_hundred_records(tmp_path: Path) -> None:
    nucleotides = b"".join(b">d%d\nACGTACGTAn\n" % number for number in range(100))
    proteins = b"".join(b">p%d\nMKVLWEDRHK\n" % number for number in range(100))
    message = error_of(tmp_path, nucleotides + proteins)
    assert "0.fa, line 1, record 'd0': this looks like DNA or RNA: 100%" in message
    assert error_of(tmp_path, nucleotides + proteins, chunk_size=50) == message
    assert read(tmp_path, nucleotides + proteins, force=True)[0].num_records == 200
    assert read(tmp_path, proteins + nucleotides)[0].num_records == 200
    assert read(tmp_path, b">a\nACGTACGTAM\n")[0].num_records == 1  # 90% exactly
    assert "DNA" in error_of(tmp_path, b">a\nACGTACGTAMA\n")


@pytest.mark.parametrize("chunk_size", [1, 900, 1100, 1 << 22])
def test_the_dna_check_ends_at_record_100_however_the_file_is_cut(tmp_path: Path, chunk_size: int) -> None:
    """900 bytes hold 60 records."""

    def text(*counts: int) -> bytes:
        records = []
        for kind, count in enumerate(counts):
            sequence = (b"ACGTACGTAC", b"MKVLWEDRHK")[kind % 2]
            records += [b">%d%03d\n%s\n" % (kind, number, sequence) for number in range(count)]
        return b"".join(records)

    message = error_of(tmp_path, text(91, 409), chunk_size=chunk_size)
    assert "0.fa, line 1, record '0000': this looks like DNA or RNA: 91% of" in message
    made, _ = read(tmp_path, text(90, 10, 400), chunk_size=chunk_size)
    assert made.num_records == 500


def test_unknown_options_are_refused() -> None:
    for name in ("invalid", "duplicates", "gaps"):
        options: dict[str, Any] = {name: "maybe"}
        with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'maybe'"):
            ReadOptions(**options)


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf>a\r\nMK\r\nVW\r\n>b\r\nLL"
    packed = gzip.compress(text[:12]) + gzip.compress(text[12:])  # several members, as bgzip writes
    plain = read(tmp_path, text)[1]
    for chunk_size in CHUNK_SIZES:
        made, records = read(tmp_path, packed, b">c\nM", chunk_size=chunk_size)
        assert records == [*plain, ("c", "M")]
        assert made.inputs[0].size == len(packed)
        assert made.inputs[0].sha256 == hashlib.sha256(packed).hexdigest()
    assert "0.fa, line 3, record 'a': 'J'" in error_of(tmp_path, gzip.compress(b">a\nMK\nMJ\n"), chunk_size=2)
    assert error_of(tmp_path, gzip.compress(b"")) == "0.fa: no records"


def test_broken_gzip(tmp_path: Path) -> None:
    residues = np.random.default_rng(0).choice(list(b"MKVLWEDR"), size=(2000, 60)).astype(np.uint8)
    text = b"".join(b">n%d\n%s\n" % (number, row.tobytes()) for number, row in enumerate(residues))
    packed = gzip.compress(text)
    assert read(tmp_path, packed)[0].num_records == 2000
    for cut in (5, len(packed) // 2, len(packed) - 8, len(packed) - 1):
        assert "the gzip data are truncated" in error_of(tmp_path, packed[:cut])
    message = error_of(tmp_path, packed[: len(packed) // 2], chunk_size=1000)
    found = re.fullmatch(r"0\.fa, line (\d+), record 'n(\d+)': the gzip data are truncated .*", message)
    assert found
    assert 1800 < int(found[1]) < 2200
    assert abs(int(found[1]) / 2 - int(found[2])) <= 1
    flipped = bytearray(packed)
    flipped[-6] ^= 1
    assert "the gzip data are corrupt" in error_of(tmp_path, bytes(flipped))
    assert "the gzip data are corrupt" in error_of(tmp_path, packed + b"rubbish")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack(b">a\nMK\n>b\nVW\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    made = build_index(["-"], tmp_path, ReadOptions(), chunk_size=3)
    assert records_of(made) == [("a", "MK"), ("b", "VW")]
    assert made.inputs == [("-", len(data), hashlib.sha256(data).hexdigest())]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pack(b">a\nMK\n>b\nV1\n"))))
    with pytest.raises(InputError, match="standard input, line 4, record 'b': '1'"):
        build_index(["-"], tmp_path, ReadOptions())


def test_a_named_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b">a\nMK\n>b\nVW\n",))
    writer.start()
    made = build_index([str(pipe)], tmp_path / "work", ReadOptions(), chunk_size=5)
    writer.join()
    assert records_of(made) == [("a", "MK"), ("b", "VW")]


def test_progress_adds_up_to_the_inputs(tmp_path: Path) -> None:
    told: list[int] = []
    read(tmp_path, b">a\nMK\n", gzip.compress(b">b\nMK\n"))
    paths = [str(tmp_path / "0.fa"), str(tmp_path / "1.fa")]
    made = build_index(paths, tmp_path / "work", ReadOptions(), progress=told.append, chunk_size=4)
    assert (
        sum(told)
        == sum(item.size for item in made.inputs)
        == sum(Path(path).stat().st_size for path in paths)
    )


def test_a_line_of_three_megabytes(tmp_path: Path) -> None:
    residues = np.random.default_rng(1).choice(list(b"MKVLWEDR"), size=3_000_000).astype(np.uint8)
    made, _ = read(tmp_path, b">a\nMK\n>long\n" + residues.tobytes() + b"*\n>b\nVW", chunk_size=1 << 20)
    assert made.lengths.tolist() == [2, 3_000_000, 2]
    np.testing.assert_array_equal(made.token_ids(1, 2)[0], RESIDUE_TO_ID[residues])
    np.testing.assert_array_equal(made.token_ids(1, 2, 1022)[0], RESIDUE_TO_ID[residues[:1022]])


def test_a_record_beyond_all_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_RECORD_BYTES", 1 << 20)
    genome = b">a\nMK\n>chr1 human\n" + b"ACGT" * 400_000
    assert "line 3, record 'chr1': a record is longer than 1 MiB" in error_of(
        tmp_path, genome, chunk_size=1 << 16
    )
    for line_end in (b"\n", b"\r"):
        small = b"".join(b">%d%sMK%s" % (number, line_end, line_end) for number in range(100))
        monkeypatch.setattr(scan, "MAX_RECORD_BYTES", 20)
        for chunk_size in (1, 2, 3):
            assert read(tmp_path, small, chunk_size=chunk_size)[0].num_records == 100
    monkeypatch.setattr(scan, "MAX_RECORD_BYTES", 1 << 20)
    assert "line 1: not FASTA: no '>' at the start" in error_of(
        tmp_path, b"x" * 1_600_000, chunk_size=1 << 16
    )
