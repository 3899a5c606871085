"""Heat maps of scans: every score in its place, the wild type marked, white where nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esm_packed.alphabet import AMINO_ACIDS, encode
from esm_packed.reports import scan as scan_module
from esm_packed.reports.page import figure_style
from esm_packed.reports.scan import Scan, draw, write_scan_figure
from esm_packed.scoring import scored_sites

OFFSET = 7


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 12 positions."""
    monkeypatch.setattr(scan_module, "_POSITIONS_IN_A_ROW", 12)
    monkeypatch.setattr(scan_module, "_FEWEST_COLUMNS", 12)


def scan_of(sequence: str) -> Scan:
    token_ids = encode(sequence)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((len(scored_sites(token_ids)), 20)).astype(np.float32)
    return Scan(token_ids, rows, "price: $5 or $6", OFFSET)


@pytest.fixture
def style() -> Iterator[None]:
    with figure_style():
        yield


@pytest.mark.usefixtures("narrow", "style")
@pytest.mark.parametrize("most_lettered", [2000, 5], ids=["shapes", "picture"])
def test_every_score_is_in_its_place(most_lettered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_MOST_LETTERED", most_lettered)
    sequence = "MKTAYXAKQRQISFVKSHFSBR"
    scan = scan_of(sequence)
    scored = [place for place, residue in enumerate(sequence) if residue in AMINO_ACIDS]
    figure = draw(scan)
    *panels, bar = figure.axes
    assert [len(sequence[start : start + 12]) for start in (0, 12)] == [12, 10] and len(panels) == 2
    for panel, start in zip(panels, (0, 12), strict=True):
        shown: Any = (panel.collections[0] if most_lettered == 2000 else panel.images[0]).get_array()
        letters = [label.get_text() for label in panel.get_yticklabels()]
        assert sorted(letters) == sorted(AMINO_ACIDS)
        for place, residue in enumerate(sequence[start : start + 12]):
            column = shown[:, place]
            if residue not in AMINO_ACIDS:
                assert np.ma.getmaskarray(np.ma.masked_invalid(column)).all()
                continue
            row = scan.log_probabilities[scored.index(start + place)]
            for value, letter in zip(column, letters, strict=True):
                expected = row[AMINO_ACIDS.index(letter)] - row[AMINO_ACIDS.index(residue)]
                assert value == pytest.approx(expected, abs=1e-6)
        dots: Any = panel.collections[-1].get_offsets()
        marked = {(int(x), letters[int(y)]) for x, y in dots}
        assert marked == {
            (place, residue)
            for place, residue in enumerate(sequence[start : start + 12])
            if residue in AMINO_ACIDS
        }
        top_letter_is_first = panel.transData.transform((0, 0))[1] > panel.transData.transform((0, 19))[1]
        assert top_letter_is_first
        texts = [text.get_text() for text in panel.texts]
        assert ("X" in texts) == (most_lettered == 2000 and start == 0)
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["7", "10"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["19"]
    assert bar.get_ylim()[0] == -bar.get_ylim()[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wild type", "not scored"]
    assert figure.texts[0].get_text() == r"price: \$5 or \$6"  # no formula


@pytest.mark.usefixtures("style")
def test_colors_are_not_spoiled_by_an_extreme_and_zero_is_white() -> None:
    scan = scan_of("MKTAYIAKQRQISFVKSHFS")
    scan.log_probabilities[3, 7] = -1000
    figure = draw(scan)
    mesh: Any = figure.axes[0].collections[0]
    low, high = mesh.norm.vmin, mesh.norm.vmax
    assert low == -high and 1 < high < 10
    assert min(mesh.cmap(mesh.norm(0.0))[:3]) > 0.95
    red, _, blue, _ = mesh.cmap(mesh.norm(low))
    assert red > blue


def test_pictures_of_the_shortest_proteins(tmp_path: Path) -> None:
    path = tmp_path / "unfinished.1234"
    for sequence, suffix, start in (
        ("M", ".png", b"\x89PNG"),
        ("X", ".svg", b"<?xml"),
        ("M", ".pdf", b"%PDF"),
    ):
        write_scan_figure(scan_of(sequence), path, suffix)
        assert path.read_bytes().startswith(start)
        assert b"Date" not in path.read_bytes()
