"""`esm-packed score`: tables equal to the Python interface, whatever interrupts the run."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nursery import Nursery, names_in, shards_of, wait_until
from proteins import random_proteins, write_fasta

from esm_packed import ESM2
from esm_packed.alphabet import AMINO_ACIDS, encode
from esm_packed.files import sha256_of
from esm_packed.packing import PackedBatch
from esm_packed.runners import score_output
from esm_packed.runners.cli import main as cli
from esm_packed.runners.output.scores import read_scan
from esm_packed.runners.state import cut

NAN = float("nan")
PROTEINS = {
    "a": "MKTAYIAKQRQISFVKSHF",
    "b": "MKXAC",
    "copy": "MKTAYIAKQRQISFVKSHF",
    "none": "XX",
    "c": "MKRIL",
}
MUTANTS = [
    ("a", "M1A"),
    ("c", "K2R:R3S:L5A"),
    ("copy", "T3A"),
    ("a", "T3A:K2R"),
    ("b", "A4C"),
    ("a", "S17A:M1A"),
]


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2.from_pretrained("demo", device="cpu")


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items()))
    return path


def score(fasta: Path, output: Path, *options: str) -> int:
    arguments = ["score", str(fasta), "-o", str(output), "--model", "demo", "--device", "cpu", "--quiet"]
    return cli.main([*arguments, *options])


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def scores_in(table: Path) -> list[float]:
    return [float(row["score"]) for row in rows_of(table)]


def write_mutants(path: Path) -> Path:
    path.write_text("id,mutant\n" + "".join(f"{protein},{mutant}\n" for protein, mutant in MUTANTS))
    return path


@pytest.mark.parametrize(
    "options", [("--method", "masked"), ("--method", "wild-type"), ("--window", "4")], ids=" ".join
)
def test_a_scan_has_every_substitution_of_every_protein(
    fasta: Path, tmp_path: Path, model: ESM2, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cut.FLOPS_PER_SHARD, "cpu", 1.0)  # a shard for each copy of a protein
    output = tmp_path / "scan.csv"
    assert score(fasta, output, *options, "--offset", "101") == 0
    arguments: dict[str, Any] = {
        options[0].lstrip("-"): int(options[1]) if options[1].isdigit() else options[1]
    }
    expected = []
    for name, sequence in PROTEINS.items():
        (rows,) = model.log_probabilities([sequence], **arguments)
        for site, own in enumerate(sequence):
            if own in AMINO_ACIDS:
                wild_type = rows[site][AMINO_ACIDS.index(own)]
                expected += [
                    (name, site + 101, own, mutant, rows[site][column] - wild_type, rows[site][column])
                    for column, mutant in enumerate(AMINO_ACIDS)
                    if mutant != own
                ]
    found = rows_of(output)
    assert len(found) == len(expected)
    for row, (name, position, own, mutant, effect, log_prob) in zip(found, expected, strict=True):
        assert list(row.values())[:4] == [name, str(position), own, mutant]
        assert float(row["score"]) == pytest.approx(effect, rel=1e-5, abs=2e-5)
        assert float(row["log_prob"]) == pytest.approx(log_prob, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [(), ("--joint",), ("--method", "wild-type"), ("--window", "18")],
    ids=lambda each: " ".join(each),
)
def test_mutants_of_a_table(fasta: Path, tmp_path: Path, model: ESM2, options: tuple[str, ...]) -> None:
    output, table = tmp_path / "scores.csv", write_mutants(tmp_path / "mutants.csv")
    assert score(fasta, output, "--mutations", str(table), *options) == 0
    arguments: dict[str, Any] = {
        "joint": "--joint" in options,
        "method": "wild-type" if "wild-type" in options else "masked",
        "window": 18 if "--window" in options else 1022,
    }
    expected = [float(model.score(PROTEINS[name], [mutant], **arguments)[0]) for name, mutant in MUTANTS]
    assert scores_in(output) == pytest.approx(expected, abs=1e-5)
    assert [(row["id"], row["mutant"]) for row in rows_of(output)] == MUTANTS


def test_a_table_of_mutants_must_stay_as_it_is(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are read once more when all is computed."""
    output, table = tmp_path / "scores.csv", write_mutants(tmp_path / "mutants.csv")
    original = ESM2.embed_packed

    def changing(self: ESM2, *call: Any) -> dict[str, torch.Tensor]:
        table.write_text(table.read_text().replace("A4C", "A4D"))
        return original(self, *call)

    monkeypatch.setattr(ESM2, "embed_packed", changing)
    assert score(fasta, output, "--mutations", str(table)) == 2
    assert "mutants.csv: was changed while its mutants were scored" in capsys.readouterr().err
    assert not output.exists()


def test_only_the_sites_of_mutants_are_computed(fasta: Path, tmp_path: Path) -> None:
    output, table = tmp_path / "scores.csv", write_mutants(tmp_path / "mutants.csv")
    assert score(fasta, output, "--mutations", str(table)) == 0
    described = json.loads((tmp_path / "scores.csv.json").read_text())
    assert described["num_queries"] == 4 + 1 + 3  # sites of a, its copy and the mutants together; b; c
    assert described["num_rows"] == len(MUTANTS)


def test_pseudo_perplexities(fasta: Path, tmp_path: Path, model: ESM2) -> None:
    output = tmp_path / "proteins.csv"
    assert score(fasta, output, "--pseudo-perplexity") == 0
    expected = model.pseudo_log_likelihood(list(PROTEINS.values()))
    for row, name, truth in zip(rows_of(output), PROTEINS, expected, strict=True):
        assert (row["id"], int(row["length"])) == (name, len(PROTEINS[name]))
        assert int(row["scored_residues"]) == truth.num_scored
        assert float(row["pseudo_log_likelihood"]) == pytest.approx(truth.sum, abs=1e-4)
        if truth.num_scored:
            assert float(row["pseudo_perplexity"]) == pytest.approx(truth.perplexity, rel=1e-4)
        else:
            assert row["pseudo_perplexity"] == ""


def test_one_protein_is_killed_continued_and_spread_over_slices(nursery: Nursery, tmp_path: Path) -> None:
    (protein,) = random_proteins([40])
    fasta = write_fasta(tmp_path / "in.fasta", [protein])
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert score(fasta, whole) == 0

    slow = "original = ESM2.embed_packed\n"
    slow += (
        "def slowly(*call):\n    time.sleep(0.05)\n    return original(*call)\nESM2.embed_packed = slowly\n"
    )
    child = nursery.start(fasta, output, command="score", patch=slow)
    wait_until(lambda: len(shards_of(output)) >= 5)
    assert child.kill() == -signal.SIGKILL
    before = shards_of(output)
    assert not output.exists()

    for part in ("0/2", "1/2"):
        child = nursery.start(fasta, output, "--slice", part, "--keep-run", command="score")
        assert child.wait() == 0, child.output()
    assert before.items() <= shards_of(output).items(), "a finished shard was computed again"
    assert len(shards_of(output)) == 40
    np.testing.assert_allclose(scores_in(output), scores_in(whole), rtol=0, atol=1e-5)
    child = nursery.start(fasta, output, command="score")
    assert child.wait() == 0, child.output()
    assert "already complete" in child.output()
    assert names_in(tmp_path) == ["in.fasta", "out.csv", "out.csv.json", "whole.csv", "whole.csv.json"]


def test_what_is_damaged_in_a_run_is_made_again(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cut.FLOPS_PER_SHARD, "cpu", 1.0)
    output, run = tmp_path / "out.csv", tmp_path / "out.csv.run"
    assert score(fasta, output, "--keep-run") == 0
    expected = output.read_bytes()
    for damaged in ("queries.npz", "shards/00003.shard"):
        output.unlink()
        content = bytearray((run / damaged).read_bytes())
        content[len(content) // 3] ^= 1
        (run / damaged).write_bytes(content)
        assert score(fasta, output, "--keep-run") == 0
        assert output.read_bytes() == expected


def test_a_table_that_is_there_is_kept(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("mine\n")
    assert score(fasta, output) == 2
    assert (
        "is not the table that out.csv.json describes; use --overwrite to replace it"
        in capsys.readouterr().err
    )
    output.unlink()
    assert score(fasta, output) == 0
    made = output.stat()
    assert score(fasta, output) == 0
    assert output.stat().st_mtime_ns == made.st_mtime_ns
    assert score(fasta, output, "--method", "wild-type") == 2
    assert "already exists, made from other input or options (method was" in capsys.readouterr().err
    with output.open("a") as file:
        file.write("a,1,M,W,0,0\n")
    assert score(fasta, output) == 2
    assert "is not the table that" in capsys.readouterr().err
    assert score(fasta, output, "--overwrite") == 0
    assert cli.main(["status", str(output)]) == 0
    assert f"complete, {len(rows_of(output))} rows" in capsys.readouterr().out
    assert score(fasta, output, "--overwrite", "--keep-run") == 0
    assert cli.main(["status", str(output)]) == 0
    kept = f"{output}: complete, {len(rows_of(output))} rows; {output}.run is kept\n"
    assert capsys.readouterr().out.endswith(kept)


def test_status_of_a_table_without_its_description_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.csv").write_text("id,score\n")
    assert cli.main(["status", str(tmp_path / "out.csv")]) == 2
    assert "out.csv: out.csv.json, which describes this table, is missing" in capsys.readouterr().err


def test_a_table_that_comes_to_exist_meanwhile_keeps_its_description(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, original = tmp_path / "out.csv", ESM2.embed_packed
    theirs = {output: "another's", tmp_path / "out.csv.json": "another's, too"}

    def overtaken(self: ESM2, *call: Any) -> dict[str, torch.Tensor]:
        for path, text in theirs.items():
            path.write_text(text)
        return original(self, *call)

    monkeypatch.setattr(ESM2, "embed_packed", overtaken)
    assert score(fasta, output) == 2
    assert "out.csv: already exists; use --overwrite to replace it" in capsys.readouterr().err
    assert {path: path.read_text() for path in theirs} == theirs


def test_an_existing_table_is_hashed_once(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, hashed = tmp_path / "out.csv", list[Path]()
    assert score(fasta, output, "--method", "wild-type") == 0

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(score_output, "sha256_of", counted)
    assert score(fasta, output, "--method", "wild-type") == 0
    assert hashed == [output]


def test_what_reading_changed_is_said_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta, output = tmp_path / "in.fasta", tmp_path / "out.csv"
    fasta.write_text(">a\nMKT\n>b\nMJK\n>a\nMKW\n>copy\nMKT\n")
    arguments = ["score", str(fasta), "-o", str(output), "--model", "demo", "--device", "cpu"]
    assert cli.main([*arguments, "--invalid", "skip", "--duplicates", "rename", "--verbose"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "left out           1 record, listed in out.csv.json" in said
    assert "duplicates         1 record with the ID of an earlier record" in said
    assert "identical          1 sequence with the rows of an equal one" in said
    for name in ("output", "scores", "attention", "packs", "packing efficiency", "stages"):
        assert any(line.startswith(f"{name:<19}") for line in said)
    described = json.loads((tmp_path / "out.csv.json").read_text())
    assert described["records_left_out"] == [f"{fasta}, line 4, record 'b': 'J' is not in ESM-2's alphabet"]
    assert cli.main([*arguments, "--invalid", "x", "--duplicates", "first", "--overwrite"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "replaced   1 residue outside the alphabet, by X" in said
    assert not any(line.startswith("packs") for line in said)


def test_rows_that_are_skipped_are_counted_and_listed(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, table = tmp_path / "out.csv", tmp_path / "mutants.csv"
    table.write_text("id,mutant\na,A1M\na,M1A\nz,M1A\n")
    options = ["--model", "demo", "--device", "cpu", "--mutations", str(table), "--skip-bad"]
    assert cli.main(["score", str(fasta), "-o", str(output), *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "computed   1 copy of proteins" in said
    assert "skipped    2 rows of the table, listed in out.csv.json" in said
    listed = json.loads((tmp_path / "out.csv.json").read_text())["left_out"]
    assert [line.partition(":")[0] for line in listed] == ["row 2, column mutant", "row 4, column id"]


def test_copies_without_a_number_are_named(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = ESM2.embed_packed

    def spoiled(self: ESM2, batch: PackedBatch, *call: Any) -> dict[str, torch.Tensor]:
        found = original(self, batch, *call)
        assert batch.rows is not None
        is_bad = batch.cu_seqlens.diff() == len(PROTEINS["c"]) + 2
        found["log_probabilities"][is_bad[torch.bucketize(batch.rows, batch.cu_seqlens[1:], right=True)]] = (
            NAN
        )
        return {**found, "finite": found["finite"] & ~is_bad}

    monkeypatch.setattr(ESM2, "embed_packed", spoiled)
    output = tmp_path / "out.csv"
    assert score(fasta, output) == 3
    assert "9 copies of proteins not finite" in capsys.readouterr().err
    failed = json.loads((tmp_path / "out.csv.json").read_text())["failed"]
    assert [line.partition(":")[0] for line in failed] == [
        *(f"b, residue {site}" for site in (1, 2, 4, 5)),
        *(f"c, residue {site}" for site in (1, 2, 3, 4, 5)),
    ]
    for row in rows_of(output):
        assert (row["score"] == "") == (row["id"] in ("b", "c"))


def test_the_heat_map_is_that_of_the_scan(
    tmp_path: Path, model: ESM2, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", [PROTEINS["b"]])
    output, picture = tmp_path / "scan.csv", tmp_path / "scan.svg"
    picture.write_text("mine")
    assert score(fasta, output, "--heat-map", str(picture)) == 2
    assert "scan.svg: already exists; use --overwrite to replace it" in capsys.readouterr().err
    picture.unlink()
    assert score(fasta, output, "--heat-map", str(picture)) == 0
    assert "protein0, 5 residues" in picture.read_text()
    name, first, token_ids, found = read_scan(output)
    assert (name, first, token_ids.tolist()) == ("protein0", 1, encode(PROTEINS["b"]).tolist())
    (expected,) = model.log_probabilities([PROTEINS["b"]])
    np.testing.assert_allclose(found, expected[[0, 1, 3, 4]], atol=1e-5)
    assert score(fasta, output, "--heat-map", str(picture)) == 0  # once more changes nothing


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("id,mutant\na,A1M\n", (), "row 2, column mutant: A1M: residue 1 is M, not A"),
        ("id,mutant\nz,M1A\n", (), "row 2, column id: 'z' is not a record of the FASTA file"),
        (
            "id,mutant\na,M1A:S17A\n",
            ("--joint", "--window", "5"),
            "row 2, column mutant: its sites span 17 residues",
        ),
    ],
)
def test_a_mutant_that_cannot_be_scored_is_named(
    fasta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    table: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "mutants.csv").write_text(table)
    arguments = ("--mutations", str(tmp_path / "mutants.csv"), *options)
    assert score(fasta, tmp_path / "out.csv", *arguments) == 2
    assert message in capsys.readouterr().err
    assert names_in(tmp_path) == ["in.fasta", "mutants.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--joint",), "--joint masks the sites of a mutant together; it needs --mutations"),
        (("--skip-bad",), "--skip-bad skips mutants of a table"),
        (("--pseudo-perplexity", "--method", "wild-type"), "--pseudo-perplexity masks each residue in turn"),
        (("--pseudo-perplexity", "--heat-map", "x.png"), "--heat-map draws a scan"),
        (("--heat-map", "x.png"), "--heat-map draws one protein, but the input has 5"),
        (("--heat-map", "x.jpg"), "--heat-map x.jpg: unknown file type; use .png, .svg, .pdf"),
    ],
)
def test_options_that_do_not_fit(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert score(fasta, tmp_path / "out.csv", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "mutants.csv"),
        ("--log-json", "mutants.csv"),
        ("--heat-map", "in.fasta.png"),
        ("-o", "in.csv"),
        ("--log-json", "out.csv.json"),
    ],
    ids=" ".join,
)
def test_nothing_that_is_read_is_written(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    fasta = fasta.rename(tmp_path / ("in.csv.json" if options[1] == "in.csv" else "in.fasta.png"))
    table = write_mutants(tmp_path / "mutants.csv")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    asked = () if options[0] == "--heat-map" else ("--mutations", str(table))
    assert (
        score(fasta, tmp_path / "out.csv", *asked, "--overwrite", options[0], str(tmp_path / options[1])) == 2
    )
    error = capsys.readouterr().err
    assert "would overwrite" in error or "clashes with" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value"), [("identity", 3), ("plan_hash", "x"), ("sha256", None), ("num_rows", "many")]
)
def test_a_damaged_description_is_none(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: object
) -> None:
    output, description = tmp_path / "out.csv", tmp_path / "out.csv.json"
    assert score(fasta, output, "--method", "wild-type") == 0
    description.write_text(json.dumps({**json.loads(description.read_text()), name: value}))
    assert score(fasta, output, "--method", "wild-type") == 2
    assert "is not the table that out.csv.json describes" in capsys.readouterr().err


def test_mutants_that_are_the_wild_type_are_no_work(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "mutants.csv"
    table.write_text(f"id,mutated_sequence\na,{PROTEINS['a']}\n")
    assert score(fasta, tmp_path / "out.csv", "--mutations", str(table)) == 2
    assert "mutants.csv: each mutant is the wild type" in capsys.readouterr().err


def test_the_cost_is_said_first(fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(fasta, tmp_path / "out.csv", "--estimate") == 0
    said = capsys.readouterr().out
    residues = 19 * 19 + 4 * 5 + 5 * 5
    assert f"computed            28 copies ({residues} residues)" in said
    assert names_in(tmp_path) == ["in.fasta"]


def test_what_an_interruption_costs_is_a_share_of_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([40]))
    original, packs = ESM2.embed_packed, list[int]()

    def interrupted(self: ESM2, batch: PackedBatch, *call: Any) -> dict[str, torch.Tensor]:
        packs.append(batch.num_sequences)
        if len(packs) == 6:
            raise KeyboardInterrupt
        return original(self, batch, *call)

    monkeypatch.setattr(ESM2, "embed_packed", interrupted)
    options = ("score", str(fasta), "-o", str(tmp_path / "out.csv"), "--model", "demo", "--device", "cpu")
    assert cli.main([*options, "--token-budget", "84"]) == 4
    said = re.search(r"about (\d+) residues \((.+%) of the run\) will be recomputed", capsys.readouterr().err)
    assert said is not None and int(said[1]) > 0  # packs are counted when their results are read
    assert said[2] == f"{int(said[1]) / 1600:.1%}"


def test_merge_names_the_command_that_completes_a_table(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    for options in (["--slice", "0/2"], []):
        assert score(fasta, output, "--method", "wild-type", *options) == 0
        capsys.readouterr()
        assert cli.main(["merge", str(output)]) == 2
        assert "out.csv: a table of esm-packed score; rerun the score command" in capsys.readouterr().err
