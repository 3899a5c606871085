"""Faults of the inputs: which are found, and how `embed` and `info` list them."""

from __future__ import annotations

import errno
import gzip
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexing import error_of, read

from esm_packed.runners.cli import main as cli
from esm_packed.runners.input import scan
from esm_packed.runners.input.build import build_index, survey
from esm_packed.runners.input.fasta import InputError, ReadOptions


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
        "13 problems in the input:",
        "  0.fa, line 2, record 'a': 'J' is not in ESM-2's alphabet",
        "  0.fa, line 3, record 'b': this looks like DNA or RNA: 100% of the residues in the first records "
        "(at most 100) are A, C, G, T, U or N",
        "  0.fa, line 6, record 'c': gap '-' in the sequence: this looks like an alignment",
        "  0.fa, line 7, record 'b': the same ID as in 0.fa, line 3",
        "  1.fa, line 1, record '': no ID after '>'",
        "  1.fa, line 3, record 'd': the record has no residues",
        "  1.fa, line 5, record 'a': the same ID as in 0.fa, line 1",
        "  1.fa, line 7, record 'b': the same ID as in 0.fa, line 3",
        "  1.fa, line 8, record 'b': '1' is not in ESM-2's alphabet",
        "  2.fa, line 1: not FASTA: text before the first '>': 'MKV'",
        "  3.fa: the file is empty",
        "  4.fa, line 2, record 'e': '2' is not in ESM-2's alphabet",
        "  4.fa, line 4, record 'f': NUL byte: this is not a text file",
        "  --invalid x replaces such characters by X, --invalid skip leaves such records out",
        "  --force accepts it",
        "  --gaps drop removes gaps",
        "  --duplicates first keeps the first record of an ID, --duplicates rename adds __2, __3 ...",
        "  --invalid skip leaves out records without residues",
    ]


def test_an_error_lists_the_first_ten_faults_and_counts_the_others(tmp_path: Path) -> None:
    many = b"".join(b">%d\nMJ\n>r%d\nMK\n" % (number, number % 8) for number in range(20))
    lines = error_of(tmp_path, many, b">z\n\xff").splitlines()
    assert lines[0] == "33 problems in the input:"
    # r0 comes again in line 35; the record before it is the ninth that is invalid
    assert [line.split(",")[1] for line in lines[1:11]] == [
        *(f" line {line}" for line in (2, 6, 10, 14, 18, 22, 26, 30, 34, 35))
    ]
    assert lines[11].startswith("  1.fa, line 2, record 'z': byte 0xff is not valid UTF-8")
    assert lines[12] == "  and 22 more; esm-packed info --all FILE lists all of a file"

    faults = survey(str(tmp_path / "0.fa"), tmp_path / "work", most_listed=None).faults
    assert [fault.line for fault in faults.listed()] == [
        line for number in range(20) for line in [4 * number + 2, 4 * number + 3][: 1 + (number > 7)]
    ]


def test_files_that_cannot_be_opened_are_listed(tmp_path: Path) -> None:
    (tmp_path / "0.fa").write_bytes(b">a\nMJ\n")
    paths = [str(tmp_path / name) for name in ("one\nname.fa", "0.fa", "two.fa", "")]
    with pytest.raises(InputError) as caught:
        build_index(paths, tmp_path / "work", ReadOptions())
    assert str(caught.value).replace(str(tmp_path), "").splitlines() == [
        "4 problems in the input:",
        "  /one name.fa: no such file",
        "  /0.fa, line 2, record 'a': 'J' is not in ESM-2's alphabet",
        "  /two.fa: no such file",
        "  : is a directory; give the FASTA files in it",
        "  --invalid x replaces such characters by X, --invalid skip leaves such records out",
    ]


def test_faults_that_are_not_listed_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "many.fa"
    path.write_bytes(b"".join(b">%d %s\nMJ\n" % (number, b"x" * 60) for number in range(40_000)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="40,000 problems in the input"):
            build_index([str(path)], tmp_path / "work", ReadOptions(), chunk_size=1 << 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_large_file_of_dna_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any
) -> None:
    monkeypatch.setattr(scan, "MOST_READ_OF_DNA", 20_000)
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
    with pytest.raises(InputError, match=r"none\.fa: no such file"):
        build_index([sound, missing], tmp_path / "work", ReadOptions())
    with pytest.raises(InputError, match="is a directory"):
        build_index([str(tmp_path)], tmp_path / "work", ReadOptions())
    with pytest.raises(InputError, match="no input files"):
        build_index([], tmp_path / "work", ReadOptions())


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.fa"
    path.write_bytes(b">a\nMK")

    def refuse(self: Path, mode: str) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return open_path(self, mode)

    open_path = Path.open

    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    with pytest.raises(InputError, match=r"locked\.fa: cannot be opened: Permission denied"):
        build_index([str(path)], tmp_path / "work", ReadOptions())


def test_lines_are_counted_across_reads(tmp_path: Path) -> None:
    start = b">a\r\n".ljust((1 << 22) - 1, b"M") + b"\r"
    assert error_of(tmp_path, start + b"\nJ\r\n").startswith("0.fa, line 3, record 'a': 'J'")


MANY_FAULTS = ">dna\nACGT\n" + "".join(f">p\x1b{number}\nMKJ\n" for number in range(12)) + ">dna\nACG*\n"
LISTED = [f"line {line}" for line in (1, *range(4, 21, 2))]


def test_embed_lists_the_first_ten_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in\n.fa"
    path.write_text(MANY_FAULTS)
    arguments = ["embed", str(path), "-o", str(tmp_path / "out.h5"), "--model", "demo", "--device", "cpu"]
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "esm-packed: error: 14 problems in the input:"
    shown = str(path).replace("\n", " ")
    assert [line.split(", record")[0] for line in lines[1:11]] == [f"  {shown}, {place}" for place in LISTED]
    assert lines[2].endswith(r"record 'p\x1b0': 'J' is not in ESM-2's alphabet")
    assert lines[11:] == [
        "  and 4 more; esm-packed info --all FILE lists all of a file",
        "  --force accepts it",
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


@pytest.mark.parametrize(
    ("content", "faulty", "listed"),
    [
        (b">a\nMKJ\n>b\nM-K\n", "2", ["line 2, record 'a': 'J' is not", "line 4, record 'b': gap '-'"]),
        (b">\nMK\n", "1", ["line 1, record '': no ID after '>'"]),
        (b">d\nACGTACGTA\n>e\nACG\n", "all: DNA or RNA", ["line 1, record 'd': this looks like DNA or RNA"]),
    ],
    ids=["all faulty", "no ID", "DNA"],
)
def test_info_sums_up_a_file_without_a_sound_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, faulty: str, listed: list[str]
) -> None:
    path = tmp_path / "in.fa"
    path.write_bytes(content)
    assert cli.main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = {line[:20].strip(): line[20:] for line in lines if not line.startswith("  ")}
    assert (values["records"], values["faulty"]) == (str(content.count(b">")), faulty)
    found = [line for line in lines if line.startswith("  ")]
    assert len(found) == len(listed)
    assert all(line.startswith(f"  {start}") for line, start in zip(found, listed, strict=True))


def test_each_kind_of_fault_of_a_record_is_listed(tmp_path: Path) -> None:
    lines = error_of(tmp_path, b">a\nMJ1\nM-.K\n>\nM>K\n>b\nM*K*\n>a\nM*JK\n").splitlines()
    assert [line.partition(":")[0] + line.partition(":")[2][:9] for line in lines[1:9]] == [
        "  0.fa, line 2, record 'a' 'J' is n",
        "  0.fa, line 3, record 'a' gap '-' ",
        "  0.fa, line 4, record '' no ID af",
        "  0.fa, line 5, record '' '>' insi",
        "  0.fa, line 7, record 'b' '*' (sto",
        "  0.fa, line 8, record 'a' the same",
        "  0.fa, line 9, record 'a' '*' (sto",
        "  0.fa, line 9, record 'a' 'J' is n",
    ]
    made, _ = read(tmp_path, b">a\nMJ1\nM-.K\n>b\nMK\n", invalid="skip")
    assert [problem.line for problem in made.problems] == [2]  # a record is left out once


def test_a_file_given_twice_has_all_its_records_twice(tmp_path: Path) -> None:
    path = tmp_path / "0.fa"
    path.write_bytes(b">a\nMJ\n>b\nMK\n")
    with pytest.raises(InputError) as caught:
        build_index([str(path), str(path)], tmp_path / "work", ReadOptions())
    assert [line.split(": ", 1)[1].split(str(path))[0] for line in caught.value.details[:4]] == [
        "'J' is not in ESM-2's alphabet",
        "the same ID as in ",
        "'J' is not in ESM-2's alphabet",
        "the same ID as in ",
    ]
