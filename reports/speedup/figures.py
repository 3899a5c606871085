"""The figures of the speedup report; drawn within `page.figure_style`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from esm_packed.reports.page import OKABE_ITO
from esm_packed.reports.speedup.results import (
    DTYPES,
    FP16_EXPECTATION,
    STAGES,
    Change,
    Measurement,
    Results,
    Speedup,
    Spread,
    achieved,
    in_order,
    rival_groups,
    scaling_series,
    short_model,
    stage_seconds,
)
from esm_packed.reports.speedup.tables import (
    EXPECTED,
    contender,
    variant_name,
)

if TYPE_CHECKING:
    from typing import Any

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Style = dict[str, Any]

MAX_CHANGES_SHOWN = 40

_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, _YELLOW, _BLACK = OKABE_ITO
_GREY = "#999999"
_SERIES = (_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, _BLACK)
"""Yellow is hard to see on white."""

_DTYPE_COLOURS = dict(zip(DTYPES, (_BLUE, _GREEN, _ORANGE, _VERMILION), strict=True))
_STAGE_COLOURS = dict(zip((*STAGES, "other"), (_SKY, _ORANGE, _BLUE, _GREEN, _GREY), strict=True))
_MARKERS = "osD^vP*X"
_HATCH = "////"


def _subplots(rows: int, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _error_bars(values: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """(middle, low, high) as matplotlib takes them."""
    return [[middle - low for middle, low, _ in values], [high - middle for middle, _, high in values]]


def forward_times(results: Results) -> Figure:
    """Time of a forward pass by lengths: a colour for each precision, hollow where padded."""
    forward = in_order(results.suite("model"))
    models = list(dict.fromkeys(m.info["model"] for m in forward))
    variants = list(dict.fromkeys(_variant(m) for m in forward))
    workloads = list(dict.fromkeys(m.info["workload"] for m in forward))
    budgets = {budget for _, _, budget in variants}
    height = _lanes_height(len(workloads), len(variants))
    figure, all_axes = _subplots(len(models), 10, height * len(models) + 0.2)
    for axes, model in zip(all_axes, models, strict=True):
        own = [m for m in forward if m.info["model"] == model]
        for index, variant in enumerate(variants):
            dtype, layout, budget = variant
            points = [m for m in own if _variant(m) == variant]
            _dots(
                axes,
                [m.seconds for m in points],
                [workloads.index(m.info["workload"]) + _offset(index, len(variants)) for m in points],
                _style(dtype, layout, is_larger=budget > min(budgets)),
                f"{dtype.upper()} {layout.replace('_', ', ')}, {budget:,} tokens a batch",
            )
        _lanes(axes, workloads)
        _log_axis(axes, "")
        tokens = {m.info["useful_tokens"] for m in own}
        amount = f"{tokens.pop():,} tokens" if len(tokens) == 1 else "the proteins"
        axes.set_xlabel(f"time for {amount} (s, log); bars span the 20th to 80th percentile")
        axes.set_title(f"{short_model(model)}: one forward pass, data on the device", loc="left")
        _legend_beside(axes)
    return figure


def _variant(measurement: Measurement) -> tuple[str, str, int]:
    info = measurement.info
    return info["dtype"], info["layout"], info["token_budget"]


def _style(dtype: str, layout: str, *, is_larger: bool = False, is_combined: bool = False) -> Style:
    """Colours are precisions; hollow is padded, a square in input order, a diamond a larger budget, a star
    both steps together."""
    colour = _DTYPE_COLOURS.get(dtype, _GREY)
    face = "white" if layout.startswith("padded") else colour
    marker = "*" if is_combined else "D" if is_larger else "s" if layout.endswith("unsorted") else "o"
    return {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": 7 if is_combined else 5}


def speedups(kinds: Mapping[str, Sequence[Speedup]], *, expected: bool = False) -> Figure:
    """How many times as fast, by lengths, with the range over blocks: models are rows, kinds are columns.

    Args:
        kinds: comparisons by the title of their column.
        expected: shade `FP16_EXPECTATION` where it applies.
    """
    kinds = {kind: comparisons for kind, comparisons in kinds.items() if comparisons}
    every = [comparison for comparisons in kinds.values() for comparison in comparisons]
    models = list(dict.fromkeys(c.model for c in every))
    workloads = list(dict.fromkeys(c.workload for c in every if c.workload != "all"))
    workloads += ["all"] if any(c.workload == "all" for c in every) else []
    most = max(len({c.what for c in comparisons}) for comparisons in kinds.values())
    height = _lanes_height(len(workloads), most)
    figure, all_axes = _subplots(
        len(models), 6.5 * len(kinds), height * len(models) + 0.2 * most, columns=len(kinds)
    )
    for place, axes in enumerate(all_axes):
        model, (kind, comparisons) = models[place // len(kinds)], list(kinds.items())[place % len(kinds)]
        names = list(dict.fromkeys(c.what for c in comparisons))
        for index, name in enumerate(names):
            points = [c for c in comparisons if c.what == name and c.model == model]
            if not points:
                continue
            fast = points[0].fast
            _dots(
                axes,
                [c.times for c in points],
                [workloads.index(c.workload) + _offset(index, len(names)) for c in points],
                _style(
                    fast.info["dtype"],
                    "unsorted" if "input order" in name else fast.info["layout"],
                    is_larger="packs of" in name,
                    is_combined="padded" in name and "packed" in name and kind != "packed over padded",
                ),
                name,
            )
        _lanes(axes, ["all lengths" if workload == "all" else workload for workload in workloads])
        axes.axvline(1, color=_BLACK, linewidth=1)
        if expected and any(c.against_expectation for c in comparisons):
            axes.axvspan(*FP16_EXPECTATION, color=_SKY, alpha=0.25, linewidth=0, label=f"FP16, {EXPECTED}")
        _log_axis(axes, "x")
        axes.set_xlabel("times as fast (log); bars span the blocks")
        axes.set_title(f"{short_model(model)}: {kind}", loc="left")
        if place // len(kinds) == len(models) - 1:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.75 / height))
    return figure


def _lanes_height(num_lanes: int, num_series: int) -> float:
    return num_lanes * (0.1 * num_series + 0.15) + 0.9


def _offset(index: int, count: int) -> float:
    """Where in its lane a series lies."""
    return (index - (count - 1) / 2) * 0.8 / count


def _lanes(axes: Axes, names: Sequence[str]) -> None:
    """A lane for each name, from above."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for boundary in range(1, len(names)):
        axes.axhline(boundary - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.grid(axis="y", visible=False)


def _dots(
    axes: Axes,
    spreads: Sequence[Spread],
    places: Sequence[float],
    style: Style,
    label: str,
) -> None:
    """Values from left to right with error bars."""
    axes.errorbar(
        [spread.middle for spread in spreads],
        places,
        xerr=_error_bars([(spread.middle, *spread.ends) for spread in spreads]),
        linestyle="none",
        elinewidth=1.2,
        capsize=2,
        label=label,
        **style,
    )


def _legend_beside(axes: Axes) -> None:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _log_axis(axes: Axes, unit: str) -> None:
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


def rivals(results: Results) -> Figure:
    """Tokens per second of each contender, one panel for each model and lengths."""
    groups = {
        key: [m for m in group if not m.info["provider"].startswith("floor")]
        for key, group in rival_groups(results).items()
    }
    groups = {key: group for key, group in groups.items() if group}
    heights = [0.34 * len(group) + 0.9 for group in groups.values()]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, sum(heights) + 0.2), layout="constrained")
    all_axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights).ravel()
    for axes, ((model, workload), group) in zip(all_axes, groups.items(), strict=True):
        spreads = []
        for m in group:
            tokens, seconds = m.info["useful_tokens"], m.seconds
            low, high = seconds.ends
            spreads.append((tokens / seconds.middle, tokens / high, tokens / low))
        bars = axes.barh(
            range(len(group)),
            [middle for middle, _, _ in spreads],
            0.72,
            xerr=_error_bars(spreads),
            color=[_DTYPE_COLOURS.get(m.info["dtype"], _GREY) for m in group],
            hatch=[None if m.info["provider"] == "esm_packed" else _HATCH for m in group],
            edgecolor="white",
            linewidth=0.5,
            error_kw={"elinewidth": 1.2, "capsize": 2},
        )
        labels = [f"  {_amount(middle)}" for middle, _, _ in spreads]
        furthest = max(high for _, _, high in spreads)
        for bar, label, (_, _, high) in zip(bars, labels, spreads, strict=True):
            axes.text(high, bar.get_y() + bar.get_height() / 2, label, va="center", fontsize=9)
        axes.set_xlim(0, furthest * 1.12)
        axes.xaxis.set_major_formatter(lambda value, _: _amount(value))
        axes.set_yticks(range(len(group)), [contender(m) for m in group])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("useful tokens/s; bars span the 20th to 80th percentile")
        tokens = group[0].info["useful_tokens"]
        axes.set_title(f"{short_model(model)}, {workload} lengths, {tokens:,} tokens", loc="left")
    return figure


def _amount(value: float) -> str:
    """Three digits of large numbers."""
    if value >= 1e5:
        return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value / 1e3:.3g} k"
    return f"{value:,.0f}"


def roofline(results: Results) -> Figure:
    """Left: operations with many operations per byte under their roofs. Right: those that memory bounds."""
    kernels = [m for m in results.suite("kernels") + results.suite("attention") if m.seconds.middle > 0]
    figure, (left, right) = _subplots(1, 13, 6.2, columns=2)
    compute = [m for m in kernels if m.info["ceiling_name"] != "copy"]
    _roofs(left, compute)
    names = list(dict.fromkeys(m.info["operation"].removesuffix("_") for m in compute))
    seen = set()
    for m in compute:
        info = m.info
        operation = info["operation"].removesuffix("_")
        is_ours = info["provider"] in ("ours", "fused", "triton")
        label = f"{operation}, {'ours' if is_ours else 'others'}"
        left.plot(
            info["flops"] / info["bytes"],
            achieved(m) / 1e12,
            _MARKERS[names.index(operation) % len(_MARKERS)],
            color=_DTYPE_COLOURS.get(info["dtype"], _GREY),
            markerfacecolor=_DTYPE_COLOURS.get(info["dtype"], _GREY) if is_ours else "white",
            markersize=6,
            label=None if label in seen else label,
        )
        seen.add(label)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    left.set_xlabel("arithmetic intensity (FLOP/byte, log)")
    left.set_ylabel("achieved (TFLOP/s, log)")
    left.set_title("Matrix multiplication and attention", loc="left")
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.13), ncols=3)
    memory = [m for m in kernels if m.info["ceiling_name"] == "copy"]
    operations = list(dict.fromkeys(m.info["operation"] for m in memory))
    providers = list(dict.fromkeys(m.info["provider"] for m in memory))
    for index, provider in enumerate(providers):
        own = [m for m in memory if m.info["provider"] == provider]
        offset = (index - (len(providers) - 1) / 2) * 0.24
        right.plot(
            [100 * achieved(m) / m.info["ceiling_per_second"] for m in own],
            [operations.index(m.info["operation"]) + offset for m in own],
            _MARKERS[index % len(_MARKERS)],
            color=(_BLUE, _ORANGE, _GREEN, _PINK)[index % 4],
            alpha=0.8,
            label=provider.replace("_", " "),
        )
    right.axvline(100, color=_BLACK, linewidth=1)
    right.set_yticks(range(len(operations)), [name.removesuffix("_") for name in operations])
    right.invert_yaxis()
    right.set_xlim(left=0)
    right.set_xlabel("share of the measured copy rate (%)")
    right.set_title("Operations that memory bounds, every shape", loc="left")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.13), ncols=3)
    return figure


def _roofs(axes: Axes, kernels: Sequence[Measurement]) -> None:
    """The measured copy rate and the measured matrix-multiplication rates."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    intensities = [m.info["flops"] / m.info["bytes"] for m in kernels]
    low, high = min(intensities) / 3, max(intensities) * 3
    for dtype in DTYPES:
        own = [m for m in kernels if m.info["dtype"] == dtype]
        if not own:
            continue
        peak, bandwidth = own[0].info["ceiling_per_second"], own[0].info["bandwidth_ceiling"]
        knee = peak / bandwidth
        xs = [low, knee, high] if low < knee < high else [low, high]
        axes.plot(
            xs,
            [min(peak, bandwidth * x) / 1e12 for x in xs],
            color=_DTYPE_COLOURS[dtype],
            linewidth=1.2,
            label=f"roof, {dtype.upper()}",
        )


def attention(results: Results) -> Figure:
    """FLOP/s of every attention backend by lengths."""
    measurements = in_order(results.suite("attention"))
    workloads = list(dict.fromkeys(m.info["workload"] for m in measurements))
    variants = list(dict.fromkeys((m.info["backend"], m.info["dtype"]) for m in measurements))
    figure, (axes,) = _subplots(1, 10, 4.4)
    width = 0.84 / len(variants)
    for index, (backend, dtype) in enumerate(variants):
        own = [m for m in measurements if (m.info["backend"], m.info["dtype"]) == (backend, dtype)]
        spreads = []
        for m in own:
            flops, seconds = m.info["flops"] / 1e9, m.seconds
            low, high = seconds.ends
            spreads.append((flops / seconds.middle, flops / high, flops / low))
        axes.bar(
            [workloads.index(m.info["workload"]) - 0.42 + (index + 0.5) * width for m in own],
            [middle for middle, _, _ in spreads],
            width * 0.92,
            yerr=_error_bars(spreads),
            color=_SERIES[index % len(_SERIES)],
            error_kw={"elinewidth": 1, "capsize": 2},
            label=f"{backend}, {dtype.upper()}",
        )
    axes.set_xticks(range(len(workloads)), workloads)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("achieved (GFLOP/s)")
    size, tokens = measurements[0].info["model"], measurements[0].info["useful_tokens"]
    axes.set_title(f"Attention alone, shape of {size}, {tokens:,} tokens", loc="left")
    _legend_beside(axes)
    return figure


def padding(results: Results) -> Figure:
    """Share of computed tokens that are padding, by lengths, and what packs leave unused."""
    measurements = in_order(results.suite("packing"))
    panels = sorted({(m.info["sequences"], m.info["token_budget"]) for m in measurements})
    budgets = sorted({budget for _, budget in panels})
    workloads = list(dict.fromkeys(m.info["workload"] for m in measurements))
    styles = {
        "padded_unsorted": ("padded, input order: padding", _VERMILION, "padding_share"),
        "padded_sorted": ("padded, sorted by length: padding", _ORANGE, "padding_share"),
        "first_fit_decreasing": ("packed: budget left unused", _BLUE, None),
    }
    rows = len(panels) // len(budgets)
    figure, all_axes = _subplots(rows, 12, 3.0 * rows + 0.5, columns=len(budgets))
    for axes, (sequences, budget) in zip(all_axes, panels, strict=True):
        for index, (provider, (label, colour, field)) in enumerate(styles.items()):
            own = [
                m
                for m in measurements
                if (m.info["sequences"], m.info["token_budget"], m.info["provider"])
                == (sequences, budget, provider)
            ]
            bars = axes.bar(
                [workloads.index(m.info["workload"]) + (index - 1) * 0.29 for m in own],
                [100 * (m.info[field] if field else 1 - m.info["efficiency"]) for m in own],
                0.27,
                color=colour,
                label=label,
            )
            axes.bar_label(
                bars, fmt=lambda value: f"{value:.0f}" if value >= 9.5 else f"{value:.1f}", fontsize=6.5
            )
        axes.set_xticks(range(len(workloads)), workloads, fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("share (%)")
        axes.set_title(f"{sequences:,} sequences, batches of {budget:,} tokens", loc="left", fontsize=10)
    highest = max(axes.get_ylim()[1] for axes in all_axes)
    for axes in all_axes:
        axes.set_ylim(0, highest)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def stages(results: Results) -> Figure:
    """Where the time of FASTA to HDF5 goes."""
    measurements = in_order(results.suite("end_to_end"))
    figure, (axes,) = _subplots(1, 10, 0.5 * len(measurements) + 1.5)
    labels = []
    for row, m in enumerate(measurements):
        seconds = stage_seconds(m)
        total = sum(seconds.values())
        start = 0.0
        for stage, value in seconds.items():
            share = 100 * value / total
            axes.barh(
                row, share, 0.66, left=start, color=_STAGE_COLOURS[stage], label=stage if row == 0 else None
            )
            if share >= 5:
                colour = "white" if stage == "computing" else "black"
                place = start + share / 2
                axes.text(place, row, f"{share:.0f}%", color=colour, ha="center", va="center", fontsize=9)
            start += share
        labels.append(f"{short_model(m.info['model'])} {m.info['workload']} {m.info['dtype'].upper()}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the stages' summed time (%)")
    figure.legend(loc="outside upper center", ncols=5, fontsize=9)
    return figure


def scaling(results: Results) -> Figure:
    """Throughput by number of workers, over that of the fewest, beside what perfect scaling would give."""
    figure, (axes,) = _subplots(1, 7, 4.6)
    counts = set()
    for index, (label, group) in enumerate(scaling_series(results).items()):
        workers = [int(m.info["workers"]) for m in group]
        counts |= set(workers)
        first = group[0].tokens_per_second
        times = [m.tokens_per_second / first for m in group]
        style: Style = {"marker": _MARKERS[index % len(_MARKERS)], "color": _SERIES[index % len(_SERIES)]}
        axes.plot(workers, times, label=f"{label}: {_amount(first)} tokens/s with {workers[0]}", **style)
    ends = [min(counts), max(counts)]
    axes.plot(ends, [1, ends[1] / ends[0]], ":", color=_BLACK, label="in proportion")
    axes.set_xticks(sorted(counts))
    axes.set_xlim(ends[0] - 0.2, ends[1] + 0.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("workers")
    axes.set_ylabel("throughput, times that of the fewest workers")
    axes.legend(fontsize=9)
    return figure


def change(found: Sequence[Change]) -> Figure:
    """How many times as long variants take as in an older file, the slowest first."""
    shown = sorted(found, key=lambda c: (c.mark == "", -abs(c.times.middle - 1)))[:MAX_CHANGES_SHOWN]
    shown.sort(key=lambda c: -c.times.middle)
    figure, (axes,) = _subplots(1, 10, 0.24 * len(shown) + 1.4)
    colours = {"slower": _VERMILION, "faster": _GREEN, "": _GREY}
    names = {
        "slower": "slower, outside the spread",
        "faster": "faster, outside the spread",
        "": "within the spread",
    }
    for index, (mark, colour) in enumerate(colours.items()):
        rows = [row for row, c in enumerate(shown) if c.mark == mark]
        if not rows:
            continue
        _dots(
            axes,
            [shown[row].times for row in rows],
            rows,
            {"marker": "^vo"[index], "color": colour},
            names[mark],
        )
    axes.axvline(1, color=_BLACK, linewidth=1)
    _log_axis(axes, "x")
    axes.set_yticks(range(len(shown)), [variant_name(c.measurement) for c in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("times as long as before (log); bars span the blocks")
    _legend_beside(axes)
    return figure
