"""Tables, figures and self-contained HTML pages, as every report here uses them."""

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
"""Colours that stay apart for colour-blind readers (Okabe and Ito 2008, "Color Universal Design")."""

PICTURES = (".png", ".svg", ".pdf")
"""Names of pictures end in one of these."""
PICTURE_DPI = 150
_NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 100rem;
       margin: 2rem auto; padding: 0 1rem }
p { max-width: 72rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th.text, td.text { text-align: left }
td.prose { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 20rem }
.wide { overflow-x: auto }
.warning { border-left: 0.4rem solid #D55E00; background: #fdf1e8; padding: 0.6rem 1rem; font-weight: 600 }
.passed, .FAILED { border-left: 0.4rem solid #009E73; background: #e8f6f1; padding: 0.6rem 1rem;
                   font-size: 1.25rem; font-weight: 600 }
.FAILED { border-color: #D55E00; background: #fdf1e8 }
img { max-width: min(100%, 72rem); height: auto }
"""

_PROSE_CHARACTERS = 60
"""Cells longer than this are broken into lines."""


def figure_files(folder: Path) -> list[Path]:
    """The figures that are in `folder`, which a report there may replace."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".png", ".svg"))


class ReportError(UserError, ValueError):
    """The user's mistake, or a package that is missing; `str(error)` is the full message for the terminal."""


@dataclass(frozen=True)
class Table:
    """A table of ready-made cells.

    Args:
        headers: one for each column, with the unit.
        rows: cells of each row; a value that is missing is an empty string.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """As an HTML table; columns that hold numbers are aligned to the right."""
        kinds = [
            "" if _is_numeric(row[index] for row in self.rows) else "text"
            for index in range(len(self.headers))
        ]

        def line(tag: str, cells: Sequence[str]) -> str:
            filled = []
            for kind, cell in zip(kinds, cells, strict=True):
                name = "prose" if len(cell) > _PROSE_CHARACTERS else kind
                attribute = f' class="{name}"' if name else ""
                filled.append(f"<{tag}{attribute}>{html.escape(cell)}</{tag}>")
            return f"<tr>{''.join(filled)}</tr>"

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


def _is_numeric(cells: Iterator[str]) -> bool:
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(cell.lstrip("-+<").startswith(tuple("0123456789")) for cell in filled)


@dataclass(frozen=True)
class Notice:
    """A sentence that nobody overlooks.

    Args:
        text: plain text.
        kind: `warning`, or a verdict, `passed` or `FAILED`.
    """

    text: str
    kind: str = "warning"


@dataclass(frozen=True)
class Drawing:
    """A figure, drawn when the page is written.

    Args:
        name: of its files, without a suffix.
        caption: what it shows, for those who cannot see it.
        draw: makes it.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: heading; empty for what stands above all headings.
        parts: what is below it; a string is a paragraph of plain text, an empty one is left out.
    """

    title: str
    parts: Sequence[str | Notice | Table | Drawing]


def write_page(title: str, sections: Iterable[Section], folder: Path, name: str) -> Path:
    """Write a page as `name.html`, which needs no other file, and as `name.md` with its figures beside it.

    Args:
        title: plain text.
        sections: from top to bottom.
        folder: exists; files of these names in it are replaced.
        name: of the files.

    Returns:
        The HTML file.

    Raises:
        OSError: the folder cannot be written to.
    """
    body, markdown = [], [f"# {title}"]
    with figure_style():
        for section in sections:
            if section.title:
                body.append(f"<h2>{html.escape(section.title)}</h2>")
                markdown.append(f"## {section.title}")
            for part in (part for part in section.parts if part):
                as_html, as_markdown = _rendered(part, folder)
                body.append(as_html)
                markdown.append(as_markdown)
    page = folder / f"{name}.html"
    page.write_text(page_html(title, "\n".join(body)), encoding="utf-8")
    (folder / f"{name}.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    return page


def _rendered(part: str | Notice | Table | Drawing, folder: Path) -> tuple[str, str]:
    """As HTML and as Markdown."""
    if isinstance(part, Table):
        return part.html(), part.markdown()
    if isinstance(part, Notice):
        return f'<p class="{part.kind}">{html.escape(part.text)}</p>', f"**{part.text}**"
    if isinstance(part, Drawing):
        source = _save_figure(part.draw(), folder, part.name)
        caption = html.escape(part.caption)
        return f'<p><img alt="{caption}" src="{source}"></p>', f"![{part.caption}]({part.name}.png)"
    return f"<p>{html.escape(part)}</p>", part


def page_html(title: str, body: str) -> str:
    """A whole page of a plain-text `title` and an HTML `body`."""
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def check_matplotlib() -> None:
    """See that figures can be drawn.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError("figures need matplotlib: pip install 'matplotlib>=3.8'") from None


@contextmanager
def figure_style() -> Iterator[None]:
    """Colours and sizes that all figures drawn within share."""
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
        figure: what is written.
        file: where to.
        suffix: one of `PICTURES`, which says what is made.
        dpi: pixels in an inch, of what is no vector.

    Raises:
        OSError: the file cannot be written.
    """
    figure.savefig(file, format=suffix[1:], dpi=dpi, metadata=_NO_DATE.get(suffix))


def _save_figure(figure: Figure, directory: Path, name: str) -> str:
    """Write `name.png` and `name.svg` into `directory`.

    Returns:
        The `src` of an HTML image that holds the SVG itself.
    """
    for suffix in ("png", "svg"):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(directory / f"{name}.{suffix}", bbox_inches="tight", metadata=metadata)
    encoded = base64.b64encode((directory / f"{name}.svg").read_bytes()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
