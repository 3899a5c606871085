"""The figures of the precision-validation report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esm_packed.reports.page import OKABE_ITO, PANEL_WIDTH
from esm_packed.reports.validation.activations import FP16_MAX, FP16_SMALLEST_NORMAL, RESIDUAL
from esm_packed.reports.validation.errors import finite_max, finite_median
from esm_packed.reports.validation.run import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, _, _BLACK = OKABE_ITO
# Markers and dashes repeat what the colors say.
_MODE_COLORS = {"fp64": _PINK, "fp32": _BLUE, "tf32": _GREEN, "fp16": _ORANGE, "bf16": _VERMILION}
_MODE_MARKERS = {"fp64": "D", "fp32": "o", "tf32": "^", "fp16": "s", "bf16": "v"}
_OPERATION_STYLES = {
    RESIDUAL: (_BLACK, "--"),
    "LayerNorm": (_SKY, "-"),
    "query, key, value": (_BLUE, "-"),
    "attention": (_GREEN, "-"),
    "attention output": (_PINK, "-"),
    "GELU": (_ORANGE, "-"),
    "feed-forward output": (_VERMILION, "-"),
}


def _panel(height: float) -> tuple[Figure, Axes]:
    # without pyplot, which keeps figures and looks for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="x", visible=False)
    return figure, axes


def _positive(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """For a logarithmic axis, with NaN in place of zero; matplotlib skips NaN."""
    array: np.ndarray[Any, np.dtype[np.float64]] = values.numpy()
    return np.where(array > 0, array, np.nan)


def _logarithmic(axes: Axes, axis: str = "y") -> None:
    """Make an axis logarithmic if any line has a positive value along it."""
    values = [
        np.asarray(line.get_xdata() if axis == "x" else line.get_ydata(), dtype=np.float64)
        for line in axes.get_lines()
    ]
    if any((some > 0).any() for some in values):
        axes.set(**{f"{axis}scale": "log"})
    else:
        axes.annotate(
            "no errors that are finite and not zero", (0.5, 0.5), xycoords="axes fraction", ha="center"
        )


def _errors(validation: Validation) -> list[Figure]:
    paths = validation.paths
    figure, axes = _panel(0.46 * len(paths) + 1.1)
    axes.grid(axis="both", visible=True)
    axes.grid(axis="y", visible=False)
    spread = np.random.default_rng(0).uniform(-0.28, 0.28, len(validation.lengths))
    for place, path in enumerate(paths):
        color = _MODE_COLORS[path.mode]
        errors = _positive(path.means.relative_l2)
        marker = _MODE_MARKERS[path.mode]
        axes.plot(errors, place + spread, marker, color=color, markersize=3.5, alpha=0.45, markeredgewidth=0)
        if (median := finite_median(path.means.relative_l2)) is not None and median > 0:
            axes.plot([median, median], [place - 0.33, place + 0.33], color="#000000", linewidth=1.4)
        limit = validation.settings.threshold(path.mode).relative_l2
        axes.plot([limit, limit], [place - 0.45, place + 0.45], color=color, linewidth=1.8, linestyle="--")
        if failed := int((~path.means.relative_l2.isfinite()).sum()):
            axes.annotate(
                f"NaN or Inf: {failed:,}",
                (0.99, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=9,
            )
    _logarithmic(axes, "x")
    axes.set_ylim(len(paths) - 0.45, -0.55)
    axes.set_yticks(range(len(paths)), [f"{path.mode}, {path.path}" for path in paths], fontsize=9)
    axes.set_xlabel("relative L2 error of the mean embedding (log)")
    figure.suptitle("One point per protein; black: median; dashed: threshold", fontsize=10)
    return [figure]


def _layers(validation: Validation) -> list[Figure]:
    panels = [
        _layers_panel(validation, name, title)
        for name, title in (("mean_by_layer", "Mean embeddings"), ("residues_by_layer", "Residues"))
    ]
    if len({axes.get_yscale() for _, axes in panels}) == 1:
        limits = [axes.get_ylim() for _, axes in panels]
        for _, axes in panels:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return [figure for figure, _ in panels]


def _layers_panel(validation: Validation, name: str, title: str) -> tuple[Figure, Axes]:
    figure, axes = _panel(4.4)
    for path in validation.first_paths:
        rows: torch.Tensor = getattr(path, name)
        median = np.array([finite_median(row) or math.nan for row in rows])
        most = np.array([finite_max(row) or math.nan for row in rows])
        color, marker = _MODE_COLORS[path.mode], _MODE_MARKERS[path.mode]
        axes.fill_between(range(len(rows)), median, most, color=color, alpha=0.22, linewidth=0)
        axes.plot(median, color=color, marker=marker, markersize=4, label=f"{path.mode} ({path.path})")
    _logarithmic(axes)
    _finish_layers(figure, axes, title)
    axes.set_ylabel("relative L2 error (log)")
    return figure, axes


def _finish_layers(figure: Figure, axes: Axes, title: str) -> None:
    """An x axis of layers, and a legend below."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)


def _lengths(validation: Validation) -> list[Figure]:
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = _panel(4.4)
    for path in validation.first_paths:
        axes.plot(
            validation.lengths,
            _positive(path.means.relative_l2),
            _MODE_MARKERS[path.mode],
            color=_MODE_COLORS[path.mode],
            markersize=4,
            alpha=0.6,
            markeredgewidth=0,
            label=f"{path.mode} ({path.path})",
        )
    axes.set_xscale("log")
    _logarithmic(axes)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("residues (log)")
    axes.set_ylabel("relative L2 error of the mean embedding (log)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return [figure]


def _activations(validation: Validation) -> list[Figure]:
    activations = validation.activations
    (first, largest), (second, small) = _panel(4.6), _panel(4.6)
    for operation, (color, dashes) in _OPERATION_STYLES.items():
        layers = list(activations.layers_of(operation))
        heights = [activations.max_abs(operation, layer) or math.nan for layer in layers]
        shares = [100 * (activations.subnormal_share(operation, layer) or math.nan) for layer in layers]
        style: dict[str, Any] = {"color": color, "linestyle": dashes, "marker": "o", "markersize": 3}
        largest.plot(layers, heights, label=operation, **style)
        small.plot(layers, shares, label=operation, **style)
    for axes in (largest, small):
        _logarithmic(axes)
    largest.axhline(FP16_MAX, color=_VERMILION, linewidth=1.4, linestyle=":")
    largest.annotate(
        "FP16 maximum: 65,504", (0.01, FP16_MAX), xycoords=("axes fraction", "data"), va="bottom", fontsize=9
    )
    largest.set_ylim(top=4 * max(FP16_MAX, largest.get_ylim()[1] / 4))
    _finish_layers(first, largest, "Largest magnitude (log)")
    _finish_layers(second, small, f"Share below {FP16_SMALLEST_NORMAL:.1e}, subnormal in FP16 (%, log)")
    return [first, second]


FIGURES: dict[str, tuple[Callable[[Validation], Sequence[Figure]], str]] = {
    "errors": (_errors, "Relative L2 error of each protein's mean embedding, by mode and path"),
    "layers": (_layers, "Error growth through the layers"),
    "lengths": (_lengths, "Relative L2 error of the mean embedding by length"),
    "activations": (_activations, "Range of activations by layer, and the range of FP16"),
}
"""File name to the function that draws the panels, within `page.figure_style`, and the alternative text."""
