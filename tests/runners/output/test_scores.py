"""Tables of scores, read back with the readers that people use."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm_packed.alphabet import AMINO_ACIDS, encode
from esm_packed.errors import UsageError, UserError
from esm_packed.files import sha256_of
from esm_packed.runners.input.mutations import Mutants
from esm_packed.runners.output import scores as scores_module
from esm_packed.runners.output.scores import (
    ProteinLikelihood,
    ProteinScan,
    check_table,
    write_likelihoods,
    write_mutants,
    write_scan,
)
from esm_packed.scoring import PseudoLikelihood, scored_sites

PROVENANCE = {"model_name": "m", "method": "masked", "window": 1022}

Read = Callable[[Path], tuple[list[str], list[list[Any]]]]


def read_csv(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Header, and rows with NaN where a number is missing; numbers stay text."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert b"\r" not in path.read_bytes()
    return header, rows


def read_parquet(path: Path) -> tuple[list[str], list[list[Any]]]:
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    assert json.loads(table.schema.metadata[b"esm-packed"]) == PROVENANCE
    return table.column_names, [list(row.values()) for row in table.to_pylist()]


@pytest.fixture(params=[".csv", ".parquet"])
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == ".parquet":
        pytest.importorskip("pyarrow")
    return str(request.param)


@pytest.fixture
def read(suffix: str) -> Read:
    return read_csv if suffix == ".csv" else read_parquet


def number(cell: Any) -> float:
    return math.nan if cell == "" else float(cell)


def table_of(path: Path) -> Mutants:
    """As `read_mutants` gives it where the third row was left out."""
    path.write_text('mutant,note\nK2A,"a, b"\nT3G:M1L,\nW9W,bad\nA4A,ü\n', encoding="utf-8")
    ids = encode("KMTA"), encode("ALGA")
    arrays = np.array([2, 3, 5]), np.zeros(3, np.int64), np.array([0, 1, 3, 4]), np.array([1, 0, 2, 3])
    return Mutants(path, sha256_of(path), ("mutant", "note"), *arrays, *ids)


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_mutants_keep_their_columns_and_order(
    tmp_path: Path, suffix: str, read: Read, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "_ROWS_AT_ONCE", rows_at_once)
    path = tmp_path / f"out{suffix}"
    write_mutants(path, table_of(tmp_path / "in.csv"), np.array([-1.25, math.nan, 0.0]), PROVENANCE)
    header, rows = read(path)
    assert header == ["mutant", "note", "score"]
    assert [row[:2] for row in rows] == [["K2A", "a, b"], ["T3G:M1L", ""], ["A4A", "ü"]]
    np.testing.assert_array_equal([number(row[2]) for row in rows], [-1.25, math.nan, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scan_has_every_substitution_of_every_scored_residue(
    tmp_path: Path, suffix: str, read: Read, dtype: type[np.floating[Any]]
) -> None:
    rng = np.random.default_rng(0)
    sequences = ["MXKC", "XUBZO", "W"]
    proteins = []
    for name, sequence in zip("abc", sequences, strict=True):
        token_ids = encode(sequence)
        rows = rng.standard_normal((len(scored_sites(token_ids)), 20)).astype(dtype)
        proteins.append(ProteinScan(name, token_ids, rows))
    path = tmp_path / f"out{suffix}"
    write_scan(path, iter(proteins), PROVENANCE, offset=-1)
    header, written = read(path)
    assert header == ["id", "position", "wild_type", "mutant", "score", "log_prob"]
    expected = []
    for name, protein, sites in (("a", proteins[0], [0, 2, 3]), ("c", proteins[2], [0])):
        for row, site in zip(protein.log_probabilities.tolist(), sites, strict=True):
            old = sequences["abc".index(name)][site]
            for new in AMINO_ACIDS:
                log_prob = row[AMINO_ACIDS.index(new)]
                if new != old:
                    score = log_prob - row[AMINO_ACIDS.index(old)]
                    expected.append([name, site - 1, old, new, score, log_prob])
    assert len(expected) == 4 * 19
    assert [[row[0], int(row[1]), *row[2:4]] for row in written] == [row[:4] for row in expected]
    tolerance = 1e-6 if dtype == np.float32 or suffix == ".csv" else 1e-15
    for place in (4, 5):
        np.testing.assert_allclose(
            [float(row[place]) for row in written], [row[place] for row in expected], rtol=0, atol=tolerance
        )


def test_likelihoods_are_a_row_for_each_protein(tmp_path: Path, suffix: str, read: Read) -> None:
    proteins = [
        ProteinLikelihood("a", 12, PseudoLikelihood(-24.5, -2.45, math.exp(2.45), 10)),
        ProteinLikelihood("b", 3, PseudoLikelihood(0.0, math.nan, math.nan, 0)),
    ]
    path = tmp_path / f"out{suffix}"
    write_likelihoods(path, proteins, PROVENANCE)
    header, rows = read(path)
    assert header == ["id", "length", "scored_residues", "pseudo_log_likelihood", "pseudo_perplexity"]
    assert [[row[0], int(row[1]), int(row[2])] for row in rows] == [["a", 12, 10], ["b", 3, 0]]
    np.testing.assert_allclose([number(row[3]) for row in rows], [-24.5, 0])
    np.testing.assert_allclose([number(row[4]) for row in rows], [math.exp(2.45), math.nan], atol=1e-6)


def test_small_proteins_share_a_row_group(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    proteins = [ProteinScan("a", encode("MK"), np.zeros((2, 20), np.float32))] * 50
    write_scan(tmp_path / "out.parquet", proteins, PROVENANCE)
    metadata = parquet.read_metadata(tmp_path / "out.parquet")
    assert (metadata.num_rows, metadata.num_row_groups) == (50 * 38, 1)


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, suffix: str) -> None:
    def proteins() -> Iterator[ProteinScan]:
        yield ProteinScan("a", encode("MK"), np.zeros((2, 20), np.float32))
        raise ValueError("stop")

    path = tmp_path / f"out{suffix}"
    with pytest.raises(ValueError, match="stop"):
        write_scan(path, proteins(), PROVENANCE)
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        write_likelihoods(
            path, [ProteinLikelihood("a", 1, PseudoLikelihood(0, 0, 1, 1))], PROVENANCE, overwrite=False
        )
    assert path.read_text() == "mine"


def test_tables_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"out\.h5: unknown file type; use OUT\.csv or OUT\.parquet"):
        check_table(tmp_path / "out.h5")
    check_table(tmp_path / "out.CSV")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow is not installed; install it with: pip install pyarrow"):
        check_table(tmp_path / "out.parquet")
