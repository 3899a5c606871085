"""Tables of mutants: what is read, and what is refused with table, row and column."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from esm_packed.alphabet import TOKENS
from esm_packed.errors import UsageError
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.input.index import FastaIndex
from esm_packed.runners.input.mutations import Mutants, TableProblem, read_mutants

ONE = "MKTAYIAKQR"
OTHER = "GSHMXLFD"


def index_of(folder: Path, *sequences: str) -> FastaIndex:
    fasta = folder / "proteins.fasta"
    fasta.write_text("".join(f">P{number}\n{each}\n" for number, each in enumerate(sequences, 1)))
    return build_index([str(fasta)], folder / "index", ReadOptions())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> FastaIndex:
    return index_of(tmp_path_factory.mktemp("one"), ONE)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> FastaIndex:
    return index_of(tmp_path_factory.mktemp("two"), ONE, OTHER)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def read(table: Path, index: FastaIndex, *lines: str, offset: int = 1, skip_bad: bool = False) -> Mutants:
    table.write_text("\n".join(lines) + "\n")
    return read_mutants(table, index, offset=offset, skip_bad=skip_bad)


def substitutions(mutants: Mutants) -> list[list[tuple[str, int, str]]]:
    """Of each mutant (wild type, site from 0, residue)."""
    found = [
        (TOKENS[wild_type], int(site), TOKENS[residue])
        for wild_type, site, residue in zip(mutants.wild_types, mutants.sites, mutants.mutants, strict=True)
    ]
    return [found[first:last] for first, last in zip(mutants.starts, mutants.starts[1:], strict=False)]


def test_mutants_of_one_protein(table: Path, one: FastaIndex) -> None:
    mutants = read(table, one, "DMS_score,mutant,note", "0.5,K2A,", '1,T3G:M1L,"a, b"', "", "-1,A4A,x")
    assert substitutions(mutants) == [[("K", 1, "A")], [("M", 0, "L"), ("T", 2, "G")], [("A", 3, "A")]]
    assert mutants.records.tolist() == [0, 0, 0] and mutants.rows.tolist() == [2, 3, 5]
    assert mutants.columns == ("DMS_score", "mutant", "note") and mutants.problems == ()
    assert list(mutants.table_rows()) == [["0.5", "K2A", ""], ["1", "T3G:M1L", "a, b"], ["-1", "A4A", "x"]]
    np.testing.assert_array_equal(mutants.sums(np.array([1.0, 10.0, 20.0, 5.0])), [1, 30, 5])


@pytest.mark.parametrize("column", ["id", "protein", "sequence_id"])
def test_mutants_of_several_proteins_as_tsv(table: Path, two: FastaIndex, column: str) -> None:
    mutants = read(table, two, f"mutant\t{column}", "S2A\tP2", "K2A\tP1", "S2A:G1V\tP2")
    assert mutants.records.tolist() == [1, 0, 1]
    assert substitutions(mutants)[2] == [("G", 0, "V"), ("S", 1, "A")]


def test_records_are_known_by_their_accession(tmp_path: Path, table: Path) -> None:
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text(f">sp|P12345|ONE_HUMAN\n{ONE}\n>tr|Q12345-2|OTHER\n{OTHER}\n>Q12345-2\n{ONE}\n")
    index = build_index([str(fasta)], tmp_path / "index", ReadOptions())
    mutants = read(table, index, "id,mutant", "P12345,K2A", "tr|Q12345-2|OTHER,S2A", "Q12345-2,K2A")
    assert mutants.records.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="row 3, column mutant: row 2 is the same mutant"):
        read(table, index, "id,mutant", "P12345,K2A", "sp|P12345|ONE_HUMAN,K2A")
    fasta.write_text(f">sp|P12345|ONE_HUMAN\n{ONE}\n>tr|P12345|OTHER\n{OTHER}\n")
    index = build_index([str(fasta)], tmp_path / "shared", ReadOptions())
    with pytest.raises(UsageError, match="row 2, column id: 'P12345' is the accession of several records"):
        read(table, index, "id,mutant", "P12345,K2A")


def test_numbering_that_does_not_start_at_one(table: Path, one: FastaIndex) -> None:
    mutants = read(table, one, "mutant", "K-3A", "R5G:M-4L", offset=-4)
    assert substitutions(mutants) == [[("K", 1, "A")], [("M", 0, "L"), ("R", 9, "G")]]
    with pytest.raises(UsageError, match=r"K6A: there is no residue 6; the protein has residues -4 to 5"):
        read(table, one, "mutant", "K6A", offset=-4)


def test_mutated_sequence_is_checked_and_can_stand_alone(table: Path, one: FastaIndex) -> None:
    both = read(table, one, "mutant,mutated_sequence", "K2A:R10W,MATAYIAKQW", "A4A,mktayiakqr")
    alone = read(table, one, "mutated_sequence", "MATAYIAKQW", ONE)
    assert substitutions(both)[0] == substitutions(alone)[0] == [("K", 1, "A"), ("R", 9, "W")]
    assert substitutions(alone)[1] == []
    assert substitutions(read(table, one, "mutant", "k2a"))[0] == [("K", 1, "A")]
    np.testing.assert_array_equal(alone.sums(np.array([2.0, 3.0])), [5, 0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["mutant", "K2A", "K3A"], "row 3, column mutant: K3A: residue 3 is T, not K"),
        (["mutant", "K26A"], r"\(--offset is the number of the first residue; --skip-bad skips such rows"),
        (["mutant", "K2X"], r"WY \(--skip-bad skips such rows and lists them\)"),
        (["x,mutant", "1,K2A", "2,K11A"], "row 3, column mutant: K11A: there is no residue 11; the protein "),
        (
            ["mutant", "M0A"],
            "row 2, column mutant: M0A: there is no residue 0; the protein has residues 1 to",
        ),
        (["mutant", "K2B"], "column mutant: K2B: B is not one of the 20 amino acids ACDEFGHIKLMNPQRST"),
        (["mutant", "K2*"], r"\* is not one of the 20 amino acids"),
        (["mutant", "K2"], "row 2, column mutant: 'K2' is not a mutation; write A24G"),
        (["mutant,x", ",1"], "row 2, column mutant: '' is not a mutation"),
        (["mutant", "K" * 5000], rf"row 2, column mutant: '{'K' * 60}\.\.\.' is not a mutation; write A24G"),
        (["sequence_id;mutant", "P1;K2A"], "separated by semicolons; save it with commas or tabs"),
        (["mutant", "K2A:T3C:K2R"], "row 2, column mutant: K2A:T3C:K2R: residue 2 appears twice"),
        (["mutant", "K2A", "T3A", "K2A"], "row 4, column mutant: row 2 is the same mutant"),
        (["mutant", "K2A:T3C", "T3C:K2A"], "row 3, column mutant: row 2 is the same mutant"),
        (["mutant", "K2A,1"], "row 2: 2 cells, but the header has 1"),
        (["mutant,mutated_sequence", "K2A,MATAYIAKQW"], "row 2, column mutated_sequence: letter 10 is W"),
        (["mutant,mutated_sequence", "K2A,MATAYIAKQ"], "column mutated_sequence: 9 residues, but the prot"),
        (
            ["mutated_sequence", "MATAYIAKQRR"],
            "column mutated_sequence: 11 residues, but the protein has 10",
        ),
        (["mutated_sequence", "MBTAYIAKQR"], "column mutated_sequence: residue 2: B is not one of the 20"),
        (["mutated_sequence", "M?TAYIAKQR"], r"column mutated_sequence: '\?' at position 2 is not in"),
        (["mutated_sequence", "AKTAYIAKQR", "AKTAYIAKQR"], "row 3, column mutated_sequence: row 2 is the sa"),
        (
            ["id,mutant", "P9,K2A"],
            "row 2, column id: 'P9' is not a record of .* file, whose first is 'P1'",
        ),
        (["mutant"], "no rows below the header"),
        (["variant,score", "K2A,1"], r"no column mutant \(such as A24G .* the header has 'variant', 'score'"),
        ([""], "no column mutant .* the header has nothing"),
        (["mutant,mutant", "K2A,K2A"], "the column 'mutant' appears twice"),
        (["mutant,score", "K2A,1"], "rename the column score, as the output"),
        (["mutant", '"K2A'], "row 2: unexpected end of data"),
    ],
)
def test_faults_name_table_row_and_column(
    table: Path, one: FastaIndex, lines: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(table, one, *lines)
    assert str(caught.value).startswith(f"{table}")


def test_other_faults_of_a_table(table: Path, one: FastaIndex, two: FastaIndex) -> None:
    with pytest.raises(UsageError, match="needs a column sequence_id, id or protein, because"):
        read(table, two, "mutant", "K2A")
    with pytest.raises(UsageError, match="S5A: residue 5 is X, not S"):
        read(table, two, "id,mutant", "P2,S5A")
    with pytest.raises(UsageError, match="no such file"):
        read_mutants(table.with_name("absent.csv"), one)
    table.write_bytes(b"\xff\xfe\x00mutant")
    with pytest.raises(UsageError, match="not UTF-8 text; a table of mutants is CSV or TSV in UTF-8"):
        read_mutants(table, one)


def test_sites_of_a_mutant_fit_into_a_window(table: Path, one: FastaIndex) -> None:
    table.write_text("mutant,mutated_sequence\nA7M,MKTAYIMKQR\nK2A:R10W:A4A,MATAYIAKQW\n")
    assert len(read_mutants(table, one, max_span=9)) == 2
    for lines in (table.read_text(), "mutated_sequence\nMKTAYIMKQR\nMATAYIAKQW\n"):
        table.write_text(lines)
        with pytest.raises(
            UsageError, match=r"row 3, column mut.*: its sites span 9 residues, but a window has 8"
        ):
            read_mutants(table, one, max_span=8)


def test_all_faults_are_counted_and_ten_listed(table: Path, one: FastaIndex) -> None:
    bad = [f"W{number}A" for number in range(1, 10)] + ["K2A", "K2A", "K2", "K2A"]
    with pytest.raises(UsageError) as caught:
        read(table, one, "mutant", *bad)
    assert caught.value.message == f"{table}: 12 rows cannot be used:"
    assert caught.value.details[0] == "row 2, column mutant: W1A: residue 1 is M, not W"
    assert caught.value.details[9] == "row 12, column mutant: row 11 is the same mutant"
    hint = "--offset is the number of the first residue; --skip-bad skips such rows and lists them"
    assert caught.value.details[10:] == ("and 2 more", hint)


def test_bad_rows_are_left_out_and_listed(table: Path, one: FastaIndex) -> None:
    lines = ["mutant,x", "W1A,a", "K2A:M1C,b", "T3A", "K2A:M1C,c", "T3G,d"]
    mutants = read(table, one, *lines, skip_bad=True)
    assert substitutions(mutants) == [[("M", 0, "C"), ("K", 1, "A")], [("T", 2, "G")]]
    assert mutants.problems == (
        TableProblem(2, "mutant", "W1A: residue 1 is M, not W"),
        TableProblem(4, "", "1 cell, but the header has 2"),
        TableProblem(5, "mutant", "row 3 is the same mutant"),
    )
    assert list(mutants.table_rows()) == [["K2A:M1C", "b"], ["T3G", "d"]]
    with pytest.raises(
        UsageError, match=r"row 2, .* W1A: residue 1 is M, not W \(--offset is .*; no row can be used\)"
    ):
        read(table, one, "mutant", "W1A", skip_bad=True)


def test_a_table_that_changed_is_noticed(table: Path, one: FastaIndex) -> None:
    mutants = read(table, one, "mutant", "K2A", "T3A")
    for changed in ("mutant\nK2A\n", "mutant\nK2A\nT3A,1\n", "mutant\nK2A\nT3C\n"):
        table.write_text(changed)
        with pytest.raises(UsageError, match="was changed while its mutants were scored; rerun"):
            list(mutants.table_rows())
    table.unlink()
    with pytest.raises(UsageError, match="was changed while its mutants were scored; rerun"):
        list(mutants.table_rows())


def test_byte_order_mark_and_carriage_returns(table: Path, one: FastaIndex) -> None:
    table.write_bytes("\ufeffmutant,x\r\nK2A,1\r\n".encode())
    mutants = read_mutants(table, one)
    assert mutants.columns == ("mutant", "x") and list(mutants.table_rows()) == [["K2A", "1"]]


def test_duplicates_are_those_of_the_same_mutations(table: Path, one: FastaIndex) -> None:
    """Against a set of sets, on many mutants of few sites."""
    rng = random.Random(0)
    rows = [
        ":".join(
            f"{ONE[site]}{site + 1}{rng.choice('AC')}" for site in rng.sample(range(4), rng.randint(1, 3))
        )
        for _ in range(150)
    ]
    seen: list[frozenset[str]] = []
    for row in rows:
        if frozenset(row.split(":")) not in seen:
            seen.append(frozenset(row.split(":")))
    mutants = read(table, one, "mutant", *rows, skip_bad=True)
    assert [frozenset(cells[0].split(":")) for cells in mutants.table_rows()] == seen
    assert len(seen) + len(mutants.problems) == 150 and len(seen) < 100
