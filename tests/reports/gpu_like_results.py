"""A SYNTHETIC result file in the shape of a GPU run: seeded numbers that nobody measured, for tests."""

from __future__ import annotations

import random
from typing import Any

SEED = 0
BLOCKS = 5
MODELS = {"random:esm2_t6_8M_UR50D": 8.0, "random:esm2_t33_650M_UR50D": 650.0}
WORKLOADS = {
    "short50": 0.1,
    "medium150": 0.06,
    "long300": 0.05,
    "uniref": 0.2,
    "viral": 0.3,
    "constant1024": 0.0,
}
"""Share of padding in sorted batches."""

TIMES_FP32 = {"fp32": 1.0, "tf32": 0.35, "fp16": 0.12, "bf16": 0.125}
USEFUL_TOKENS = 131_072
_FIELDS = (
    "provider",
    "model",
    "workload",
    "dtype",
    "layout",
    "token_budget",
    "backend",
    "padded_tokens",
    "flops",
    "mfu_measured",
    "mfu_datasheet",
    "bytes",
    "peak_memory_bytes",
    "max_error",
    "relative_error",
    "launches",
)


def make(slower: float = 1.0, seed: int = SEED) -> dict[str, Any]:
    """What pytest-benchmark would have written.

    Args:
        slower: factor on the times of FP16.
        seed: of the noise on all times.
    """
    rng = random.Random(seed)
    benchmarks: list[dict[str, Any]] = []

    def add(suite: str, test: str, seconds: float, params: dict[str, Any], **info: Any) -> None:
        for block in range(BLOCKS):
            rounds = [seconds * rng.uniform(0.97, 1.03) for _ in range(3)]
            filled: dict[str, Any] = (
                dict.fromkeys(_FIELDS) | {"suite": suite, "block": block, "sequences": 400} | info
            )
            filled |= {"useful_tokens": USEFUL_TOKENS, "seconds": sorted(rounds)[1]}
            filled["tokens_per_second"] = USEFUL_TOKENS / filled["seconds"]
            every = {"block": block, **params}
            name = f"{test}[{'-'.join(str(value) for value in every.values())}]"
            benchmarks.append(
                {
                    "name": name,
                    "group": suite,
                    "params": every,
                    "extra_info": filled,
                    "stats": {"data": rounds, "rounds": len(rounds)},
                }
            )

    for model, size in MODELS.items():
        for workload, padding in WORKLOADS.items():
            for dtype, times in TIMES_FP32.items():
                for layout, budget in (("packed", 32768), ("padded", 32768), ("packed", 65536)):
                    if budget == 65536 and dtype != "fp16":
                        continue
                    params = {
                        "model": model,
                        "workload": workload,
                        "dtype": dtype,
                        "layout": layout,
                        "token_budget": budget,
                    }
                    waste = 1 / (1 - padding) if layout == "padded" else 1.0
                    factor = slower if dtype == "fp16" else 1.0
                    half = dtype in ("fp16", "bf16")
                    add(
                        "model",
                        "test_model",
                        size * 5e-3 * times * waste * factor * (0.97 if budget > 32768 else 1.0),
                        params,
                        **params,
                        provider="esm_packed",
                        backend="sdpa, masked" if layout == "padded" else "varlen" if half else "triton",
                        padded_tokens=round(USEFUL_TOKENS * waste),
                        flops=2e6 * size * USEFUL_TOKENS,
                        mfu_measured=0.6,
                        mfu_datasheet=0.45,
                        peak_memory_bytes=round(size * (2 if half else 4) * 1.3e6 * budget / 32768),
                        share_of_floor=0.6,
                        computed_flops=1e15 * waste,
                        relative_error={"fp32": 2e-7, "tf32": 4e-4, "fp16": 2e-4, "bf16": 4e-3}[dtype],
                        launches=400,
                    )
        for provider, layout, times in (
            ("esm_packed", "packed", 1.0),
            ("esm_packed", "fixed", 1.02),
            ("esm_packed_graphs", "fixed", 0.8),
        ):
            params = {"model": model, "provider": provider, "layout": layout}
            add(
                "reproducible",
                "test_reproducible",
                size * 6e-4 * times,
                params,
                **params,
                workload="uniref",
                dtype="fp16",
                token_budget=32768,
                padded_tokens=USEFUL_TOKENS,
            )
        rivals = {
            ("esm_packed", "fp32"): 1.0,
            ("esm_packed", "fp16"): 0.12 * slower,
            ("fair_esm", "fp32"): 1.9,
            ("fair_esm", "fp16"): 0.5,
            ("transformers", "fp32"): 1.4,
            ("transformers", "fp16"): 0.3,
            ("transformers_compiled", "fp16"): 0.22,
            ("esm_efficient", "fp16"): 0.2,
        }
        for (provider, dtype), times in rivals.items():
            params = {"model": model, "workload": "uniref", "provider": provider, "dtype": dtype}
            packed = provider in ("esm_packed", "esm_efficient")
            add(
                "peers",
                "test_peer",
                size * 5e-3 * times,
                params,
                **params,
                padded_tokens=USEFUL_TOKENS if packed else 160_000,
                relative_error=2e-7 if dtype == "fp32" else 3e-4,
                peak_memory_bytes=2_000_000_000,
                backend="synthetic",
            )
        for dtype in ("fp32", "fp16"):
            params = {"model": model, "workload": "uniref", "dtype": dtype}
            wall = size * 5e-3 * TIMES_FP32[dtype] + 0.5
            stages = {"reading": 0.3, "copying": 0.05, "computing": 0.9 * wall, "writing": 0.1, "wall": wall}
            add(
                "end_to_end",
                "test_end_to_end",
                wall + 0.8,
                params,
                **params,
                stages=stages,
                relative_error=3e-4,
                mfu_measured=0.5,
                mfu_datasheet=0.4,
            )
        for workers in (1, 2, 4, 8):
            params = {"model": model, "workload": "uniref", "workers": workers}
            add("runner", "test_scaling", size * 5e-2 / workers**0.96, params, provider="ray", **params)
    _add_kernels(add)
    for workload, padding in WORKLOADS.items():
        for provider, share in (
            ("first_fit_decreasing", 0.0),
            ("padded_sorted", padding / 8),
            ("padded_unsorted", 0.5),
        ):
            for sequences, budget in ((1000, 1024), (1000, 32768), (1_000_000, 1024), (1_000_000, 32768)):
                params = {
                    "workload": workload,
                    "token_budget": budget,
                    "sequences": sequences,
                    "planner": provider,
                }
                add(
                    "packing",
                    "test_packing",
                    1e-6 * sequences,
                    params,
                    provider=provider,
                    workload=workload,
                    token_budget=budget,
                    sequences=sequences,
                    num_packs=sequences // 90,
                    efficiency=0.998,
                    padding_share=share,
                )
    return {
        "machine_info": {
            "gpu": "SYNTHETIC GPU (nobody measured this)",
            "gpu_state": {"driver_version": "0", "clocks.max.sm": "0"},
            "cuda": "0.0",
            "cpu_model": "synthetic",
            "cpu_cores": 1,
            "packages": {"torch": "0"},
            "git_commit": "0" * 40,
            "command": "gpu_like_results.make()",
        },
        "datetime": "synthetic",
        "version": "synthetic",
        "benchmarks": benchmarks,
        "not_run": [
            {
                "test": "bench_peers.py::test_peer[0]",
                "outcome": "skipped",
                "reason": "faesm in fp16: synthetic",
            }
        ],
    }


def _add_kernels(add: Any) -> None:
    for operation in ("layer_norm", "add_layer_norm_", "bias_gelu_", "rotary_qk_", "embed_tokens"):
        for provider, share in (("ours", 0.9), ("torch", 0.4), ("torch_compile", 0.8)):
            params = {"operation": operation, "provider": provider, "model_size": "650M", "dtype": "float16"}
            add(
                "kernels",
                "test_kernel",
                1e8 / (share * 4e12),
                params,
                operation=operation,
                provider=provider,
                model="650M",
                workload="uniref",
                dtype="fp16",
                bytes=1e8,
                ceiling_name="copy",
                ceiling_per_second=4e12,
                bandwidth_ceiling=4e12,
            )
    for operation, flops, num_bytes in (("packed_attention", 4e10, 2e8), ("gemm_bias_gelu", 2e11, 1.5e8)):
        for dtype, peak in (("fp16", 7e14), ("fp32", 5e13)):
            for provider, share in (("ours", 0.55), ("varlen", 0.6)):
                params = {"operation": operation, "provider": provider, "model_size": "650M", "dtype": dtype}
                add(
                    "kernels",
                    "test_kernel",
                    flops / (share * peak),
                    params,
                    operation=operation,
                    provider=provider,
                    model="650M",
                    workload="uniref",
                    dtype=dtype,
                    flops=flops,
                    bytes=num_bytes,
                    ceiling_name=dtype,
                    ceiling_per_second=peak,
                    bandwidth_ceiling=4e12,
                )
    for workload in WORKLOADS:
        for backend, share in (("varlen", 0.6), ("triton", 0.5), ("sdpa", 0.1)):
            params = {"workload": workload, "dtype": "fp16", "backend": backend}
            add(
                "attention",
                "test_attention",
                4e10 / (share * 7e14),
                params,
                operation="packed_attention",
                provider=backend,
                model="650M",
                workload=workload,
                dtype="fp16",
                backend=backend,
                flops=4e10,
                bytes=2e8,
                ceiling_name="fp16",
                ceiling_per_second=7e14,
                bandwidth_ceiling=4e12,
            )
