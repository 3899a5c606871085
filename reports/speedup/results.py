"""Result files of `pytest benchmarks --benchmark-json`: read, merged over blocks and compared.

Medians and the 20th and 80th percentile are those of all rounds of all blocks. A ratio is formed within each
block, where the machine was in one state; its median over blocks is given, and the range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from esm_packed.checkpoints.download import read_json
from esm_packed.reports.page import ReportError

DTYPES = ("fp32", "tf32", "fp16", "bf16")


WORKLOADS = ("short50", "medium150", "long300", "proteome", "uniref", "viral", "constant1024")
"""Lengths in the order in which reports show them; others follow."""


STAGES = ("reading", "copying", "computing", "writing")


MIN_BLOCKS = 3
"""Blocks from which on a range is shown."""

FP16_EXPECTATION = (1.5, 1.8)
"""How many times as fast as in FP32 a forward pass on a GPU is expected to be in FP16, in the same layout."""


Info = Mapping[str, Any]
Key = tuple[str, ...]
"""A variant: the test and its parameters, the block left out."""


@dataclass(frozen=True)
class Spread:
    """A middle value and where most others lie.

    Args:
        middle, low, high: in this order, or all equal.
        blocks: how many blocks they are from.
    """

    middle: float
    low: float
    high: float
    blocks: int

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high, or the middle twice where there are too few blocks for a range."""
        return (self.low, self.high) if self.blocks >= MIN_BLOCKS else (self.middle, self.middle)


@dataclass(frozen=True)
class Measurement:
    """One variant over all its blocks.

    Args:
        key: what identifies it.
        info: `extra_info` of the block whose time is the median.
        blocks: block to the seconds of each round.
    """

    key: Key
    info: Mapping[str, Any]
    blocks: Mapping[int, Sequence[float]]

    @property
    def suite(self) -> str:
        """Which benchmarks it belongs to."""
        return str(self.info["suite"])

    @property
    def seconds(self) -> Spread:
        """Median, 20th and 80th percentile of all rounds."""
        low, middle, high = np.percentile(
            [s for rounds in self.blocks.values() for s in rounds], [20, 50, 80]
        )
        return Spread(float(middle), float(low), float(high), len(self.blocks))

    @property
    def block_medians(self) -> dict[int, float]:
        """Block to the median of its rounds."""
        return {block: median(rounds) for block, rounds in self.blocks.items()}

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens over the median time."""
        return float(self.info["useful_tokens"]) / self.seconds.middle

    def rate(self, amount: str) -> float | None:
        """`info[amount]` per second, None if that is unknown."""
        value = self.info.get(amount)
        return None if value is None else value / self.seconds.middle

    def share(self, name: str) -> float | None:
        """A share that one block recorded, for the median time of all."""
        share, seconds = self.info.get(name), self.info.get("seconds")
        return None if share is None or not seconds else share * seconds / self.seconds.middle


@dataclass(frozen=True)
class Results:
    """One result file.

    Args:
        path: of the file.
        date: as pytest-benchmark wrote it.
        machine: `machine_info`.
        measurements: by key, in the order of the file.
        not_run: what could not run, with the reason.
        load: the highest load average of the machine that was recorded, None if none was.
    """

    path: Path
    date: str
    machine: Mapping[str, Any]
    measurements: Mapping[Key, Measurement]
    not_run: Sequence[Mapping[str, str]]
    load: float | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computed."""
        return bool(self.machine.get("gpu"))

    @property
    def cores(self) -> int | None:
        """CPU cores of the machine, None if unknown."""
        cores = self.machine.get("cpu_cores") or self.machine.get("cpu", {}).get("count")
        return None if cores is None else int(cores)

    @property
    def is_overloaded(self) -> bool:
        """Whether the load exceeded the cores, to one decimal."""
        return self.load is not None and self.cores is not None and round(self.load, 1) > self.cores

    def suite(self, name: str) -> list[Measurement]:
        """The measurements of one suite."""
        return [measurement for measurement in self.measurements.values() if measurement.suite == name]


def read_results(path: Path) -> Results:
    """Read a result file and merge the blocks of each variant.

    Raises:
        ReportError: the file cannot be read, is not a result of pytest-benchmark, or is empty.
    """
    try:
        content = read_json(path)
        benchmarks = content["benchmarks"]
        infos: dict[Key, list[dict[str, Any]]] = {}
        blocks: dict[Key, dict[int, list[float]]] = {}
        for benchmark in benchmarks:
            info = dict(benchmark["extra_info"])
            params = benchmark.get("params") or {}
            block = int(info.get("block", params.get("block", 0)))
            test = benchmark["name"].partition("[")[0]
            key = (test, *(f"{name}={value}" for name, value in sorted(params.items()) if name != "block"))
            info.setdefault("suite", (benchmark.get("group") or test).split()[0])
            seconds = info.get("round_seconds") or benchmark["stats"]["data"]
            infos.setdefault(key, []).append(info)
            times = [float(second) for second in seconds]
            if not times or min(times) <= 0:
                raise ValueError(f"{benchmark['name']} has an invalid time: {times}")
            blocks.setdefault(key, {}).setdefault(block, []).extend(times)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = (
            f"{path}: not a result of pytest benchmarks --benchmark-json ({type(error).__name__}: {error})"
        )
        raise ReportError(message) from error
    if not benchmarks:
        raise ReportError(f"{path}: contains no benchmark; see the messages of the pytest run that wrote it")
    machine = content.get("machine_info") or {}
    loads: list[Any] = [each.get("load_average") for each in (machine, *chain.from_iterable(infos.values()))]
    return Results(
        path,
        str(content.get("datetime", "")),
        machine,
        {key: Measurement(key, _typical(records), blocks[key]) for key, records in infos.items()},
        content.get("not_run") or [],
        max((load for load in loads if load is not None), default=None),
    )


def _typical(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of the median time, the lower of two."""
    in_order = sorted(records, key=lambda info: info.get("seconds") or 0.0)
    return in_order[(len(in_order) - 1) // 2]


def ratio(slow: Measurement, fast: Measurement) -> Spread | None:
    """How many times as long `slow` takes: median and range over the blocks both have; None without any."""
    ours, theirs = fast.block_medians, slow.block_medians
    ratios = [theirs[block] / ours[block] for block in ours if block in theirs]
    return Spread(median(ratios), min(ratios), max(ratios), len(ratios)) if ratios else None


def total(pairs: Sequence[tuple[Measurement, Measurement]]) -> tuple[Measurement, Measurement] | None:
    """Both variants over all length classes, in the blocks that all have; None without any.

    Every class weighs the same: times, sequences and operations are scaled to the classes' mean number of
    useful tokens and summed. The peak memory is the largest.
    """
    if not pairs:
        return None
    blocks = set.intersection(*(set(one.blocks) & set(other.blocks) for one, other in pairs))
    if not blocks:
        return None
    tokens = sum(fast.info["useful_tokens"] for _, fast in pairs) / len(pairs)
    slow, fast = (_sum([pair[side] for pair in pairs], sorted(blocks), tokens) for side in (0, 1))
    return slow, fast


def _sum(measurements: Sequence[Measurement], blocks: Sequence[int], tokens: float) -> Measurement:
    scales = [tokens / m.info["useful_tokens"] for m in measurements]

    def amount(name: str) -> float | None:
        values = [m.info.get(name) for m in measurements]
        if any(value is None for value in values):
            return None
        return float(sum(value * scale for value, scale in zip(values, scales, strict=True)))

    memory: list[Any] = [m.info.get("peak_memory_bytes") for m in measurements]
    first = measurements[0].info
    info = {name: first.get(name) for name in ("suite", "model", "dtype", "layout", "token_budget")} | {
        "workload": "all",
        "peak_memory_bytes": None if None in memory else max(memory),
        **{name: amount(name) for name in ("useful_tokens", "sequences", "computed_flops")},
    }
    seconds = {
        block: [sum(m.block_medians[block] * scale for m, scale in zip(measurements, scales, strict=True))]
        for block in blocks
    }
    return Measurement((*measurements[0].key, "all"), info, seconds)


@dataclass(frozen=True)
class Speedup:
    """Two variants of a forward pass that differ in one thing.

    Args:
        what: such as `FP16 over FP32, packed`.
        model: the model.
        workload: the lengths, or `all` for all of them together.
        slow: the variant compared with.
        fast: the variant that is judged.
        times: how many times as fast it is.
    """

    what: str
    model: str
    workload: str
    slow: Measurement
    fast: Measurement
    times: Spread

    @property
    def against_expectation(self) -> str:
        """`below`, `within` or `above` `FP16_EXPECTATION`; empty where none is stated."""
        slow, fast = self.slow.info, self.fast.info
        if (slow["dtype"], fast["dtype"]) != ("fp32", "fp16") or not _same(slow, fast, "layout"):
            return ""
        low, high = FP16_EXPECTATION
        return "below" if self.times.middle < low else "above" if self.times.middle > high else "within"


def precision_comparisons(results: Results) -> list[Speedup]:
    """Every other precision over FP32, in the same layout, at the same and at a larger budget."""
    return _compare(
        results,
        lambda info: info["dtype"] != "fp32",
        lambda info, other: other["dtype"] == "fp32" and _same(info, other, "layout"),
        lambda info, other: f"{info['dtype'].upper()} over FP32, {info['layout']}",
    )


def layout_comparisons(results: Results) -> list[Speedup]:
    """Packed over padded, sorted and in input order, in the same precision and at the same budget."""
    orders = {"padded": "", "padded_unsorted": " in input order"}
    return _compare(
        results,
        lambda info: info["layout"] == "packed",
        lambda info, other: other["layout"] in orders and _same(info, other, "dtype", "token_budget"),
        lambda info, other: f"packed over padded{orders[other['layout']]}, {info['dtype'].upper()}",
    )


def combined_comparisons(results: Results) -> list[Speedup]:
    """Packed in half precision over padded in FP32: both steps together."""
    return _compare(
        results,
        lambda info: info["layout"] == "packed" and info["dtype"] == "fp16",
        lambda info, other: (
            other["layout"] == "padded" and other["dtype"] == "fp32" and _same(info, other, "token_budget")
        ),
        lambda info, other: "FP16 packed over FP32 padded",
    )


def reproducible_comparisons(results: Results) -> list[Speedup]:
    """Packs of one size over ordinary packs, and CUDA graphs over single launches."""

    def is_base(info: Info, other: Info) -> bool:
        if not _same(info, other, "dtype"):
            return False
        if info["provider"] == "esm_packed_graphs":
            return bool(other["provider"] == "esm_packed")
        return bool(other["layout"] == "packed")

    def name(info: Info, other: Info) -> str:
        graphs = ", as CUDA graphs" if info["provider"] == "esm_packed_graphs" else ""
        base = "packed" if other["layout"] == "packed" else "the same, launched one by one"
        return f"packs of one size{graphs}, over {base}, {info['dtype'].upper()}"

    return _compare(results, lambda info: info["layout"] == "fixed", is_base, name, suite="reproducible")


def _same(one: Mapping[str, Any], other: Mapping[str, Any], *names: str) -> bool:
    return all(one.get(name) == other.get(name) for name in names)


def _compare(
    results: Results,
    is_judged: Callable[[Info], bool],
    is_base: Callable[[Info, Info], bool],
    name: Callable[[Info, Info], str],
    suite: str = "model",
) -> list[Speedup]:
    forward = results.suite(suite)
    base_budgets = {m.info["token_budget"] for m in forward if m.info["dtype"] == "fp32"}
    groups: dict[tuple[str, str], dict[str, Speedup]] = {}
    for fast in in_order(forward):
        info = fast.info
        if not is_judged(info):
            continue
        own_budget = bool(base_budgets) and info["token_budget"] not in base_budgets
        for slow in forward:
            if not (_same(info, slow.info, "model", "workload") and is_base(info, slow.info)):
                continue
            if not own_budget and not _same(info, slow.info, "token_budget"):
                continue
            what = name(info, slow.info) + (f", packs of {info['token_budget']:,}" if own_budget else "")
            if times := ratio(slow, fast):
                comparison = Speedup(what, info["model"], info["workload"], slow, fast, times)
                groups.setdefault((what, info["model"]), {})[info["workload"]] = comparison
    found: list[Speedup] = []
    for (what, model), by_workload in groups.items():
        found += by_workload.values()
        pairs = [(c.slow, c.fast) for c in by_workload.values()]
        if len(pairs) > 1 and (both := total(pairs)) and (times := ratio(*both)):
            found.append(Speedup(what, model, "all", *both, times))
    return found


def in_order(measurements: Iterable[Measurement]) -> list[Measurement]:
    """By model size as measured, workload, precision and layout."""

    def place(measurement: Measurement) -> tuple[Any, ...]:
        info = measurement.info
        workload, dtype = info.get("workload") or "", info.get("dtype") or ""
        return (
            model_size(info.get("model") or ""),
            WORKLOADS.index(workload) if workload in WORKLOADS else len(WORKLOADS),
            workload,
            DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES),
            info.get("layout") or "",
            info.get("token_budget") or 0,
        )

    return sorted(measurements, key=place)


def model_size(name: str) -> float:
    """Millions of parameters that the name of an ESM-2 model states, 0 where it states none."""
    for part in short_model(name).split("_"):
        if part[:-1].isdigit() and part[-1] in "MB":
            return float(part[:-1]) * (1000 if part[-1] == "B" else 1)
    return 0.0


def short_model(name: str) -> str:
    """`random:esm2_t33_650M_UR50D` as `650M`, other names as they are."""
    parts = name.rpartition(":")[2].split("_")
    return parts[2] if len(parts) == 4 and parts[0] == "esm2" else name


def rival_groups(results: Results) -> dict[tuple[str, str], list[Measurement]]:
    """Model and workload to the contenders, the fastest first."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in in_order(results.suite("peers")):
        groups.setdefault((m.info["model"], m.info["workload"]), []).append(m)
    return {key: sorted(group, key=lambda m: m.seconds.middle) for key, group in groups.items()}


def achieved(kernel: Measurement) -> float:
    """Bytes or floating-point operations per second, whichever bounds the operation."""
    amount = "bytes" if kernel.info["ceiling_name"] == "copy" else "flops"
    return float(kernel.info[amount]) / kernel.seconds.middle


def stage_seconds(measurement: Measurement) -> dict[str, float]:
    """Seconds of each stage, and of `other`: what the pipeline's wall time leaves of the whole run."""
    stages = measurement.info["stages"]
    rest = max(0.0, float(measurement.info["seconds"]) - float(stages["wall"]))
    return {**{stage: float(stages[stage]) for stage in STAGES}, "other": rest}


def scaling_series(results: Results) -> dict[str, list[Measurement]]:
    """Engine, model and lengths to measurements by number of workers."""
    series: dict[str, list[Measurement]] = {}
    for m in in_order(m for m in results.measurements.values() if m.info.get("workers") is not None):
        names = (m.info["provider"], short_model(m.info["model"] or ""), m.info["workload"])
        series.setdefault(" ".join(name for name in names if name), []).append(m)
    return {label: sorted(group, key=lambda m: int(m.info["workers"])) for label, group in series.items()}


_WORK = ("sequences", "useful_tokens", "flops", "bytes")
"""Variants of the same name that differ in these cannot be compared."""


@dataclass(frozen=True)
class Change:
    """A variant in this file and in an older one.

    Args:
        measurement: in this file.
        before: in the older one.
        times: how many times as long it takes now: ratio of medians, and the extremes over blocks.
        mark: `slower` or `faster` when it is outside the spread from block to block, else empty.
    """

    measurement: Measurement
    before: Measurement
    times: Spread
    mark: str


def changes(results: Results, older: Results) -> list[Change]:
    """Variants that both files hold and that do the same work in both, those that became slowest first.

    A mark needs at least two blocks in both files, and a gap between the ranges of the blocks' medians that
    is wider than either range: ranges of three blocks fail to touch by chance one time in ten.
    """
    found = []
    for key, measurement in results.measurements.items():
        before = older.measurements.get(key)
        if before is None or not _same(measurement.info, before.info, *_WORK):
            continue
        now, then = list(measurement.block_medians.values()), list(before.block_medians.values())
        blocks = min(len(now), len(then))
        mark = ""
        if blocks >= 2:
            spread = max(max(now) - min(now), max(then) - min(then))
            mark = (
                "slower"
                if min(now) - max(then) > spread
                else "faster"
                if min(then) - max(now) > spread
                else ""
            )
        times = Spread(median(now) / median(then), min(now) / max(then), max(now) / min(then), blocks)
        found.append(Change(measurement, before, times, mark))
    return sorted(found, key=lambda change: -change.times.middle)
