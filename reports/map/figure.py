"""The figure of a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from esm_packed.reports.map.coloring import NO_VALUE, Categories, Numbers
from esm_packed.reports.page import OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, _, _BLACK = OKABE_ITO
_CATEGORY_COLORS = (_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, "#882255", "#999933", _BLACK)
_OTHERS_COLOR, _NO_VALUE_COLOR = "#8c8c8c", "#d0d0d0"
_WIDTH, _HEIGHT = 6.4, 5.6
"""Inches, without a legend; narrow enough for a phone."""
_LEGEND_LINE = 0.23
"""Inches."""
_TWO_COLUMNS = 24
"""Characters of a label up to which the legend has two columns."""
_LABEL_CHARACTERS = 30
_MOST_VECTORS = 5000
"""Points drawn as vectors in an SVG; more are rasterized."""
_MOST_LABELLED = 40
"""Points up to which IDs are written beside them."""
_SIZES = ((100, 48, 0.9), (1000, 26, 0.8), (10_000, 15, 0.65), (10**12, 4, 0.45))
"""Number of points up to which a size and opacity apply, area in square points, opacity."""


@dataclass(frozen=True)
class Map:
    """A map to draw.

    Args:
        points: (n, 2) coordinates.
        explained: (2,) share of the variance along each axis.
        title: plain text.
        ids: (n,) IDs of the points.
        colors: colors of the points, or None for a single color.
    """

    points: npt.NDArray[np.float64]
    explained: npt.NDArray[np.float64]
    title: str
    ids: Sequence[str]
    colors: Categories | Numbers | None = None


def draw(drawn: Map) -> Figure:
    """The points, with a legend below or a color bar beside them; call it within `page.figure_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes: Axes = figure.subplots()
    if isinstance(drawn.colors, Categories):
        _draw_categories(figure, axes, drawn, drawn.colors)
    elif isinstance(drawn.colors, Numbers):
        _draw_numbers(figure, axes, drawn, drawn.colors)
    else:
        _scatter(axes, drawn, slice(None), c=_BLUE)
    first, second = (
        f"PC {number} ({share:.1%} of the variance)" for number, share in enumerate(drawn.explained, 1)
    )
    axes.set_xlabel(first, fontsize=13)
    axes.set_ylabel(second, fontsize=13)
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(labelsize=11)
    axes.set_title(drawn.title, fontsize=12, loc="left", wrap=True)
    if len(drawn.points) <= _MOST_LABELLED:
        _label(figure, axes, drawn)
    return figure


def _label(figure: Figure, axes: Axes, drawn: Map) -> None:
    """Write IDs beside the points where there is room."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    places = axes.transData.transform(drawn.points)
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for point, sequence_id in zip(drawn.points, drawn.ids, strict=True):
        for x, y, side in ((7, 0, "left"), (-7, 0, "right"), (0, 11, "center"), (0, -11, "center")):
            text = axes.annotate(
                _cut(sequence_id),
                (float(point[0]), float(point[1])),
                (x, y),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=9,
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            if not box.count_overlaps(taken) and axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1):
                taken.append(box)
                break
            text.remove()


def _scatter(axes: Axes, drawn: Map, rows: Any, **style: Any) -> Any:
    """Draw points `rows`, smaller and paler the more points the map has."""
    number = len(drawn.points)
    size, alpha = next(style for most, *style in _SIZES if number <= most)
    x, y = drawn.points[rows].T
    points = axes.scatter(x, y, s=size, alpha=alpha, linewidths=0, rasterized=number > _MOST_VECTORS, **style)
    points.set_in_layout(False)  # always within the axes; computing their extent takes longer than drawing
    return points


def _draw_categories(figure: Figure, axes: Axes, drawn: Map, colors: Categories) -> None:
    from matplotlib.lines import Line2D

    palette = np.array([*_CATEGORY_COLORS[: len(colors.labels)], _NO_VALUE_COLOR])
    if colors.has_others:
        palette = np.array([*_CATEGORY_COLORS, _OTHERS_COLOR, _NO_VALUE_COLOR])
    # gray points first, the others in random order, so that no category covers another
    order = np.random.default_rng(0).permutation(len(drawn.points))
    is_gray = (colors.codes == NO_VALUE) | (colors.has_others & (colors.codes == len(palette) - 2))
    order = order[np.argsort(~is_gray[order], kind="stable")]
    _scatter(axes, drawn, order, c=palette[colors.codes[order]])
    counts = np.bincount(colors.codes + 1, minlength=len(palette))
    entries = [*zip(colors.labels, counts[1:].tolist(), palette, strict=False)]
    if counts[0]:
        entries.append(("no value", int(counts[0]), _NO_VALUE_COLOR))
    handles = [
        Line2D(
            [], [], marker="o", linestyle="", color=color, markersize=8, label=f"{_cut(label)} ({count:,})"
        )
        for label, count, color in entries
    ]
    columns = 2 if max(len(str(handle.get_label())) for handle in handles) <= _TWO_COLUMNS else 1
    figure.set_figheight(_HEIGHT + _LEGEND_LINE * (1 + math.ceil(len(handles) / columns)))
    figure.legend(
        handles=handles,
        title=_cut(colors.name),
        loc="outside lower center",
        ncols=columns,
        fontsize=11,
        title_fontsize=12,
        alignment="left",
        handletextpad=0.2,
    )


def _draw_numbers(figure: Figure, axes: Axes, drawn: Map, colors: Numbers) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    is_blank = np.isnan(colors.values)
    if is_blank.any():
        blank = _scatter(axes, drawn, is_blank, c=_NO_VALUE_COLOR)
        blank.set_label(f"no value ({is_blank.sum():,})")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=11, markerscale=1.5)
    rows = np.random.default_rng(0).permutation(np.flatnonzero(~is_blank))
    scale = Normalize(*np.quantile(colors.values[rows], (0, 1)))
    _scatter(axes, drawn, rows, c=colors.values[rows], cmap="viridis", norm=scale)
    bar = figure.colorbar(
        ScalarMappable(scale, "viridis"), ax=axes, aspect=30
    )  # not of the points, whose colors are paler
    bar.set_label(_cut(colors.name), fontsize=12)
    bar.ax.tick_params(labelsize=11)


def _cut(text: str) -> str:
    text = text.replace("$", r"\$")  # starts a formula
    return text if len(text) <= _LABEL_CHARACTERS else f"{text[: _LABEL_CHARACTERS - 1]}…"
