"""The answer of the speedup report: at most three sentences at the top of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from esm_packed.reports.speedup.results import (
    DTYPES,
    Measurement,
    Results,
    Speedup,
    Spread,
    layout_comparisons,
    model_size,
    precision_comparisons,
    ratio,
    rival_groups,
    short_model,
)
from esm_packed.reports.speedup.tables import EXPECTED, PROVIDER_NAMES, machine_name, times_text


def answer(results: Results) -> str:
    """Other packages, packing and precision compared, as far as they were measured."""
    layouts = [c for c in layout_comparisons(results) if "input order" not in c.what]
    sentences = [
        _contenders(results),
        _layouts(_representative(layouts)),
        _precisions(results, _representative(precision_comparisons(results))),
    ]
    return " ".join(filter(None, sentences))


def _contenders(results: Results) -> str:
    """Of the largest model, on `uniref` lengths if measured, in the precision in which most rivals ran."""
    groups = list(rival_groups(results).items())
    if not groups:
        return ""
    largest = max(model_size(model) for (model, _), _ in groups)
    (model, workload), group = max(
        (each for each in groups if model_size(each[0][0]) == largest),
        key=lambda each: each[0][1] == "uniref",
    )
    dtype, rivals = max(
        ((dtype, _rivals(group, dtype)) for dtype in DTYPES), key=lambda each: len(each[1]), default=("", [])
    )
    if not rivals:
        return ""
    compared = _enumeration(f"{times_text(times)} as fast as {name}" for name, times in rivals)
    return (
        f"{machine_name(results)}: esm-packed with the {short_model(model)} model in {dtype.upper()} on "
        f"{workload} lengths is {compared}."
    )


def _rivals(group: Sequence[Measurement], dtype: str) -> list[tuple[str, Spread]]:
    """Names and ratios of other packages in one precision, with their batches sorted; the fastest first."""
    own = next((m for m in group if (m.info["provider"], m.info["dtype"]) == ("esm_packed", dtype)), None)
    if own is None:
        return []
    ratios = [
        (PROVIDER_NAMES.get(m.info["provider"], m.info["provider"]), ratio(m, own))
        for m in group
        if m.info["dtype"] == dtype
        and not m.info["provider"].startswith(("esm_packed", "floor"))
        and not m.info["provider"].endswith("unsorted")
    ]
    return sorted(
        ((name, times) for name, times in ratios if times is not None), key=lambda each: each[1].middle
    )


def _representative(comparisons: Sequence[Speedup]) -> list[Speedup]:
    """Of the largest model: the totals over all lengths, or what there is where only one was measured."""
    largest = max((model_size(c.model) for c in comparisons), default=0.0)
    own = [c for c in comparisons if model_size(c.model) == largest]
    return [c for c in own if c.workload == "all"] or own


def _layouts(comparisons: Sequence[Speedup]) -> str:
    """In the first precision."""
    for dtype in DTYPES:
        for c in comparisons:
            if c.fast.info["dtype"] == dtype:
                return (
                    f"Packed batches are {times_text(c.times)} as fast as padded batches sorted by length "
                    f"({short_model(c.model)}, {dtype.upper()}, {_lengths(c)})."
                )
    return ""


def _precisions(results: Results, comparisons: Sequence[Speedup]) -> str:
    packed = [c for c in comparisons if c.fast.info["layout"] == "packed"]
    first = {c.fast.info["dtype"]: c for c in reversed(packed)}
    ordered = [first[dtype] for dtype in DTYPES if dtype in first]
    if not ordered:
        return ""

    def text(c: Speedup) -> str:
        mark = c.against_expectation if results.on_gpu else ""
        return f"{c.fast.info['dtype'].upper()} {times_text(c.times)}" + (
            f" ({EXPECTED}: {mark})" if mark else ""
        )

    return (
        f"Speed compared with FP32 ({short_model(ordered[0].model)}, packed, {_lengths(ordered[0])}): "
        f"{_enumeration(map(text, ordered))}."
    )


def _lengths(comparison: Speedup) -> str:
    return "all lengths" if comparison.workload == "all" else f"{comparison.workload} lengths"


def _enumeration(parts: Iterable[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
