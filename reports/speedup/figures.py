"""The figures of the speedup report; drawn within `page.figure_style`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from esm_packed.reports.page import OKABE_ITO
from esm_packed.reports.speedup.drawing import (
    DTYPE_COLORS,
    GRAY,
    amount_text,
    dots,
    error_bars,
    lanes,
    lanes_height,
    legend_below,
    log_axis,
    offset_in_lane,
    panel,
    style_of,
)
from esm_packed.reports.speedup.results import (
    DTYPES,
    FP16_EXPECTATION,
    STAGES,
    Change,
    Measurement,
    Results,
    Speedup,
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from esm_packed.reports.speedup.drawing import Style

MAX_CHANGES_SHOWN = 40
OVER_FP32, PACKED_OVER_PADDED = "other precisions over FP32", "packed over padded"
"""Kinds of comparisons, the titles of their panels."""

_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, _YELLOW, _BLACK = OKABE_ITO
_SERIES = (_BLUE, _ORANGE, _GREEN, _VERMILION, _PINK, _SKY, _BLACK)
"""Without yellow, which is hard to see on white."""

_STAGE_COLORS = dict(zip((*STAGES, "other"), (_SKY, _ORANGE, _BLUE, _GREEN, GRAY), strict=True))
_MARKERS = "osD^vP*X"
_HATCH = "////"


def forward_times(results: Results) -> list[Figure]:
    """Time of a forward pass by lengths, a panel per model: a color per precision, hollow where padded."""
    forward = in_order(results.suite("model"))
    variants = list(dict.fromkeys(_variant(m) for m in forward))
    workloads = list(dict.fromkeys(m.info["workload"] for m in forward))
    budgets = {budget for _, _, budget in variants}
    figures = []
    for model in dict.fromkeys(m.info["model"] for m in forward):
        figure, axes = panel(lanes_height(len(workloads), len(variants)) + 0.2 * len(variants))
        own = [m for m in forward if m.info["model"] == model]
        for index, variant in enumerate(variants):
            dtype, layout, budget = variant
            points = [m for m in own if _variant(m) == variant]
            dots(
                axes,
                [m.seconds for m in points],
                [workloads.index(m.info["workload"]) + offset_in_lane(index, len(variants)) for m in points],
                style_of(dtype, layout, is_larger=budget > min(budgets)),
                f"{dtype.upper()} {layout.replace('_', ', ')}, batches of {budget:,} tokens",
            )
        lanes(axes, workloads)
        log_axis(axes, "")
        tokens = {m.info["useful_tokens"] for m in own}
        amount = f"{tokens.pop():,} tokens" if len(tokens) == 1 else "the proteins"
        axes.set_xlabel(f"time for {amount} (s, log); bars: p20 to p80")
        axes.set_title(f"{short_model(model)}: one forward pass, data on the device", loc="left", fontsize=10)
        legend_below(figure)
        figures.append(figure)
    return figures


def _variant(measurement: Measurement) -> tuple[str, str, int]:
    info = measurement.info
    return info["dtype"], info["layout"], info["token_budget"]


def speedups(kinds: Mapping[str, Sequence[Speedup]], *, expected: bool = False) -> list[Figure]:
    """Speedups by lengths, with the range over blocks: a panel per model and kind.

    Args:
        kinds: title of a panel to its comparisons.
        expected: shade `FP16_EXPECTATION` where it applies.
    """
    kinds = {kind: comparisons for kind, comparisons in kinds.items() if comparisons}
    every = [comparison for comparisons in kinds.values() for comparison in comparisons]
    workloads = list(dict.fromkeys(c.workload for c in every if c.workload != "all"))
    workloads += ["all"] if any(c.workload == "all" for c in every) else []
    most = max(len({c.what for c in comparisons}) for comparisons in kinds.values())
    figures = []
    for model in dict.fromkeys(c.model for c in every):
        for kind, comparisons in kinds.items():
            figure, axes = panel(lanes_height(len(workloads), most) + 0.2 * most)
            _draw_speedups(axes, [c for c in comparisons if c.model == model], workloads, kind)
            if expected and any(c.against_expectation for c in comparisons):
                axes.axvspan(
                    *FP16_EXPECTATION, color=_SKY, alpha=0.25, linewidth=0, label=f"FP16, {EXPECTED}"
                )
            log_axis(axes, "x")
            axes.set_xlabel("times as fast (log); bars span the blocks")
            axes.set_title(f"{short_model(model)}: {kind}", loc="left", fontsize=10)
            legend_below(figure)
            figures.append(figure)
    return figures


def _draw_speedups(axes: Axes, comparisons: Sequence[Speedup], workloads: Sequence[str], kind: str) -> None:
    names = list(dict.fromkeys(c.what for c in comparisons))
    for index, name in enumerate(names):
        points = [c for c in comparisons if c.what == name]
        fast = points[0].fast
        dots(
            axes,
            [c.times for c in points],
            [workloads.index(c.workload) + offset_in_lane(index, len(names)) for c in points],
            style_of(
                fast.info["dtype"],
                "unsorted" if "input order" in name else fast.info["layout"],
                is_larger="packs of" in name,
                is_combined="padded" in name and "packed" in name and kind != PACKED_OVER_PADDED,
            ),
            name,
        )
    lanes(axes, ["all lengths" if workload == "all" else workload for workload in workloads])
    axes.axvline(1, color=_BLACK, linewidth=1)


def rivals(results: Results) -> list[Figure]:
    """Tokens per second of each contender, a panel per model and lengths."""
    figures = []
    for (model, workload), group in rival_groups(results).items():
        contenders = [m for m in group if not m.info["provider"].startswith("floor")]
        if not contenders:
            continue
        figure, axes = panel(0.5 * len(contenders) + 1.0)
        _draw_rivals(axes, contenders)
        tokens = contenders[0].info["useful_tokens"]
        title = f"{short_model(model)}, {workload} lengths, {tokens:,} tokens"
        axes.set_title(title, loc="left", fontsize=10)
        figures.append(figure)
    return figures


def _draw_rivals(axes: Axes, contenders: Sequence[Measurement]) -> None:
    """A bar per contender with its name above it and its rate beyond the whisker."""
    spreads = []
    for m in contenders:
        tokens, seconds = m.info["useful_tokens"], m.seconds
        low, high = seconds.ends
        spreads.append((tokens / seconds.middle, tokens / high, tokens / low))
    axes.barh(
        range(len(contenders)),
        [middle for middle, _, _ in spreads],
        0.44,
        xerr=error_bars(spreads),
        color=[DTYPE_COLORS.get(m.info["dtype"], GRAY) for m in contenders],
        hatch=[None if m.info["provider"] == "esm_packed" else _HATCH for m in contenders],
        edgecolor="white",
        linewidth=0.5,
        error_kw={"elinewidth": 1.2, "capsize": 2},
    )
    for row, (m, (middle, _, high)) in enumerate(zip(contenders, spreads, strict=True)):
        axes.annotate(
            contender(m), (0, row - 0.25), (2, 1), textcoords="offset points", va="bottom", fontsize=9
        )
        axes.annotate(
            amount_text(middle), (high, row), (6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_xlim(0, 1.16 * max(high for _, _, high in spreads))
    axes.set_ylim(len(contenders) - 0.65, -0.75)
    axes.xaxis.set_major_formatter(lambda value, _: amount_text(value))
    axes.set_yticks([])
    axes.set_xlabel("useful tokens/s; bars span the 20th to 80th percentile")


def roofline(results: Results) -> list[Figure]:
    """Operations bound by computation under their roofs, and operations bound by memory."""
    kernels = [m for m in results.suite("kernels") + results.suite("attention") if m.seconds.middle > 0]
    panels = []
    if compute := [m for m in kernels if m.info["ceiling_name"] != "copy"]:
        panels.append(_compute_bound(compute))
    if memory := [m for m in kernels if m.info["ceiling_name"] == "copy"]:
        panels.append(_memory_bound(memory))
    return panels


def _compute_bound(kernels: Sequence[Measurement]) -> Figure:
    figure, axes = panel(6.2)
    _roofs(axes, kernels)
    names = list(dict.fromkeys(m.info["operation"].removesuffix("_") for m in kernels))
    seen = set()
    for m in kernels:
        info = m.info
        operation = info["operation"].removesuffix("_")
        is_ours = info["provider"] in ("ours", "fused", "triton")
        label = f"{operation}, {'ours' if is_ours else 'others'}"
        axes.plot(
            info["flops"] / info["bytes"],
            achieved(m) / 1e12,
            _MARKERS[names.index(operation) % len(_MARKERS)],
            color=DTYPE_COLORS.get(info["dtype"], GRAY),
            markerfacecolor=DTYPE_COLORS.get(info["dtype"], GRAY) if is_ours else "white",
            markersize=6,
            label=None if label in seen else label,
        )
        seen.add(label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("arithmetic intensity (FLOP/byte, log)")
    axes.set_ylabel("achieved (TFLOP/s, log)")
    axes.set_title("Matrix multiplication and attention", loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _memory_bound(kernels: Sequence[Measurement]) -> Figure:
    operations = list(dict.fromkeys(m.info["operation"] for m in kernels))
    providers = list(dict.fromkeys(m.info["provider"] for m in kernels))
    figure, axes = panel(6.2)
    for index, provider in enumerate(providers):
        own = [m for m in kernels if m.info["provider"] == provider]
        offset = (index - (len(providers) - 1) / 2) * 0.24
        axes.plot(
            [100 * achieved(m) / m.info["ceiling_per_second"] for m in own],
            [operations.index(m.info["operation"]) + offset for m in own],
            _MARKERS[index % len(_MARKERS)],
            color=(_BLUE, _ORANGE, _GREEN, _PINK)[index % 4],
            alpha=0.8,
            label=provider.replace("_", " "),
        )
    axes.axvline(100, color=_BLACK, linewidth=1)
    axes.set_yticks(range(len(operations)), [name.removesuffix("_") for name in operations])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the measured copy rate (%)")
    axes.set_title("Memory-bound operations, every shape", loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
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
            color=DTYPE_COLORS[dtype],
            linewidth=1.2,
            label=f"roof, {dtype.upper()}",
        )


def attention(results: Results) -> list[Figure]:
    """FLOP/s of every attention backend by lengths."""
    measurements = in_order(results.suite("attention"))
    workloads = list(dict.fromkeys(m.info["workload"] for m in measurements))
    variants = list(dict.fromkeys((m.info["backend"], m.info["dtype"]) for m in measurements))
    figure, axes = panel(lanes_height(len(workloads), len(variants)) + 0.2 * len(variants))
    width = 0.84 / len(variants)
    for index, (backend, dtype) in enumerate(variants):
        own = [m for m in measurements if (m.info["backend"], m.info["dtype"]) == (backend, dtype)]
        spreads = []
        for m in own:
            flops, seconds = m.info["flops"] / 1e9, m.seconds
            low, high = seconds.ends
            spreads.append((flops / seconds.middle, flops / high, flops / low))
        axes.barh(
            [workloads.index(m.info["workload"]) - 0.42 + (index + 0.5) * width for m in own],
            [middle for middle, _, _ in spreads],
            width * 0.92,
            xerr=error_bars(spreads),
            color=_SERIES[index % len(_SERIES)],
            error_kw={"elinewidth": 1, "capsize": 2},
            label=f"{backend}, {dtype.upper()}",
        )
    lanes(axes, workloads)
    axes.set_xlabel("achieved (GFLOP/s)")
    size, tokens = measurements[0].info["model"], measurements[0].info["useful_tokens"]
    axes.set_title(f"Attention alone, shape of {size}, {tokens:,} tokens", loc="left", fontsize=10)
    legend_below(figure)
    return [figure]


_PADDING_STYLES = {
    "padded_unsorted": ("padded, input order: padding", _VERMILION, "padding_share"),
    "padded_sorted": ("padded, sorted by length: padding", _ORANGE, "padding_share"),
    "first_fit_decreasing": ("packed: budget left unused", _BLUE, None),
}


def padding(results: Results) -> list[Figure]:
    """Share of computed tokens that are padding, and of the budget that packs leave unused, by lengths."""
    measurements = in_order(results.suite("packing"))
    workloads = list(dict.fromkeys(m.info["workload"] for m in measurements))
    panels = []
    for sequences, budget in sorted({(m.info["sequences"], m.info["token_budget"]) for m in measurements}):
        figure, axes = panel(lanes_height(len(workloads), len(_PADDING_STYLES)) + 0.8)
        own = [
            m for m in measurements if (m.info["sequences"], m.info["token_budget"]) == (sequences, budget)
        ]
        _draw_padding(axes, own, workloads)
        axes.set_title(f"{sequences:,} sequences, batches of {budget:,} tokens", loc="left", fontsize=10)
        legend_below(figure)
        panels.append((figure, axes))
    highest = max(axes.get_xlim()[1] for _, axes in panels)
    for _, axes in panels:
        axes.set_xlim(0, highest)
    return [figure for figure, _ in panels]


def _draw_padding(axes: Axes, measurements: Sequence[Measurement], workloads: Sequence[str]) -> None:
    for index, (provider, (label, color, field)) in enumerate(_PADDING_STYLES.items()):
        own = [m for m in measurements if m.info["provider"] == provider]
        bars = axes.barh(
            [workloads.index(m.info["workload"]) + (index - 1) * 0.29 for m in own],
            [100 * (m.info[field] if field else 1 - m.info["efficiency"]) for m in own],
            0.27,
            color=color,
            label=label,
        )
        axes.bar_label(
            bars, fmt=lambda value: f"{value:.0f}" if value >= 9.5 else f"{value:.1f}", padding=2, fontsize=8
        )
    lanes(axes, workloads)
    axes.margins(x=0.08)
    axes.set_xlabel("share (%)")


def stages(results: Results) -> list[Figure]:
    """Time from FASTA to HDF5 by stage."""
    measurements = in_order(results.suite("end_to_end"))
    figure, axes = panel(0.5 * len(measurements) + 1.6)
    labels = []
    for row, m in enumerate(measurements):
        seconds = stage_seconds(m)
        total = sum(seconds.values())
        start = 0.0
        for stage, value in seconds.items():
            share = 100 * value / total
            axes.barh(
                row, share, 0.66, left=start, color=_STAGE_COLORS[stage], label=stage if row == 0 else None
            )
            if share >= 5:
                color = "white" if stage == "computing" else "black"
                place = start + share / 2
                axes.text(place, row, f"{share:.0f}%", color=color, ha="center", va="center", fontsize=9)
            start += share
        labels.append(f"{short_model(m.info['model'])} {m.info['workload']} {m.info['dtype'].upper()}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the stages' summed time (%)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return [figure]


def scaling(results: Results) -> list[Figure]:
    """Throughput by number of workers, relative to the fewest, with a line for perfect scaling."""
    figure, axes = panel(4.6)
    counts = set()
    for index, (label, group) in enumerate(scaling_series(results).items()):
        workers = [int(m.info["workers"]) for m in group]
        counts |= set(workers)
        first = group[0].tokens_per_second
        times = [m.tokens_per_second / first for m in group]
        style: Style = {"marker": _MARKERS[index % len(_MARKERS)], "color": _SERIES[index % len(_SERIES)]}
        axes.plot(workers, times, label=f"{label}: {amount_text(first)} tokens/s with {workers[0]}", **style)
    ends = [min(counts), max(counts)]
    axes.plot(ends, [1, ends[1] / ends[0]], ":", color=_BLACK, label="perfect scaling")
    axes.set_xticks(sorted(counts))
    axes.set_xlim(ends[0] - 0.2, ends[1] + 0.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("workers")
    axes.set_ylabel("throughput relative to the fewest workers")
    legend_below(figure)
    return [figure]


def change(found: Sequence[Change]) -> list[Figure]:
    """Time of variants relative to an older file, the slowest first."""
    shown = sorted(found, key=lambda c: (c.mark == "", -abs(c.times.middle - 1)))[:MAX_CHANGES_SHOWN]
    shown.sort(key=lambda c: -c.times.middle)
    figure, axes = panel(0.24 * len(shown) + 1.8)
    colors = {"slower": _VERMILION, "faster": _GREEN, "": GRAY}
    names = {
        "slower": "slower, outside the spread",
        "faster": "faster, outside the spread",
        "": "within the spread",
    }
    for index, (mark, color) in enumerate(colors.items()):
        rows = [row for row, c in enumerate(shown) if c.mark == mark]
        if not rows:
            continue
        dots(
            axes,
            [shown[row].times for row in rows],
            rows,
            {"marker": "^vo"[index], "color": color},
            names[mark],
        )
    axes.axvline(1, color=_BLACK, linewidth=1)
    log_axis(axes, "x")
    axes.set_yticks(range(len(shown)), [variant_name(c.measurement) for c in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("times as long as before (log); bars span the blocks")
    legend_below(figure)
    return [figure]
