"""`esm-packed contacts`: the map of one protein, as a picture and as numbers."""

from __future__ import annotations

import csv
from pathlib import Path
from xml.etree import ElementTree

import fair_esm_reference
import numpy as np
import pytest
import torch

from esm_packed import ESM2
from esm_packed.reports.contact_map import SEPARATION, ContactMap, draw
from esm_packed.reports.page import figure_style
from esm_packed.runners.cli.main import main

SEQUENCES = {"sp|P69905|HBA": "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERM", "P2$": "MKTAYIAKQR", "short": "MK"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "esm2_contacts.pt"
    return fair_esm_reference.write_checkpoint(path, num_layers=2, num_heads=3, head_dim=16)


@pytest.fixture
def fasta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("in.fasta")
    path.write_text("".join(f">{name} text\n{sequence}\n" for name, sequence in SEQUENCES.items()))
    return path


def contacts(checkpoint: Path, output: str, *options: str) -> int:
    arguments = ["contacts", "in.fasta", "-o", output, "--model", str(checkpoint), "--device", "cpu"]
    return main([*arguments, "--threads", "1", *options])


def test_numbers_are_those_of_fair_esm(checkpoint: Path, fasta: Path) -> None:
    sequence = SEQUENCES["sp|P69905|HBA"]
    fair = fair_esm_reference.load(checkpoint, torch.float64)
    with fair_esm_reference.faithful(torch.float64):
        tokens = torch.tensor([[0, *fair_esm_reference.ALPHABET.encode(sequence), 2]])
        truth = fair.predict_contacts(tokens)[0].numpy()
    assert contacts(checkpoint, "out.npy", "--record", "P69905") == 0
    matrix = np.load("out.npy")
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, truth, atol=1e-5)

    assert contacts(checkpoint, "out.csv", "--record", "sp|P69905|HBA", "--dtype", "fp64") == 0
    with Path("out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(sequence) * (len(sequence) - 1) // 2
    for row in rows:
        i, j = int(row["i"]), int(row["j"])
        assert (row["residue_i"], row["residue_j"]) == (sequence[i - 1], sequence[j - 1])
        assert float(row["probability"]) == pytest.approx(truth[i - 1, j - 1], rel=1e-5)
    assert [(row["i"], row["j"]) for row in rows[:2]] == [("1", "2"), ("1", "3")]


def test_an_exact_id_wins_and_an_accession_of_several_proteins_is_refused(
    checkpoint: Path, fasta: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta.write_text(">sp|P69905|A\nMKTAY\n>tr|P69905|B\nMKTAYIAK\n")
    assert contacts(checkpoint, "out.npy", "--record", "P69905") == 2
    assert "choose one of 'sp|P69905|A', 'tr|P69905|B'" in capsys.readouterr().err
    fasta.write_text(">sp|P69905|A\nMKTAY\n>P69905\nMKTAYIAK\n")
    assert contacts(checkpoint, "out.npy", "--record", "P69905") == 0
    assert np.load("out.npy").shape == (8, 8)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures(checkpoint: Path, fasta: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    assert contacts(checkpoint, f"one.{suffix}", "--record", "P2$") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"one.{suffix}: contacts of P2$, 10 residues, by esm2_contacts in fp32 on cpu")
    assert said[1].startswith(f"the 10 most probable with |i - j| >= {SEPARATION}: 0.")
    content = Path(f"one.{suffix}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        assert contacts(checkpoint, "two.svg", "--record", "P2$") == 0
        assert Path("two.svg").read_bytes() == content, "pictures differ from time to time"
        texts = [text.text for text in ElementTree.parse("one.svg").iter("{http://www.w3.org/2000/svg}text")]
        assert {"P2$, 10 residues", "residue", "contact probability"} <= set(texts)


def test_what_is_drawn() -> None:
    """Probabilities above the diagonal on a scale from 0 to 1, and the most probable contacts below it."""
    length = 9
    probabilities = np.random.default_rng(0).uniform(0, 0.5, (length, length))
    probabilities[1, 8] = 0.9
    probabilities[0, 1] = 0.99  # neighbors
    probabilities = np.triu(probabilities) + np.triu(probabilities, 1).T
    drawn = ContactMap(probabilities, "title")
    pairs = drawn.most_probable()
    assert len(pairs) == 6  # all that are 6 apart are fewer than 9
    assert tuple(pairs[0]) == (1, 8)
    values = probabilities[tuple(pairs.T)]
    assert (np.diff(values) <= 0).all()
    with figure_style():
        axes = draw(drawn).axes[0]
    (image,) = axes.images
    assert image.get_clim() == (0, 1)
    shown = image.get_array()
    assert shown is not None
    upper = np.triu_indices(length, 1)
    np.testing.assert_allclose(np.ma.getdata(shown)[upper], probabilities[upper], rtol=1e-6)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.tri(length, dtype=bool))
    assert list(image.get_extent()) == [0.5, 9.5, 9.5, 0.5]
    marked = np.asarray(axes.collections[0].get_offsets())
    assert {tuple(place) for place in marked.tolist()} == {(i + 1, j + 1) for i, j in pairs.tolist()}


def test_a_protein_too_short_for_contacts(
    checkpoint: Path, fasta: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert contacts(checkpoint, "short.npy", "--record", "short") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    with figure_style():
        marked = draw(ContactMap(np.load("short.npy"), "short")).axes[0].collections[0].get_offsets()
    assert not np.asarray(marked).size


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("x.png", (), "several proteins ('sp|P69905|HBA', 'P2$', 'short'); choose one with --record ID"),
        ("x.png", ("--record", "P7"), "--record P7: in.fasta has no such protein; it has 'sp|P69905|HBA', "),
        ("x.jpg", (), "x.jpg: unknown file type; use OUT.png, OUT.svg, OUT.pdf, OUT.csv, OUT.npy"),
        ("in.csv", (), "in.csv: already exists; use --overwrite to replace it"),
        ("no/x.npy", (), "no: no such directory"),
        ("x.npy", ("--dtype", "tf32"), "tf32"),
    ],
)
def test_mistakes(
    checkpoint: Path,
    fasta: Path,
    capsys: pytest.CaptureFixture[str],
    output: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    Path("in.csv").write_text("precious")
    options = options if "--record" in options or not options else (*options, "--record", "short")
    assert contacts(checkpoint, output, *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert Path("in.csv").read_text() == "precious"
    assert sorted(path.name for path in Path().iterdir()) == ["in.csv", "in.fasta"]


def test_what_is_not_finite_is_no_picture(
    checkpoint: Path, fasta: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ESM2, "predict_contacts", lambda self, sequence: np.full((10, 10), np.nan))
    assert contacts(checkpoint, "x.png", "--record", "P2$") == 2
    assert "'P2$': its contacts are not finite" in capsys.readouterr().err
    assert not Path("x.png").exists()
