"""`read_fasta`: the rules and errors of `embed`, for records in Python."""

from __future__ import annotations

import gzip
import io
import tempfile
from pathlib import Path

import pytest

import esm_packed
from esm_packed.runners.input.fasta import InputError

TEXT = ">a first\nmkt\nLLA*\n; comment\n>b\nMK VU\n>päf\nXBZO\n"
RECORDS = [("a", "MKTLLA"), ("b", "MKVU"), ("päf", "XBZO")]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_records_are_as_embed_reads_them(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text(TEXT)
    packed = tmp_path / "in.fasta.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    for source in (path, str(path), packed, io.StringIO(TEXT), io.BytesIO(packed.read_bytes())):
        assert list(esm_packed.read_fasta(source)) == RECORDS
        assert not list(temporary.iterdir())
    with path.open() as file:
        assert next(esm_packed.read_fasta(file, full_header=True)) == ("a first", "MKTLLA")


def test_many_records(tmp_path: Path) -> None:
    records = [(f"p{number}", "MK" + "ACDEFGHIKL"[: number % 11]) for number in range(3000)]
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
    assert list(esm_packed.read_fasta(path)) == records


@pytest.mark.parametrize(
    ("text", "options", "records"),
    [
        (">a\nMK1L\n>b\nMKL\n", {"invalid": "x"}, [("a", "MKXL"), ("b", "MKL")]),
        (">a\nMK1L\n>b\nMKL\n", {"invalid": "skip"}, [("b", "MKL")]),
        (">a\nMKL\n>a\nMKV\n", {"duplicates": "first"}, [("a", "MKL")]),
        (">a\nMKL\n>a\nMKV\n", {"duplicates": "rename"}, [("a", "MKL"), ("a__2", "MKV")]),
        (">a\nM-K.L\n", {"gaps": "drop"}, [("a", "MKL")]),
        (">a\nACGTACGT\n", {"force": True}, [("a", "ACGTACGT")]),
    ],
)
def test_options_are_those_of_embed(text: str, options, records) -> None:
    with pytest.raises(InputError):
        esm_packed.read_fasta(io.StringIO(text))
    assert list(esm_packed.read_fasta(io.StringIO(text), **options)) == records


def test_faults_are_raised_before_the_first_record(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text(">a\nMKL\n>b\nMK1\n>c\nM?\n")
    with pytest.raises(InputError) as raised:
        esm_packed.read_fasta(path)
    first, second, *_ = raised.value.details
    assert first.startswith(f"{path}, line 4, record 'b': ") and second.startswith(f"{path}, line 6")
    with path.open() as file, pytest.raises(InputError) as from_file:
        esm_packed.read_fasta(file)
    assert str(from_file.value) == str(raised.value)
    with pytest.raises(InputError, match=r"^the open file, line 2, record 'a': "):
        esm_packed.read_fasta(io.StringIO(">a\nM1\n"))
    with pytest.raises(InputError, match=r"/no\.fasta: no such file"):
        esm_packed.read_fasta(tmp_path / "no.fasta")
    with pytest.raises(ValueError, match="gaps must be one of error, drop; got 'keep'"):
        esm_packed.read_fasta(path, gaps="keep")
    assert not list(temporary.iterdir())


def test_nothing_is_left_of_a_reading_that_is_not_finished(temporary: Path) -> None:
    records = esm_packed.read_fasta(io.StringIO(TEXT))
    assert next(records) == RECORDS[0]
    assert list(temporary.iterdir())
    del records
    assert not list(temporary.iterdir())
