"""Panels, axes and styles that the figures of the speedup report share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from esm_packed.reports.page import OKABE_ITO, PANEL_WIDTH
from esm_packed.reports.speedup.results import DTYPES, Spread

if TYPE_CHECKING:
    from typing import Any

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Style = dict[str, Any]

_BLUE, _ORANGE, _GREEN, _VERMILION, *_ = OKABE_ITO
GRAY = "#999999"
DTYPE_COLORS = dict(zip(DTYPES, (_BLUE, _GREEN, _ORANGE, _VERMILION), strict=True))


def panel(height: float) -> tuple[Figure, Axes]:
    """A figure of `PANEL_WIDTH` and `height` inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def error_bars(values: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Lengths of the lower and upper error bars of (middle, low, high)."""
    return [[middle - low for middle, low, _ in values], [high - middle for middle, _, high in values]]


def style_of(dtype: str, layout: str, *, is_larger: bool = False, is_combined: bool = False) -> Style:
    """A color per precision; hollow: padded; square: in input order; diamond: larger budget; star: packed
    and in another precision."""
    color = DTYPE_COLORS.get(dtype, GRAY)
    face = "white" if layout.startswith("padded") else color
    marker = "*" if is_combined else "D" if is_larger else "s" if layout.endswith("unsorted") else "o"
    return {"marker": marker, "color": color, "markerfacecolor": face, "markersize": 7 if is_combined else 5}


def lanes_height(num_lanes: int, num_series: int) -> float:
    """Inches for `num_lanes` lanes of `num_series` values each."""
    return num_lanes * (0.1 * num_series + 0.15) + 0.9


def offset_in_lane(index: int, count: int) -> float:
    """Position of a series within its lane."""
    return (index - (count - 1) / 2) * 0.8 / count


def lanes(axes: Axes, names: Sequence[str]) -> None:
    """A lane per name, from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for boundary in range(1, len(names)):
        axes.axhline(boundary - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.grid(axis="y", visible=False)


def dots(
    axes: Axes,
    spreads: Sequence[Spread],
    places: Sequence[float],
    style: Style,
    label: str,
) -> None:
    """Horizontal positions with error bars."""
    axes.errorbar(
        [spread.middle for spread in spreads],
        places,
        xerr=error_bars([(spread.middle, *spread.ends) for spread in spreads]),
        linestyle="none",
        elinewidth=1.2,
        capsize=2,
        label=label,
        **style,
    )


def legend_below(figure: Figure) -> None:
    """A legend under the axes, one entry per line."""
    figure.legend(loc="outside lower center", ncols=1, fontsize=9)


def log_axis(axes: Axes, unit: str) -> None:
    """A logarithmic x axis with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 4, 5, 7) if high / low > 2 else ()
    ticks = [step * 10.0**exponent for exponent in range(-7, 7) for step in steps]
    if not steps:
        width = 10.0 ** math.floor(math.log10(high - low))
        width = next(w for w in (width / 5, width / 2, width, 2 * width) if (high - low) / w < 8)
        ticks = [width * count for count in range(math.ceil(low / width), math.floor(high / width) + 1)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}{unit}"))


def amount_text(value: float) -> str:
    """A number with three significant digits where it is large."""
    if value >= 1e5:
        return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value / 1e3:.3g} k"
    return f"{value:,.0f}"
