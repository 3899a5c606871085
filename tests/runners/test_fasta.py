"""The FASTA pass and the index: every rule on real files, and all of them against a slow, obvious parser."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esm_packed.alphabet import RESIDUE_TO_ID, decode
from esm_packed.runners.cli import main as cli
from esm_packed.runners.input import duplicates as hashes_module
from esm_packed.runners.input import index as index_module
from esm_packed.runners.input.fasta import InputError, Modified, ReadOptions
from esm_packed.runners.input.index import FastaIndex, Problem, build_index, open_index

DATA = Path(__file__).parents[2].parent / "shared" / "data"
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


def read(
    tmp_path: Path, *contents: bytes, chunk_size: int = 1 << 22, **options: Any
) -> tuple[FastaIndex, list[tuple[str, str]]]:
    """Index files with these contents (0.fa, 1.fa ...): the index and all its records as (ID, residues)."""
    paths = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.fa"
        path.write_bytes(content)
        paths.append(str(path))
    made = build_index(paths, tmp_path / "work", ReadOptions(**options), chunk_size=chunk_size)
    return made, records_of(made)


def records_of(made: FastaIndex) -> list[tuple[str, str]]:
    sequences = made.token_ids(0, made.num_records)
    assert [len(sequence) for sequence in sequences] == made.lengths.tolist()
    assert made.total_residues == sum(made.lengths.tolist())
    return list(zip(made.sequence_ids(0, made.num_records), map(decode, sequences), strict=True))


def error_of(tmp_path: Path, *contents: bytes, **options: Any) -> str:
    """The message of the error that reading these contents ends with, the folder left out."""
    with pytest.raises(InputError) as caught:
        read(tmp_path, *contents, **options)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def hashes_by_length(
    text: bytes, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """Hashes that only tell lengths apart, so that most matches are false ones."""
    return np.stack([ends - begins] * 2, axis=1).astype(np.uint64)


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


def firsts_of(items: Sequence[Any]) -> list[int]:
    firsts: dict[Any, int] = {}
    return [firsts.setdefault(item, number) for number, item in enumerate(items)]


def known_of(made: FastaIndex | None) -> tuple[Any, ...]:
    """All that an index knows."""
    assert made is not None
    return (
        records_of(made),
        made.lengths.tolist(),
        made.first_same.tolist(),
        (made.num_records, made.total_residues, made.num_identical, made.num_replaced, made.num_duplicates),
        made.problems,
        made.inputs,
    )


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


@settings(max_examples=600, deadline=None)
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


@settings(max_examples=500, deadline=None)
@given(data=FRAGMENTS, options=OPTIONS, chunk=st.sampled_from(CHUNK_SIZES))
def test_reads_any_bytes_as_the_slow_parser_does(data: bytes, options: ReadOptions, chunk: int) -> None:
    compare([data], options, chunk)


def test_a_chunk_may_end_anywhere() -> None:
    data = (
        b"\xef\xbb\xbf\r\n;c\r\n>a \xc3\xa9 >x\r\nMK V\r\n;>no\r\n\r\nW*\r\n \r\n>b\rlsq\r>c\n"
        b"M\xe2\x80\x83J\n>d\n*\n>a\nEE\n>\nM\n>e\nK*K\n>f\nT-T\n>g\nLL"
    )
    for chunk_size in range(1, len(data) + 2):
        compare([data, data], ReadOptions(invalid="skip", duplicates="rename"), chunk_size)
        compare([data], ReadOptions(invalid="skip", duplicates="first", gaps="drop"), chunk_size)


@pytest.mark.parametrize("name", DATA_COUNTS)
def test_real_files(name: str, tmp_path: Path) -> None:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    made = build_index([str(path)], tmp_path, ReadOptions(), chunk_size=5000)
    assert made.num_records == DATA_COUNTS[name]
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


@pytest.mark.parametrize("chunk_size", [1, 7, 1 << 22])
def test_an_error_lists_the_faults_of_all_inputs(tmp_path: Path, chunk_size: int) -> None:
    contents = (
        b">a\nACGJ\n>b\nACGT\n>c\nAC-GT\n>b again\nACG\n",
        gzip.compress(b">\nMK\n>d\n\n>a\nTTTT\n>b\nT1\n"),
        b"MKV\n",
        b"",
        b">e\nA2A\n>f\nG\0G\n>g\nA3\n",
    )
    assert error_of(tmp_path, *contents, chunk_size=chunk_size).splitlines() == [
        "11 faults in the input:",
        "  0.fa, line 2, record 'a': 'J' is not in ESM-2's alphabet",
        "  0.fa, line 3, record 'b': this looks like DNA or RNA: 100% of the residues in the first records "
        "(at most 100) are A, C, G, T, U or N",
        "  0.fa, line 6, record 'c': gap '-' in the sequence: this looks like an alignment",
        "  0.fa, line 7, record 'b': the same ID as in 0.fa, line 3",
        "  1.fa, line 1, record '': no ID after '>'",
        "  1.fa, line 3, record 'd': the record has no residues",
        "  1.fa, line 8, record 'b': '1' is not in ESM-2's alphabet",
        "  2.fa, line 1: not FASTA: text before the first '>': 'MKV'",
        "  3.fa: the file is empty",
        "  4.fa, line 2, record 'e': '2' is not in ESM-2's alphabet",
        "  4.fa, line 4, record 'f': NUL byte: this is not a text file",
        "  --invalid x replaces such characters by X, --invalid skip leaves such records out",
        "  --force goes on",
        "  --gaps drop removes gaps",
        "  --duplicates first keeps the first record of an ID, --duplicates rename adds __2, __3 ...",
    ]


def test_an_error_lists_the_first_ten_faults_and_counts_the_others(tmp_path: Path) -> None:
    many = b"".join(b">%d\nMJ\n>r%d\nMK\n" % (number, number % 8) for number in range(20))
    lines = error_of(tmp_path, many, b">z\n\xff").splitlines()
    assert lines[0] == "33 faults in the input:"
    # r0 comes again in line 35; the record before it is the ninth that is invalid
    assert [line.split(",")[1] for line in lines[1:11]] == [
        *(f" line {line}" for line in (2, 6, 10, 14, 18, 22, 26, 30, 34, 35))
    ]
    assert lines[11].startswith("  1.fa, line 2, record 'z': byte 0xff is not valid UTF-8")
    assert lines[12] == "  and 22 more; esm-packed info --all FILE lists all of a file"

    paths = [str(tmp_path / "0.fa")]
    with pytest.raises(InputError) as caught:
        build_index(paths, tmp_path / "work", ReadOptions(), most_listed=None)
    assert [line.split(",")[1] for line in caught.value.details if ", line " in line] == [
        f" line {line}"
        for number in range(20)
        for line in [4 * number + 2, 4 * number + 3][: 1 + (number > 7)]
    ]


def test_files_that_cannot_be_opened_are_listed(tmp_path: Path) -> None:
    (tmp_path / "0.fa").write_bytes(b">a\nMJ\n")
    paths = [str(tmp_path / name) for name in ("one\nname.fa", "0.fa", "two.fa", "")]
    with pytest.raises(InputError) as caught:
        build_index(paths, tmp_path / "work", ReadOptions())
    assert str(caught.value).replace(str(tmp_path), "").splitlines() == [
        "3 faults in the input:",
        "  /one name.fa: there is no such file",
        "  /two.fa: there is no such file",
        "  : this is a directory; name the FASTA files in it",
    ]


def test_faults_that_are_not_listed_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "many.fa"
    path.write_bytes(b"".join(b">%d %s\nMJ\n" % (number, b"x" * 60) for number in range(80_000)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="80,000 faults in the input"):
            build_index([str(path)], tmp_path / "work", ReadOptions(), chunk_size=1 << 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


def test_a_duplicate_names_both_places(tmp_path: Path) -> None:
    message = error_of(tmp_path, b">x\nMK\n>a\nMKL\n", b"\xef\xbb\xbf>y\nW\n\n>a z\nL\n")
    assert message.startswith("1.fa, line 4, record 'a': the same ID as in 0.fa, line 3 (--duplicates")
    with pytest.raises(InputError, match=r"0\.fa, line 1, record 'x': the same ID as in .*0\.fa, line 1"):
        build_index([str(tmp_path / "0.fa")] * 2, tmp_path / "work", ReadOptions())


def test_the_first_of_several_duplicates_is_reported(tmp_path: Path) -> None:
    text = b"".join(b">%d\nMK\n" % number for number in [*range(50), *range(40, 90), *range(50)])
    lines = error_of(tmp_path, text).splitlines()
    assert lines[:2] == [
        "60 faults in the input:",
        "  0.fa, line 101, record '40': the same ID as in 0.fa, line 81",
    ]


def test_only_equal_ids_are_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "hashes_of", hashes_by_length)
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
    assert message.startswith(
        "no record is left, all 2 were left out; the first is 0.fa, line 2, record 'a': 'J'"
    )


def test_a_record_left_out_is_no_duplicate(tmp_path: Path) -> None:
    assert read(tmp_path, b">a\nMJ\n>a\nMK\n", invalid="skip")[1] == [("a", "MK")]


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


@pytest.mark.parametrize("chunk_size", [1, 50, 900, 1100, 4000, 1 << 22])
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


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_large_file_of_dna_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any
) -> None:
    monkeypatch.setattr(index_module, "MOST_READ_OF_DNA", 20_000)
    letters = np.random.default_rng(0).choice(list(b"ACGT"), size=(3000, 60)).astype(np.uint8)
    path, protein = tmp_path / "dna.fa", tmp_path / "protein.fa"
    path.write_bytes(pack(b"".join(b">%d\n%s\n" % (n, row.tobytes()) for n, row in enumerate(letters))))
    protein.write_bytes(b">p\nMJ\n")
    told: list[int] = []
    with pytest.raises(InputError) as caught:
        build_index(
            [str(path), str(protein)], tmp_path / "work", ReadOptions(), progress=told.append, chunk_size=1000
        )
    assert [line.rsplit(": ", 1)[-1].split(",")[0] for line in caught.value.details[:3]] == [
        "100% of the residues in the first records (at most 100) are A",
        "not read beyond 0 MiB",
        "'J' is not in ESM-2's alphabet",
    ]
    assert sum(told) < 0.5 * path.stat().st_size


def test_a_missing_file_a_directory_and_no_input(tmp_path: Path) -> None:
    read(tmp_path, b">a\nMK")
    sound, missing = str(tmp_path / "0.fa"), str(tmp_path / "none.fa")
    told: list[int] = []
    with pytest.raises(InputError, match=r"none\.fa: there is no such file"):
        build_index([sound, missing], tmp_path / "work", ReadOptions(), progress=told.append)
    assert told == []  # noticed before the first file was read
    with pytest.raises(InputError, match="this is a directory"):
        build_index([str(tmp_path)], tmp_path / "work", ReadOptions())
    with pytest.raises(InputError, match="no input files"):
        build_index([], tmp_path / "work", ReadOptions())


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.fa"
    path.write_bytes(b">a\nMK")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    with pytest.raises(InputError, match=r"locked\.fa: cannot be opened: Permission denied"):
        build_index([str(path)], tmp_path / "work", ReadOptions())


def test_unknown_options_are_refused() -> None:
    for name in ("invalid", "duplicates", "gaps"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'maybe'"):
            ReadOptions(**{name: "maybe"})


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


def test_a_range_is_one_read_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"".join(b">%d\nMKV\n;note\nL\n" % number for number in range(1000))
    made, _ = read(tmp_path, text, text.replace(b">", b">x"))
    reads: list[int] = []

    def counting(descriptor: int, num_bytes: int, position: int) -> bytes:
        reads.append(num_bytes)
        return pread(descriptor, num_bytes, position)

    pread = os.pread
    monkeypatch.setattr(os, "pread", counting)
    assert len(made.token_ids(10, 1500)) == 1490
    assert len(reads) == 4  # of each file its rows of the index, and its text
    assert len(made.sequence_ids(10, 1500)) == 1490
    assert len(reads) == 9


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    made, _ = read(tmp_path, b">a\nMK\n>b\nVW\n")
    path = tmp_path / "0.fa"
    path.write_bytes(b">a\nMK\n>b\nV\n")
    with pytest.raises(InputError, match=r"0\.fa: the file was changed"):
        made.token_ids(0, 1)
    with pytest.raises(InputError, match=r"0\.fa: the file was changed"):
        made.sequence_ids(0, 1)
    path.unlink()
    with pytest.raises(InputError, match=r"0\.fa: cannot be read any more"):
        made.token_ids(0, 1)

    def append(_: int) -> None:
        if path.stat().st_size < 20:
            with path.open("ab") as file:
                file.write(b">c\nMKVLW\n")

    path.write_bytes(b">a\nMK\n>b\nVW\n")
    with pytest.raises(InputError, match=r"0\.fa: the file was changed while it was being read"):
        build_index([str(path)], tmp_path / "work", ReadOptions(), progress=append)


def test_a_cut_copy_is_noticed(tmp_path: Path) -> None:
    made, _ = read(tmp_path, gzip.compress(b">a\nMK\n>b\nVW\n"))
    os.truncate(tmp_path / "work" / "input-0.fasta", 10)
    with pytest.raises(InputError, match=r"0\.fa: the file was changed"):
        made.token_ids(0, 2)


def test_lines_are_counted_across_reads(tmp_path: Path) -> None:
    start = b">a\r\n".ljust((1 << 22) - 1, b"M") + b"\r"
    assert error_of(tmp_path, start + b"\nJ\r\n").startswith("0.fa, line 3, record 'a': 'J'")


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


def test_index_on_disk_is_rebuilt(tmp_path: Path) -> None:
    read(tmp_path, gzip.compress(b">a\nMK\n>b\nVWL\n"))
    made, _ = read(tmp_path, b">c\nMKV\n")
    assert made.lengths.tolist() == [3]
    assert made.lengths.dtype == made.lengths[0:1].dtype == np.int32
    assert made.first_same.tolist() == [0]
    assert made.first_same.dtype == made.first_same[0:1].dtype == np.int64
    names = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert names == ["first_same.bin", "index.json", "records.bin"]


def test_a_line_of_eight_megabytes(tmp_path: Path) -> None:
    residues = np.random.default_rng(1).choice(list(b"MKVLWEDR"), size=8_000_000).astype(np.uint8)
    made, _ = read(tmp_path, b">a\nMK\n>long\n" + residues.tobytes() + b"*\n>b\nVW", chunk_size=1 << 20)
    assert made.lengths.tolist() == [2, 8_000_000, 2]
    np.testing.assert_array_equal(made.token_ids(1, 2)[0], RESIDUE_TO_ID[residues])
    np.testing.assert_array_equal(made.token_ids(1, 2, 1022)[0], RESIDUE_TO_ID[residues[:1022]])


def test_a_record_beyond_all_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_RECORD_BYTES", 1 << 20)
    genome = b">a\nMK\n>chr1 human\n" + b"ACGT" * 400_000
    assert "line 3, record 'chr1': a record is longer than 1 MiB" in error_of(
        tmp_path, genome, chunk_size=1 << 16
    )
    for line_end in (b"\n", b"\r"):
        small = b"".join(b">%d%sMK%s" % (number, line_end, line_end) for number in range(100))
        monkeypatch.setattr(index_module, "MAX_RECORD_BYTES", 20)
        for chunk_size in (1, 2, 3):
            assert read(tmp_path, small, chunk_size=chunk_size)[0].num_records == 100
    monkeypatch.setattr(index_module, "MAX_RECORD_BYTES", 1 << 20)
    assert "line 1: not FASTA: no '>' at the start" in error_of(
        tmp_path, b"x" * 1_600_000, chunk_size=1 << 16
    )


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


@settings(max_examples=200, deadline=None)
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
        patch.setattr(hashes_module, "_MAX_BATCH_RECORDS", in_memory + 2)
        patch.setattr(hashes_module, "_MAX_BATCH_BYTES", in_memory)
        if collide:
            patch.setattr(index_module, "hashes_of", hashes_by_length)
        path = Path(folder, "a.fa")
        path.write_text(text)
        made = build_index([str(path)], Path(folder, "work"), ReadOptions())
        assert made.first_same.tolist() == firsts_of(sequences)
        assert made.num_identical == len(sequences) - len(set(sequences))
        assert [decode(sequence) for sequence in made.token_ids(0, len(sequences))] == sequences


@settings(max_examples=200, deadline=None)
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
    assert not opens()
    os.utime(path, ns=times)
    assert opens()
    path.write_bytes(content + b"\n")
    os.utime(path, ns=times)
    assert not opens()
    path.unlink()
    assert not opens()
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert opens()


def test_the_same_name_in_another_folder_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.fa").write_bytes(b">a\nMKV\n")
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
    assert names == ["first_same.bin", "index.json", "input-0.fasta", "records.bin"]
    for name in names:
        content = (work_dir / name).read_bytes()
        (work_dir / name).unlink()
        assert open_index([str(path)], work_dir, options) is None
        for num_bytes in {0, 1, len(content) // 2, len(content) - 1}:
            (work_dir / name).write_bytes(content[:num_bytes])
            assert open_index([str(path)], work_dir, options) is None, (name, num_bytes)
        for place in range(0, len(content), max(1, len(content) // 40)):
            altered = bytearray(content)
            altered[place] ^= 1
            (work_dir / name).write_bytes(altered)
            assert open_index([str(path)], work_dir, options) is None, (name, place)
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

    steps = ("_Pass", "_settle_duplicates", "sort_rows", "write_firsts", "confirm_firsts", "_find_identical")
    for module, step in [(index_module, step) for step in (*steps, "sync", "_problems")] + [
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
        assert names == ["first_same.bin", "index.json", "input-0.fasta", "records.bin"]


def test_a_pipe_is_never_unchanged(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b">a\nMK\n",))
    writer.start()
    build_index([str(pipe)], tmp_path / "work", ReadOptions())
    writer.join()
    assert open_index([str(pipe)], tmp_path / "work", ReadOptions()) is None


def test_an_index_cut_short_in_use_is_an_error(tmp_path: Path) -> None:
    made, _ = read(tmp_path, b">a\nMK\n>b\nMK\n>c\nMKV\n")
    for name in ("records.bin", "first_same.bin"):
        os.truncate(tmp_path / "work" / name, 9)
    for use in (
        lambda: made.lengths[1:3],
        lambda: made.first_same[0:3],
        lambda: made.sequence_ids(1, 2),
        lambda: made.token_ids(0, 3),
    ):
        with pytest.raises(InputError, match="cut short while it was in use"):
            use()


def test_an_index_in_use_survives_its_replacement(tmp_path: Path) -> None:
    made, _ = read(tmp_path, b">a\nMK\n>b\nMK\n")
    path = tmp_path / "other.fa"
    path.write_bytes(b">c\nMKV\n")
    build_index([str(path)], tmp_path / "work", ReadOptions())
    assert (made.lengths.tolist(), made.first_same.tolist()) == ([2, 2], [0, 0])


@settings(max_examples=300, deadline=None)
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


MANY_FAULTS = ">dna\nACGT\n" + "".join(f">p\x1b{number}\nMKJ\n" for number in range(12)) + ">dna\nACG*\n"
LISTED = [f"line {line}" for line in (1, *range(4, 21, 2))]


def test_embed_lists_the_first_ten_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in\n.fa"
    path.write_text(MANY_FAULTS)
    arguments = ["embed", str(path), "-o", str(tmp_path / "out.h5"), "--model", "demo", "--device", "cpu"]
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "esm-packed: error: 14 faults in the input:"
    shown = str(path).replace("\n", " ")
    assert [line.split(", record")[0] for line in lines[1:11]] == [f"  {shown}, {place}" for place in LISTED]
    assert lines[2].endswith(r"record 'p\x1b0': 'J' is not in ESM-2's alphabet")
    assert lines[11:] == [
        "  and 4 more; esm-packed info --all FILE lists all of a file",
        "  --force goes on",
        "  --invalid x replaces such characters by X, --invalid skip leaves such records out",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["in\n.fa"]


def test_info_lists_the_first_ten_faults_or_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.fa"
    path.write_text(MANY_FAULTS)
    assert cli.main(["info", str(path)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line.partition(",")[0] for line in lines[:-1]] == LISTED
    assert "looks like DNA" in lines[0]
    assert lines[-1] == "and 4 more; --all lists them"

    assert cli.main(["info", str(path), "--all"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line.partition(",")[0] for line in lines] == [
        f"line {line}" for line in (1, *range(4, 27, 2), 27)
    ]
    assert lines[-1].endswith(f"the same ID as in {path}, line 1")


def test_info_lists_the_faults_of_what_cannot_be_read_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.fa"
    path.write_bytes(b">a\nMKJ\n>b\nM-K\n>c\n\0\n")
    assert cli.main(["info", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in lines[1:4]] == ["line 2", "line 4", "line 6"]
    path.write_bytes(b">a\nMKJ\n>b\nM-K\n")
    assert cli.main(["info", str(path)]) == 2
    assert capsys.readouterr().err.startswith("esm-packed: error: 2 faults in the input:\n")
