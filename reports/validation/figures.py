"""The figures of the precision-validation report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esm_packed.reports.page import OKABE_ITO
from esm_packed.reports.validation.activations import FP16_MAX, FP16_SMALLEST_NORMAL, RESIDUAL
from esm_packed.reports.validation.errors import finite_max, finite_median
from esm_packed.reports.validation.run import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, _, _BLACK = OKABE_ITO
# Shapes and dashes say the same as the colours.
_MODE_COLOURS = {"fp64": _PINK, "fp32": _BLUE, "tf32": _GREEN, "fp16": _ORANGE, "bf16": _VERMILION}
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


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    # without pyplot, which keeps figures and looks for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(axis="x", visible=False)
    return figure, list(axes)


def _positive(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """For a logarithmic axis; what is NaN or zero is left out by matplotlib."""
    array: np.ndarray[Any, np.dtype[np.float64]] = values.numpy()
    return np.where(array > 0, array, np.nan)


def _logarithmic(axis: Axes) -> None:
    """Make the y axis logarithmic, if a line has anything to show on it."""
    heights = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()]
    if any((values > 0).any() for values in heights):
        axis.set_yscale("log")
    else:
        axis.annotate(
            "no errors that are finite and not zero", (0.5, 0.5), xycoords="axes fraction", ha="center"
        )


def _errors(validation: Validation) -> Figure:
    paths = validation.paths
    figure, (axis,) = _figure(max(7.0, 1.6 + 0.85 * len(paths)), 4.4)
    spread = np.random.default_rng(0).uniform(-0.28, 0.28, len(validation.lengths))
    for place, path in enumerate(paths):
        colour = _MODE_COLOURS[path.mode]
        errors = _positive(path.means.relative_l2)
        marker = _MODE_MARKERS[path.mode]
        axis.plot(place + spread, errors, marker, color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0)
        if (median := finite_median(path.means.relative_l2)) is not None and median > 0:
            axis.plot([place - 0.33, place + 0.33], [median, median], color="#000000", linewidth=1.4)
        limit = validation.settings.threshold(path.mode).relative_l2
        axis.plot([place - 0.45, place + 0.45], [limit, limit], color=colour, linewidth=1.8, linestyle="--")
        if failed := int((~path.means.relative_l2.isfinite()).sum()):
            axis.annotate(
                f"NaN or Inf:\n{failed:,}",
                (place, 0.98),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=8,
            )
    _logarithmic(axis)
    axis.set_xlim(-0.6, len(paths) - 0.4)
    axis.set_xticks(
        range(len(paths)), [f"{path.mode}\n{path.layout}\n{path.backend}" for path in paths], fontsize=8
    )
    axis.set_ylabel("relative L2 error of the mean embedding")
    axis.set_title("One point a protein; black: median; dashed: threshold", fontsize=10)
    return figure


def _layers(validation: Validation) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(10.0, 4.2, 2)
    axes[1].sharey(axes[0])
    for axis, name, title in (
        (axes[0], "mean_by_layer", "Mean embeddings"),
        (axes[1], "residues_by_layer", "Residues"),
    ):
        for path in validation.first_paths:
            rows: torch.Tensor = getattr(path, name)
            median = np.array([finite_median(row) or math.nan for row in rows])
            most = np.array([finite_max(row) or math.nan for row in rows])
            colour = _MODE_COLOURS[path.mode]
            axis.fill_between(range(len(rows)), median, most, color=colour, alpha=0.22, linewidth=0)
            axis.plot(
                median,
                color=colour,
                marker=_MODE_MARKERS[path.mode],
                markersize=4,
                label=f"{path.mode} ({path.path})",
            )
        _logarithmic(axis)
        axis.set_xlabel("layer")
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("relative L2 error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _lengths(validation: Validation) -> Figure:
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (axis,) = _figure(8.0, 4.2)
    for path in validation.first_paths:
        axis.plot(
            validation.lengths,
            _positive(path.means.relative_l2),
            _MODE_MARKERS[path.mode],
            color=_MODE_COLOURS[path.mode],
            markersize=4,
            alpha=0.6,
            markeredgewidth=0,
            label=f"{path.mode} ({path.path})",
        )
    axis.set_xscale("log")
    _logarithmic(axis)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("residues")
    axis.set_ylabel("relative L2 error of the mean embedding")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _activations(validation: Validation) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, (largest, small) = _figure(10.0, 4.4, 2)
    activations = validation.activations
    for operation, (colour, dashes) in _OPERATION_STYLES.items():
        layers = list(activations.layers_of(operation))
        heights = [activations.max_abs(operation, layer) or math.nan for layer in layers]
        shares = [100 * (activations.subnormal_share(operation, layer) or math.nan) for layer in layers]
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 3}
        largest.plot(layers, heights, label=operation, **style)
        small.plot(layers, shares, **style)
    for axis in (largest, small):
        _logarithmic(axis)
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    largest.axhline(FP16_MAX, color=_VERMILION, linewidth=1.4, linestyle=":")
    largest.annotate(
        "FP16 ends: 65,504", (0.01, FP16_MAX), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
    )
    largest.set_ylim(top=4 * max(FP16_MAX, largest.get_ylim()[1] / 4))
    largest.set_title("Largest magnitude", fontsize=10)
    small.set_title(f"Share below {FP16_SMALLEST_NORMAL:.1e}, subnormal in FP16 (%)", fontsize=10)
    figure.legend(*largest.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


FIGURES: dict[str, tuple[Callable[[Validation], Figure], str]] = {
    "errors": (_errors, "Relative L2 error of each protein's mean embedding, by mode and path"),
    "layers": (_layers, "Error growth through the layers"),
    "lengths": (_lengths, "Relative L2 error of the mean embedding by length"),
    "activations": (_activations, "Range of the activations by layer against FP16's"),
}
"""Name of the file to what draws it, within `page.figure_style`, and the alternative text."""
