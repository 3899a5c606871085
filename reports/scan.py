"""Heat map of a deep mutational scan: each residue of a protein replaced by each of the 20 amino acids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from esm_packed.alphabet import AMINO_ACID_IDS, AMINO_ACIDS, TOKENS
from esm_packed.reports.page import figure_style, write_picture
from esm_packed.scoring import LogProbabilities, TokenIds, scored_sites

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

GROUPS = {
    "aromatic": "WYF",
    "aliphatic": "MILVA",
    "special": "GPC",
    "polar": "STNQ",
    "positive": "HKR",
    "negative": "DE",
}
"""Amino acids by property, from top to bottom."""

_ORDER = "".join(GROUPS.values())
_POSITIONS_IN_A_ROW = 100
_FEWEST_COLUMNS = 40
"""Columns of the smallest figure, with room for the title."""
_TICK_EVERY = 10
_LIMIT_QUANTILE = 0.99
"""Quantile of score magnitudes at which the colors saturate, so that outliers do not make the rest pale."""
_MOST_LETTERED = 2000
"""Residues up to which letters are shown above the cells, and cells are vectors in an SVG or PDF."""
_DPI, _MOST_PIXELS = 300, 5e7
_NOT_SCORED = "#d0d0d0"

# in inches
_CELL_WIDTH, _CELL_HEIGHT = 0.1, 0.11
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 0.95, 1.0, 0.55, 0.45, 0.55
_BAR_WIDTH, _BAR_GAP = 0.12, 0.15


@dataclass(frozen=True)
class Scan:
    """A scan to draw.

    Args:
        token_ids: (num_residues,) uint8 of the protein.
        log_probabilities: (num_scored, 20) in nats, at its `scoring.scored_sites`.
        title: plain text.
        offset: number of the first residue.
    """

    token_ids: TokenIds
    log_probabilities: LogProbabilities
    title: str
    offset: int = 1

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """(20, num_residues) log p(mutant) - log p(wild type), rows as in `GROUPS`; NaN where not scored."""
        sites = scored_sites(self.token_ids)
        own = self.token_ids[sites].astype(np.int64) - AMINO_ACID_IDS.start
        differences = self.log_probabilities - np.take_along_axis(self.log_probabilities, own[:, None], 1)
        scores = np.full((len(_ORDER), len(self.token_ids)), np.nan)
        scores[:, sites] = differences[:, [AMINO_ACIDS.index(letter) for letter in _ORDER]].T
        return scores


def write_scan_figure(scan: Scan, path: Path, suffix: str) -> None:
    """Write the heat map of a scan to `path` in the format `suffix`, one of `page.PICTURES`.

    Raises:
        OSError: the file cannot be written.
    """
    with figure_style():
        figure = draw(scan)
        width, height = figure.get_size_inches()
        write_picture(figure, path, suffix, min(_DPI, (_MOST_PIXELS / (width * height)) ** 0.5))


def draw(scan: Scan) -> Figure:
    """The heat map, in rows of 100 positions; call it within `page.figure_style`."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    scores = scan.scores
    length = scores.shape[1]
    finite = np.abs(scores[np.isfinite(scores)])
    limit = float(np.quantile(finite, _LIMIT_QUANTILE)) if finite.size else 0.0
    scale = Normalize(-limit or -1.0, limit or 1.0)
    colors = colormaps["RdBu"].with_extremes(bad=_NOT_SCORED)

    columns = min(_POSITIONS_IN_A_ROW, max(length, _FEWEST_COLUMNS))
    starts = range(0, length, _POSITIONS_IN_A_ROW)
    panel_height = len(_ORDER) * _CELL_HEIGHT
    width = _LEFT + columns * _CELL_WIDTH + _RIGHT
    height = _TOP + len(starts) * (panel_height + _BETWEEN) - _BETWEEN + _BOTTOM
    figure = Figure(figsize=(width, height))

    def axes_at(left: float, top: float, wide: float, high: float) -> Axes:
        """Axes placed in inches from the left and top of the figure."""
        place = (left / width, 1 - (top + high) / height, wide / width, high / height)
        return figure.add_axes(place)

    for number, start in enumerate(starts):
        top = _TOP + number * (panel_height + _BETWEEN)
        panel = slice(start, min(start + _POSITIONS_IN_A_ROW, length))
        wide = (panel.stop - start) * _CELL_WIDTH
        axes = axes_at(_LEFT, top, wide, panel_height)
        _draw_panel(axes, scan, panel, scores[:, panel], colors, scale)
    axes.set_xlabel("position", fontsize=9)
    right = _LEFT + min(columns, length) * _CELL_WIDTH
    bar_axes = axes_at(right + _BAR_GAP, _TOP, _BAR_WIDTH, panel_height)
    bar = figure.colorbar(ScalarMappable(scale, colors), cax=bar_axes, extend="both")
    bar.set_label("log p(mutant) − log p(wild type)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.text(_LEFT / width, 1 - 0.18 / height, scan.title.replace("$", r"\$"), fontsize=10, va="center")
    handles = [Line2D([], [], marker="o", linestyle="", color="black", markersize=2.5, label="wild type")]
    if np.isnan(scores).any():
        handles.append(Line2D([], [], marker="s", linestyle="", color=_NOT_SCORED, label="not scored"))
    figure.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=((_LEFT + columns * _CELL_WIDTH) / width, 0),
        ncols=len(handles),
        fontsize=8,
        handletextpad=0,
        columnspacing=1,
    )
    return figure


def _draw_panel(
    axes: Axes, scan: Scan, panel: slice, scores: npt.NDArray[np.float64], colors: Colormap, scale: Any
) -> None:
    """One row of positions."""
    residues = [TOKENS[token_id] for token_id in scan.token_ids[panel].tolist()]
    count, rows = len(residues), len(_ORDER)
    is_lettered = scan.token_ids.size <= _MOST_LETTERED
    if is_lettered:
        edges = (np.arange(size + 1) - 0.5 for size in (count, rows))
        axes.pcolormesh(*edges, np.ma.masked_invalid(scores), cmap=colors, norm=scale)
        axes.invert_yaxis()
    else:
        axes.imshow(scores, cmap=colors, norm=scale, aspect="auto", interpolation="none")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    own = {place: _ORDER.index(letter) for place, letter in enumerate(residues) if letter in _ORDER}
    axes.scatter([*own], [*own.values()], s=5, c="black", linewidths=0)
    axes.set_yticks(range(rows), list(_ORDER), fontsize=6.5, family="monospace")
    axes.tick_params(axis="both", length=0, pad=2)
    _label_groups(axes)
    numbers = np.arange(count) + panel.start + scan.offset
    ticks = [0, *(np.flatnonzero(numbers[3:] % _TICK_EVERY == 0) + 3).tolist()]
    axes.set_xticks(ticks, numbers[ticks].tolist(), fontsize=7)
    for place, residue in enumerate(residues if is_lettered else ()):
        axes.annotate(
            residue if len(residue) == 1 else "?",
            (place, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.5,
            family="monospace",
        )


def _label_groups(axes: Axes) -> None:
    """Label the groups of amino acids and draw lines between them."""
    first = 0
    for name, letters in GROUPS.items():
        middle = first + (len(letters) - 1) / 2
        axes.annotate(
            name,
            (0, middle),
            (-14, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=6.5,
            color="#555555",
        )
        if first:
            axes.axhline(first - 0.5, color="white", linewidth=1.2)
        first += len(letters)
