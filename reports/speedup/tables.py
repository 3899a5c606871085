"""The tables of the speedup report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esm_packed.reports.page import Table
from esm_packed.reports.speedup.results import (
    FP16_EXPECTATION,
    MIN_BLOCKS,
    STAGES,
    Change,
    Measurement,
    Results,
    Speedup,
    Spread,
    achieved,
    in_order,
    ratio,
    rival_groups,
    scaling_series,
    short_model,
    stage_seconds,
)

PROVIDER_NAMES = {
    "esm_packed": "esm-packed",
    "fair_esm": "fair-esm",
    "transformers": "transformers",
    "transformers_unsorted": "transformers, input order",
    "transformers_compiled": "transformers, compiled",
    "esm_packed_transformers": "esm-packed as transformers",
    "esm_packed_transformers_unsorted": "esm-packed as transformers, input order",
    "faesm": "faesm",
    "esm_efficient": "esm-efficient",
    "esm_cpp": "esm-cpp",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "floor_matmul_mm": "floor: matmuls by torch.mm",
    "floor_matmul_best": "floor: matmuls, best library",
    "floor_attention": "floor: attention alone",
    "first_fit_decreasing": "packed, first-fit decreasing",
    "padded_sorted": "padded, sorted",
    "padded_unsorted": "padded, input order",
}

EXPECTED = "expected {}x to {}x".format(*FP16_EXPECTATION)
"""Header of the column that compares FP16 over FP32 with the expectation."""


def time_text(seconds: float | None) -> str:
    """Seconds with three digits and a unit."""
    if seconds is None:
        return ""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return (
                f"{seconds * factor:.3g} {unit}"
                if seconds * factor < 1000
                else f"{seconds * factor:,.0f} {unit}"
            )
    return ""


def spread_text(spread: Spread) -> str:
    """`1.2 s (1.1 s to 1.3 s)`, or the time alone where there are too few blocks for a range."""
    low, high = spread.ends
    if low == high:
        return time_text(spread.middle)
    return f"{time_text(spread.middle)} ({time_text(low)} to {time_text(high)})"


def times_text(times: Spread) -> str:
    """`2.4x (2.1 to 2.5)`, or `2.4x (n = 1, no range)`."""
    if times.blocks < MIN_BLOCKS:
        return f"{times.middle:.2f}x (n = {times.blocks}, no range)"
    return f"{times.middle:.2f}x ({times.low:.2f} to {times.high:.2f})"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _memory(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f} GiB"


def _rate(value: float | None, unit: str) -> str:
    """A rate with an SI prefix."""
    if value is None:
        return ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def comparison_table(comparisons: Sequence[Speedup], *, expected: bool = False) -> Table:
    """Times of both variants, the ratio, and what else changes.

    Args:
        comparisons: a row for each.
        expected: compare FP16 over FP32 with `FP16_EXPECTATION`.
    """
    headers = (
        "comparison", "model", "lengths", "time before", "time after", "times as fast (range of blocks)",
        EXPECTED, "fewer operations", "time saved", "tokens/s after", "sequences/s after",
        "peak memory before", "peak memory after",
    )  # fmt: skip
    rows = []
    for c in comparisons:
        before, after = (m.info.get("computed_flops") for m in (c.slow, c.fast))
        rows.append(
            [
                c.what,
                short_model(c.model),
                c.workload,
                spread_text(c.slow.seconds),
                spread_text(c.fast.seconds),
                times_text(c.times),
                c.against_expectation if expected else "",
                f"{before / after:.2f}x" if before and after else "",
                _percent(1 - 1 / c.times.middle) if c.times.middle >= 1 else "",
                _count(c.fast.rate("useful_tokens")),
                _count(c.fast.rate("sequences")),
                _memory(c.slow.info.get("peak_memory_bytes")),
                _memory(c.fast.info.get("peak_memory_bytes")),
            ]
        )
    return without_empty_columns(Table(headers, rows))


def forward_table(results: Results) -> Table:
    """Every forward pass."""
    headers = (
        "model", "lengths", "precision", "layout", "budget", "time (p20 to p80)", "tokens/s", "sequences/s",
        "padding", "MFU, measured rate", "MFU, datasheet", "share of the floor", "peak memory", "launches",
        "relative error", "attention",
    )  # fmt: skip
    rows = []
    for m in in_order(results.suite("model")):
        info = m.info
        rows.append(
            [
                short_model(info["model"]),
                info["workload"],
                info["dtype"],
                info["layout"],
                _count(info["token_budget"]),
                spread_text(m.seconds),
                _count(m.rate("useful_tokens")),
                _count(m.rate("sequences")),
                _percent(1 - info["useful_tokens"] / info["padded_tokens"]),
                _percent(m.share("mfu_measured")),
                _percent(m.share("mfu_datasheet")),
                _percent(m.share("share_of_floor")),
                _memory(info["peak_memory_bytes"]),
                _count(info["launches"]),
                _error(info["relative_error"]),
                info["backend"] or "",
            ]
        )
    return without_empty_columns(Table(headers, rows))


def contender(measurement: Measurement) -> str:
    """Provider and precision."""
    info = measurement.info
    name = PROVIDER_NAMES.get(info["provider"], info["provider"])
    return name if info["provider"].startswith("floor") else f"{name}, {info['dtype'].upper()}"


def rivals_table(results: Results) -> Table:
    """Contenders side by side; ratios to esm-packed in the same precision."""
    headers = (
        "model", "lengths", "contender", "tokens a batch", "time (p20 to p80)", "tokens/s", "sequences/s",
        "padding", "esm-packed is", "peak memory", "relative error to FP64", "how",
    )  # fmt: skip
    rows = []
    for (model, workload), group in rival_groups(results).items():
        own = {m.info["dtype"]: m for m in group if m.info["provider"] == "esm_packed"}
        for m in group:
            info = m.info
            is_floor = info["provider"].startswith("floor")
            ours = own.get(info["dtype"])
            times = ratio(m, ours) if ours is not None and ours is not m and not is_floor else None
            rows.append(
                [
                    short_model(model),
                    workload,
                    contender(m),
                    _count(info["token_budget"]),
                    spread_text(m.seconds),
                    "" if is_floor else _count(m.rate("useful_tokens")),
                    "" if is_floor else _count(m.rate("sequences")),
                    _percent(1 - info["useful_tokens"] / info["padded_tokens"]),
                    "" if times is None else f"{times_text(times)} as fast",
                    _memory(info["peak_memory_bytes"]),
                    _error(info["relative_error"]),
                    info["backend"] or "",
                ]
            )
    return without_empty_columns(Table(headers, rows))


def not_run_table(results: Results) -> Table:
    """Benchmarks that could not run, with the reason."""
    rows = [
        [entry["test"].rpartition("::")[2].partition("[")[0], entry["outcome"], entry["reason"]]
        for entry in results.not_run
    ]
    return Table(("benchmark", "outcome", "reason"), rows)


def kernels_table(measurements: Sequence[Measurement]) -> Table:
    """Kernels or attention backends and the ceilings of the same run."""
    headers = (
        "operation", "model", "lengths", "precision", "provider", "time of one launch (p20 to p80)",
        "achieved", "ceiling", "share of the ceiling", "relative error",
    )  # fmt: skip
    rows = []
    for m in measurements:
        info = m.info
        unit = "B/s" if info["ceiling_name"] == "copy" else "FLOP/s"
        rows.append(
            [
                info["operation"],
                info["model"],
                info["workload"],
                info["dtype"],
                info["provider"],
                spread_text(m.seconds),
                _rate(achieved(m), unit),
                _rate(info["ceiling_per_second"], unit),
                _percent(achieved(m) / info["ceiling_per_second"]),
                _error(info["relative_error"]),
            ]
        )
    return Table(headers, rows)


def packing_table(results: Results) -> Table:
    """The packer and padded batches."""
    headers = (
        "lengths", "budget", "batches", "number of batches", "useful share of the budget",
        "padding among computed tokens", "sequences", "time to plan (p20 to p80)",
    )  # fmt: skip
    rows = [
        [
            m.info["workload"],
            _count(m.info["token_budget"]),
            PROVIDER_NAMES.get(m.info["provider"], m.info["provider"]),
            _count(m.info["num_packs"]),
            _percent(m.info["efficiency"]),
            _percent(m.info["padding_share"]),
            _count(m.info["sequences"]),
            spread_text(m.seconds),
        ]
        for m in in_order(results.suite("packing"))
    ]
    return Table(headers, rows)


def end_to_end_table(results: Results) -> Table:
    """FASTA to HDF5; stages are those of the block with the median time."""
    headers = (
        "model", "lengths", "precision", "wall time (p20 to p80)", "tokens/s", "sequences/s",
        *STAGES, "pipeline", "other", "MFU, measured rate", "peak memory", "relative error",
    )  # fmt: skip
    rows = []
    for m in in_order(results.suite("end_to_end")):
        stages = stage_seconds(m)
        rows.append(
            [
                short_model(m.info["model"]),
                m.info["workload"],
                m.info["dtype"],
                spread_text(m.seconds),
                _count(m.rate("useful_tokens")),
                _count(m.rate("sequences")),
                *(time_text(stages[stage]) for stage in STAGES),
                time_text(m.info["stages"]["wall"]),
                time_text(stages["other"]),
                _percent(m.share("mfu_measured")),
                _memory(m.info["peak_memory_bytes"]),
                _error(m.info["relative_error"]),
            ]
        )
    return without_empty_columns(Table(headers, rows))


def scaling_table(results: Results) -> Table:
    """Throughput and efficiency by number of workers."""
    rows = []
    for label, group in scaling_series(results).items():
        first = group[0]
        for m in group:
            in_time = ratio(first, m)
            if in_time is None:
                continue
            times = in_time.middle * m.info["useful_tokens"] / first.info["useful_tokens"]
            workers = int(m.info["workers"]) / int(first.info["workers"])
            rows.append(
                [
                    label,
                    str(m.info["workers"]),
                    spread_text(m.seconds),
                    _count(m.tokens_per_second),
                    f"{times:.2f}x",
                    _percent(times / workers),
                ]
            )
    headers = ("run", "workers", "time (p20 to p80)", "tokens/s", "times as fast", "efficiency")
    return Table(headers, rows)


def machine_name(results: Results) -> str:
    """The GPU, or else the processor and how many cores of it."""
    if results.on_gpu:
        return str(results.machine["gpu"])
    return _cpu_name(results)


def _cpu_name(results: Results) -> str:
    return f"{results.machine.get('cpu_model', 'unknown processor')}, {results.cores} cores"


_INSTRUCTION_SETS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "bf16", "sve", "sve2", "i8mm",
)  # fmt: skip
"""Those of x86 and Arm that decide the speed of matrix multiplications, as /proc/cpuinfo spells them."""


def _instruction_sets(machine: Mapping[str, Any]) -> list[str]:
    flags = machine.get("cpu", {}).get("flags") or ()
    return [name for name in _INSTRUCTION_SETS if name in flags]


def processor_text(results: Results) -> str:
    """Name, vendor, family, model and stepping; virtual machines often name no more than the vendor."""
    found = results.machine.get("cpu", {})
    parts = [found["vendor_id_raw"]] if "vendor_id_raw" in found else []
    parts += [f"{name} {found[name]}" for name in ("family", "model", "stepping") if name in found]
    return f"{_cpu_name(results)} ({', '.join(parts)})" if parts else _cpu_name(results)


def variant_name(measurement: Measurement) -> str:
    """Test and parameters as one line."""
    test, *params = measurement.key
    values = [param.partition("=")[2] for param in params]
    return " ".join([test.removeprefix("test_"), *(short_model(value) for value in values)])


def changes_table(found: Sequence[Change]) -> Table:
    """Before, now, and the mark."""
    rows = [
        [
            variant_name(c.measurement),
            spread_text(c.before.seconds),
            spread_text(c.measurement.seconds),
            times_text(c.times),
            c.mark,
        ]
        for c in found
    ]
    headers = (
        "benchmark",
        "before (p20 to p80)",
        "now (p20 to p80)",
        "times as long (range of blocks)",
        "mark",
    )
    return Table(headers, rows)


def conditions_table(results: Results) -> Table:
    """Machine, versions, commit and command."""
    machine = results.machine
    state = machine.get("gpu_state") or {}
    packages = machine.get("packages") or {"torch": machine.get("torch")}
    commit = machine.get("git_commit")
    rows = {
        "machine": machine_name(results),
        "processor": processor_text(results),
        "instruction sets": ", ".join(_instruction_sets(machine)),
        "matrix multiplications": ", ".join(
            f"{library} {rate / 1e9:.0f} GFLOP/s"
            for library, rate in (machine.get("cpu_matmul_rates") or {}).items()
        ),
        "GPU driver, clocks": ", ".join(f"{name} {value}" for name, value in state.items()),
        "CUDA": machine.get("cuda"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "TF32 and reductions": ", ".join(f"{k} {v}" for k, v in (machine.get("tf32") or {}).items()),
        "CPU threads": machine.get("threads"),
        "highest load of the machine": None if results.load is None else f"{results.load:.1f}",
        "system": machine.get("system"),
        "date": results.date,
        "commit": commit,
        "command": machine.get("command"),
        "result file": results.path.name,
    }
    return Table(("condition", "value"), [[name, str(value)] for name, value in rows.items() if value])


_RATES_AND_SHARES = (
    "tokens_per_second",
    "sequences_per_second",
    "flops_per_second",
    "bytes_per_second",
    "per_second",
    "mfu_measured",
    "mfu_datasheet",
    "share_of_floor",
    "share_of_ceiling",
)
_OF_ONE_BLOCK = ("block", "seconds", "ratio", "forward_seconds", "load_average")


def measurement_rows(results: Results) -> Iterator[dict[str, Any]]:
    """One row for each variant: all simple fields of its record, rates for the median of all its times."""
    for m in results.measurements.values():
        simple = {
            k: m.share(k) if k in _RATES_AND_SHARES else v
            for k, v in m.info.items()
            if not isinstance(v, list | dict) and k not in _OF_ONE_BLOCK
        }
        spread = m.seconds
        yield {
            "variant": variant_name(m),
            "blocks": len(m.blocks),
            "seconds_p20": spread.low,
            "seconds_median": spread.middle,
            "seconds_p80": spread.high,
            **simple,
        }


def measurements_table(results: Results) -> Table:
    """All fields of all variants, for a spreadsheet; unknown values are empty."""
    rows = list(measurement_rows(results))
    headers = list(dict.fromkeys(name for row in rows for name in row))
    return Table(headers, [["" if row.get(h) is None else str(row[h]) for h in headers] for row in rows])


def other_table(measurements: Sequence[Measurement]) -> Table:
    """Benchmarks of any suite."""
    headers = ("suite", "benchmark", "time (p20 to p80)", "tokens/s", "sequences/s", "bytes/s")
    rows = []
    for m in measurements:
        rows.append(
            [
                m.suite,
                variant_name(m),
                spread_text(m.seconds),
                _count(m.rate("useful_tokens")),
                _count(m.rate("sequences")),
                _rate(m.rate("bytes"), "B/s"),
            ]
        )
    return without_empty_columns(Table(headers, rows))


def without_empty_columns(table: Table) -> Table:
    """The table without empty columns, such as memory on a CPU."""
    kept = [index for index in range(len(table.headers)) if any(row[index] for row in table.rows)]
    if not table.rows:
        return table
    return Table([table.headers[i] for i in kept], [[row[i] for i in kept] for row in table.rows])
