"""Pages of reports: what every one of them has in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from esm_packed.reports.page import Badge, Drawing, Folded, Notice, Section, Table, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(number: int) -> list[Figure]:
    figure = pytest.importorskip("matplotlib.figure")
    return [figure.Figure((1, 1), dpi=10) for _ in range(number)]


def written(folder: Path, *parts: str | Notice | Table | Drawing | Folded) -> tuple[str, str]:
    pytest.importorskip("matplotlib")
    page = write_page("A < B", [Section("", parts)], folder, "page")
    return page.read_text(), (folder / "page.md").read_text()


def test_a_phone_shows_the_page_at_its_own_width(tmp_path: Path) -> None:
    page, _ = written(tmp_path, "text")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "<title>A &lt; B</title>" in page


def test_wide_tables_scroll_and_verdicts_are_badges(tmp_path: Path) -> None:
    table = Table(("mode", "verdict"), [["fp32", Badge("passed")], ["tf32", Badge("not run")]])
    page, markdown = written(tmp_path, table)
    assert '<div class="wide"><table>' in page
    assert '<span class="badge badge-passed">passed</span>' in page
    assert '<span class="badge badge-not-run">not run</span>' in page
    assert "| tf32 | not run |" in markdown


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    table = Table(("time", "how"), [["1.2 s (1 s to 2 s)", "some words that may be broken"]])
    assert "<td>1.2&nbsp;s (1&nbsp;s&nbsp;to&nbsp;2&nbsp;s)</td>" in table.html()
    assert ">some words that may be broken</td>" in table.html()


def test_panels_are_pictures_of_their_own(tmp_path: Path) -> None:
    page, markdown = written(tmp_path, Drawing("figure", "a <caption>", lambda: panels(3)))
    assert page.count('<img alt="a &lt;caption&gt;" src="data:image/svg+xml;base64,') == 3
    assert page.count('<div class="panels">') == 1
    for name in ("figure", "figure-2", "figure-3"):
        assert (tmp_path / f"{name}.png").is_file() and (tmp_path / f"{name}.svg").is_file()
        assert f"![a <caption>]({name}.png)" in markdown


def test_folded_parts_are_in_a_closed_element(tmp_path: Path) -> None:
    page, markdown = written(tmp_path, Folded("All 2 rows", ["", Table(("a",), [["1"], ["2"]])]), "after")
    inside = page.partition("<details>\n<summary>All 2 rows</summary>\n")[2].partition("\n</details>\n")
    assert "<table>" in inside[0] and "<p>after</p>" in inside[2]
    assert "<summary>All 2 rows</summary>\n\n| a |\n| --- |\n| 1 |\n| 2 |\n\n</details>" in markdown
