"""The table at the end of `check.py`, made of its report alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

Report = Mapping[str, Any]
Key = tuple[str, str, str, str, str]


def summary_lines(report: Report) -> Iterator[str]:
    """Machine, steps, first forward pass, kernels, ratios and model, as far as they were measured."""
    steps = report["steps"]
    machine = report["machine"]
    yield " ".join(f"{name}={machine.get(name)}" for name in ("gpu", "driver", "torch", "triton", "cuda"))
    yield from _step_lines(steps)
    yield from _forward_lines(_found(steps, "forward"))
    yield from _matmul_lines(_found(steps, "matmuls"))
    yield from _budget_lines(_found(steps, "budgets"))
    yield from _counter_lines(steps.get("counters", {}).get("kernels", []))
    yield from _tuned_lines(_found(steps, "tuned_forward"))
    results = steps.get("kernel_benchmarks", {}).get("results", [])
    timed = [result for result in results if "seconds" in result]
    if timed:
        yield from _ceiling_lines(timed)
        yield from _kernel_lines(timed)
        yield from _ratio_lines(timed)
    yield from _model_lines(_found(steps, "model_speed"))
    yield from _memory_lines(_found(steps, "memory"))


def _found(steps: Report, name: str) -> Report:
    found: Report = steps.get(name, {}).get("found", {})
    return found


def _step_lines(steps: Report) -> Iterator[str]:
    for name, step in steps.items():
        counts = " ".join(f"{count} {outcome}" for outcome, count in step.get("counts", {}).items())
        yield f"{name:20}{step['status']:15}{step['seconds']:7.1f} s  {counts}"
        for test in list(step.get("failures", {}))[:6]:
            yield f"    failed: {test.split('::')[-1]}"
        for test in step.get("unfinished", []):
            yield f"    unfinished: {test.split('::')[-1]}"


def _forward_lines(found: Report) -> Iterator[str]:
    """The first forward pass, and each launch of a layer."""
    if "seconds" not in found:
        return
    yield (
        f"{found['model']} {found['dtype']} {found['attention_backend']}: {found['total_tokens']} tokens in "
        f"{1e3 * found['seconds']:.2f} ms, {found['tokens_per_second']:,.0f} tokens/s, "
        f"{found['share_of_matmul_rate']:.1%} of the measured matmul rate"
        + ", NOT FINITE"
        * (not found["finite"])
    )
    profile = found.get("profile", {})
    for position, entry in enumerate(profile.get("layer", [])):
        reached = "".join(
            f"{entry[key] / 1e12:8.2f} {unit}"
            for key, unit in (("flops_per_second", "TFLOP/s"), ("bytes_per_second", "TB/s"))
            if key in entry
        )
        name = entry.get("name", f"launch {position + 1}")
        time_us = f"{entry['microseconds']:9.1f} us{entry['share']:7.1%}"
        yield f"  {name:22}{time_us}{reached:17}  {entry['kernel'][:50]}"
    for name, time_us in list(profile.get("kernels", {}).items())[:12]:
        yield f"  {time_us:9.1f} us  {name[:90]}"


def _matmul_lines(found: Report) -> Iterator[str]:
    for size, rows in found.items():
        for count, products in rows.items() if isinstance(rows, Mapping) else ():
            rates = ", ".join(f"{name} {p['flops_per_second'] / 1e12:.1f}" for name, p in products.items())
            yield f"{size} at {int(count):,} rows, TFLOP/s: {rates}"


def _budget_lines(found: Report) -> Iterator[str]:
    for model, packs in found.items():
        if isinstance(packs, Mapping):
            rates = ", ".join(f"{int(n):,}: {p['tokens_per_second']:,.0f}" for n, p in packs.items())
            yield f"{model}, tokens/s by token budget: {rates}"


_COUNTERS = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "Registers Per Thread",
    "Achieved Occ",
)


def _counter_lines(kernels: Sequence[Report]) -> Iterator[str]:
    for kernel in kernels:
        metrics = (f"{k} {v}" for k, v in kernel["metrics"].items() if k.startswith(_COUNTERS))
        yield f"{kernel['kernel'][:40]:40} {', '.join(metrics)}"


def _tuned_lines(found: Report) -> Iterator[str]:
    if "seconds" in found:
        before, after = found["seconds"]["heuristic"], found["seconds"]["tuned"]
        yield (
            f"{found['model']} with {found['settings']} tuned settings: {1e3 * before:.2f} ms before, "
            f"{1e3 * after:.2f} ms with them, {before / after - 1:+.1%}"
        )


def _ceiling_lines(results: Sequence[Report]) -> Iterator[str]:
    rates = {result["ceiling_name"]: result["ceiling_per_second"] for result in results}
    parts = [
        f"{name} {rate / 1e12:.2f} TB/s" if name == "copy" else f"{name} {rate / 1e12:.0f} TFLOP/s"
        for name, rate in sorted(rates.items())
    ]
    yield "ceilings: " + ", ".join(parts)


def _key(result: Report) -> Key:
    return (
        result["operation"],
        result["provider"],
        result["model_size"],
        result["dtype"],
        result["lengths"],
    )


def _kernel_lines(results: Sequence[Report]) -> Iterator[str]:
    """Median over blocks: microseconds, and share of the ceiling."""
    shares: dict[Key, list[float]] = {}
    seconds: dict[Key, list[float]] = {}
    for result in results:
        shares.setdefault(_key(result), []).append(result["share_of_ceiling"])
        seconds.setdefault(_key(result), []).append(result["seconds"])
    yield f"{'operation':32}{'shape':28}{'us':>9}  share of ceiling: ours | others"
    for key, own in shares.items():
        operation, provider, *shape = key
        if provider not in ("ours", "fused"):
            continue
        others = ", ".join(
            f"{other[1]} {median(values):.0%}"
            for other, values in shares.items()
            if other[0] == operation and list(other[2:]) == shape and other[1] != provider
        )
        time_us = 1e6 * median(seconds[key])
        yield f"{operation:32}{' '.join(shape):28}{time_us:9.1f}  {median(own):6.1%} | {others}"


def _ratio_lines(results: Sequence[Report]) -> Iterator[str]:
    """Ratios are taken within a block."""
    seconds = {(_key(result), result["block"]): result["seconds"] for result in results}
    blocks = sorted({result["block"] for result in results})
    shapes = dict.fromkeys(_key(result)[2:] for result in results)
    wanted = [
        ("attention: varlen time / ours", ("packed_attention", "varlen"), ("packed_attention", "ours")),
        (
            "rotary: cu_seqlens form / position_ids form",
            ("rotary_qk_packed_", "ours"),
            ("rotary_qk_", "ours"),
        ),
        ("fc1: matmul + bias_gelu_ / fused", ("gemm_bias_gelu", "separate"), ("gemm_bias_gelu", "fused")),
        ("qkv: matmul + rotary_qk_ / fused", ("gemm_bias_rotary", "separate"), ("gemm_bias_rotary", "fused")),
        ("fc1: F.gelu(F.linear) / separate", ("gemm_bias_gelu", "torch"), ("gemm_bias_gelu", "separate")),
    ]
    for title, above, below in wanted:
        for shape in shapes:
            ratios = [
                seconds[(*above, *shape), block] / seconds[(*below, *shape), block]
                for block in blocks
                if ((*above, *shape), block) in seconds and ((*below, *shape), block) in seconds
            ]
            if ratios:
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                yield f"{title:46}{' '.join(shape):28}{median(ratios):6.2f}  ({spread})"


def _model_lines(found: Report) -> Iterator[str]:
    if not found:
        return
    yield f"{found.get('model')}: {found.get('total_tokens')} tokens, {found.get('num_sequences')} sequences"
    for variant, values in found.get("variants", {}).items():
        if "error" in values:
            yield f"  {variant:16}{values['error'][:90]}"
            continue
        peak, resident = values["peak_memory_bytes"], values["resident_memory_bytes"]
        memory = "" if peak is None else f"   peak {peak / 1e9:.2f} GB, of it weights {resident / 1e9:.2f} GB"
        yield (
            f"  {variant:16}{values['tokens_per_second']:12,.0f} tokens/s   "
            f"{values['share_of_matmul_rate']:6.1%} of the measured matmul rate{memory}"
        )
    if small := found.get("8M"):
        yield f"  8M, {small.get('total_tokens')} tokens: " + ", ".join(
            f"{name} {1e3 * small[name]:.2f} ms"
            for name in ("eager_seconds", "graph_seconds")
            if name in small
        )


def _memory_lines(found: Report) -> Iterator[str]:
    for model, values in found.items():
        if "bytes_per_token" in values:
            yield (
                f"{model}: weights {values['weight_bytes'] / 1e9:.2f} GB, "
                f"{values['bytes_per_token'] / 1e3:.1f} kB for each token, {values['over_least']:.2f} times "
                f"the least; {values['tokens_that_fit_into_80_GB']:,} tokens fit into 80 GB"
            )
