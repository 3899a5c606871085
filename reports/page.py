"""Tables, figures and self-contained HTML pages, shared by all reports."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from esm_packed.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
"""Colors that color-blind readers can tell apart (Okabe and Ito 2008, "Color Universal Design")."""

PICTURES = (".png", ".svg", ".pdf")
"""File name extensions of pictures."""
PICTURE_DPI = 150
_NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

PANEL_WIDTH = 5.6
"""Inches: two panels fit side by side on a screen of 1280 px, and text stays readable on one of 400 px."""

_STYLE = """
*, *::before { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 80rem;
       margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: break-word }
p { max-width: 72rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.85rem; line-height: 1.35;
        font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.45rem; border-bottom: 1px solid #ddd; text-align: right }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th.text, td.text { text-align: left }
td.short { white-space: nowrap } td.long { min-width: 9rem }
td.prose { text-align: left; overflow-wrap: anywhere; min-width: 16rem }
.wide { overflow-x: auto }
.warning, .passed, .FAILED { border-left: 0.4rem solid #D55E00; background: #fdf1e8;
                             padding: 0.6rem 1rem; font-weight: 600 }
.passed, .FAILED { font-size: 1.25rem }
.passed { border-color: #009E73; background: #e8f6f1 }
.badge { display: inline-block; padding: 0 0.5rem; border-radius: 0.6rem; font-weight: 600;
         white-space: nowrap; color: #fff; background: #5f6368 }
.badge-passed { background: #00704f } .badge-FAILED { background: #b34a00 }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
.panels img { flex: 0 1 38rem; min-width: min(100%, 28rem) }
img { max-width: 100%; height: auto }
summary { cursor: pointer; font-weight: 600 }
"""

_PROSE_CHARACTERS = 60
"""Cells longer than this are left-aligned text of several lines."""
_SHORT_CHARACTERS = 14
"""Text up to this length stays on one line, longer text has room for several words."""


def figure_files(directory: Path) -> list[Path]:
    """Figures in `directory`, which a report written there may replace."""
    return sorted(path for path in directory.glob("*") if path.suffix in (".png", ".svg"))


class ReportError(UserError, ValueError):
    """A user's mistake or a missing package; `str(error)` is the full message for the terminal."""


class Badge(str):
    """A table cell shown as a badge: `passed`, `FAILED` or `not run`."""

    def html(self) -> str:
        """As an HTML element, colored where it is a verdict."""
        return f'<span class="badge badge-{self.replace(" ", "-")}">{html.escape(self)}</span>'


@dataclass(frozen=True)
class Table:
    """A table of formatted cells.

    Args:
        headers: one per column, with the unit.
        rows: cells of each row; an empty string where a value is missing.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """As an HTML table that scrolls sideways where it is too wide; numeric columns are right-aligned."""
        kinds = [
            "" if _is_numeric(row[index] for row in self.rows) else "text"
            for index in range(len(self.headers))
        ]

        def line(tag: str, cells: Sequence[str]) -> str:
            return (
                f"<tr>{''.join(_cell(tag, kind, cell) for kind, cell in zip(kinds, cells, strict=True))}</tr>"
            )

        body = "\n".join(line("td", row) for row in self.rows)
        return f'<div class="wide"><table>\n{line("th", self.headers)}\n{body}\n</table></div>'

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
        )

    def csv(self) -> str:
        """As comma-separated values with a line of headers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.headers)
        writer.writerows(self.rows)
        return text.getvalue()


def _cell(tag: str, kind: str, cell: str) -> str:
    names = ["prose"] if len(cell) > _PROSE_CHARACTERS else [kind] if kind else []
    if tag == "td" and kind and len(cell) <= _PROSE_CHARACTERS:
        names.append("short" if len(cell) <= _SHORT_CHARACTERS else "long")
    text = html.escape(cell)
    if tag == "td" and not kind:
        # a number and its unit stay on one line; a range in parentheses may follow on the next
        text = text.replace(" ", "&nbsp;").replace("&nbsp;(", " (")
    attribute = f' class="{" ".join(names)}"' if names else ""
    return f"<{tag}{attribute}>{cell.html() if isinstance(cell, Badge) else text}</{tag}>"


def _is_numeric(cells: Iterator[str]) -> bool:
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(cell.lstrip("-+<").startswith(tuple("0123456789")) for cell in filled)


@dataclass(frozen=True)
class Notice:
    """A highlighted sentence.

    Args:
        text: plain text.
        kind: `warning`, or a verdict, `passed` or `FAILED`.
    """

    text: str
    kind: str = "warning"


@dataclass(frozen=True)
class Drawing:
    """A figure of one or several panels, drawn when the page is written.

    Panels stand side by side where there is room, and are stacked on a narrow screen.

    Args:
        name: of its files, without a suffix; `NAME-2` and so on for further panels.
        caption: alternative text.
        draw: makes the panels, `PANEL_WIDTH` wide.
    """

    name: str
    caption: str
    draw: Callable[[], Sequence[Figure]]


@dataclass(frozen=True)
class Folded:
    """Parts that a reader has to unfold.

    Args:
        summary: what they are, in plain text.
        parts: as in a `Section`.
    """

    summary: str
    parts: Sequence[Part]


Part = str | Notice | Table | Drawing | Folded


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: heading; empty at the top of the page.
        parts: contents; a string is a paragraph of plain text, an empty one is left out.
    """

    title: str
    parts: Sequence[Part]


def write_page(title: str, sections: Iterable[Section], directory: Path, name: str) -> Path:
    """Write a page as a self-contained `name.html`, and as `name.md` with its figures in the same directory.

    Args:
        title: plain text.
        sections: from top to bottom.
        directory: an existing directory; files of these names in it are replaced.
        name: of the files.

    Returns:
        The HTML file.

    Raises:
        OSError: a file cannot be written.
    """
    body, markdown = [], [f"# {title}"]
    with figure_style():
        for section in sections:
            if section.title:
                body.append(f"<h2>{html.escape(section.title)}</h2>")
                markdown.append(f"## {section.title}")
            for as_html, as_markdown in _rendered(section.parts, directory):
                body.append(as_html)
                markdown.append(as_markdown)
    page = directory / f"{name}.html"
    page.write_text(page_html(title, "\n".join(body)), encoding="utf-8")
    (directory / f"{name}.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    return page


def _rendered(parts: Sequence[Part], directory: Path) -> Iterator[tuple[str, str]]:
    """Each part that is not empty, as HTML and as Markdown."""
    for part in parts:
        if isinstance(part, Table):
            yield part.html(), part.markdown()
        elif isinstance(part, Notice):
            yield f'<p class="{part.kind}">{html.escape(part.text)}</p>', f"**{part.text}**"
        elif isinstance(part, Drawing):
            yield _rendered_drawing(part, directory)
        elif isinstance(part, Folded):
            inside = list(_rendered(part.parts, directory))
            summary = f"<summary>{html.escape(part.summary)}</summary>"
            body = "\n".join(as_html for as_html, _ in inside)
            # Markdown is read within the element if a blank line follows, or `markdown` asks for it.
            text = "\n\n".join(as_markdown for _, as_markdown in inside)
            yield (
                f"<details>\n{summary}\n{body}\n</details>",
                f'<details markdown="1">\n{summary}\n\n{text}\n\n</details>',
            )
        elif part:
            yield f"<p>{html.escape(part)}</p>", part


def _rendered_drawing(drawing: Drawing, directory: Path) -> tuple[str, str]:
    images, links = [], []
    caption = html.escape(drawing.caption)
    for number, figure in enumerate(drawing.draw(), 1):
        name = drawing.name if number == 1 else f"{drawing.name}-{number}"
        images.append(f'<img alt="{caption}" src="{_save_figure(figure, directory, name)}">')
        links.append(f"![{drawing.caption}]({name}.png)")
    return f'<div class="panels">{"".join(images)}</div>', "\n\n".join(links)


def page_html(title: str, body: str) -> str:
    """A complete page with a plain-text `title` and an HTML `body`."""
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def check_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError("figures need matplotlib: pip install 'matplotlib>=3.8'") from None


@contextmanager
def figure_style() -> Iterator[None]:
    """Context in which figures are drawn, with the colors and sizes that they share."""
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context(
        {
            "axes.prop_cycle": cycler(color=OKABE_ITO),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "font.size": 10.0,
            "legend.frameon": False,
            "savefig.dpi": PICTURE_DPI,
            "svg.fonttype": "none",
            "svg.hashsalt": "esm-packed",
        }
    ):
        yield


def write_picture(figure: Figure, file: Path | IO[bytes], suffix: str, dpi: float = PICTURE_DPI) -> None:
    """Write a figure, drawn within `figure_style`; the same figure gives the same bytes.

    Args:
        figure: the figure.
        file: path or binary file to write to.
        suffix: the format, one of `PICTURES`.
        dpi: pixels per inch of everything that is not a vector.

    Raises:
        OSError: the file cannot be written.
    """
    figure.savefig(file, format=suffix[1:], dpi=dpi, metadata=_NO_DATE.get(suffix))


def _save_figure(figure: Figure, directory: Path, name: str) -> str:
    """Write `name.png` and `name.svg` into `directory`.

    Returns:
        The `src` of an HTML image, with the SVG in a data URL.
    """
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(directory / f"{name}.{suffix}", bbox_inches="tight", metadata=metadata)
    encoded = base64.b64encode((directory / f"{name}.svg").read_bytes()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
