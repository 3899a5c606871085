"""Where the time of a forward pass goes: kernels by their position in a layer, and launches alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_baselines import KERNELS, MODEL_SIZES
from workloads import token_lengths

from esm_packed import kernels
from esm_packed.attention import BackendError, select_backend
from esm_packed.config import ESM2Config
from esm_packed.kernels.cases import CASES, Workload
from esm_packed.kernels.timing import Rounds, num_buffers
from esm_packed.numerics import PRECISIONS, matmul_precision

Save = Callable[[dict[str, Any]], None]
Kernels = Sequence[tuple[str, float]]

LAYER_LAUNCHES = (
    *("qkv", "rotary", "attention", "attention_out", "attention_add_norm"),
    *("fc1", "bias_gelu", "fc2", "ffn_add_norm"),
)
"""Launches of a layer on a GPU, in order."""

FUSED = {"rotary": "gemm_bias_rotary", "bias_gelu": "gemm_bias_gelu"}
"""Launches that tuning may leave to the matrix multiplication before, and the kernel that then takes both."""

MATMUL_ROWS = {"cuda": (16_384, 32_768, 33_792, 65_536), "cpu": (64, 96)}
MATMUL_SIZES = {"cuda": ("650M", "3B"), "cpu": ("8M",)}
MATMUL_ROUNDS = {"cuda": 7, "cpu": 2}
COUNTED = ("packed_attention", "bias_gelu_", "add_layer_norm_", *FUSED.values())
COUNTED_TOKENS = {"cuda": 16_384, "cpu": 64}


def gpu_kernels(function: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and microseconds of each GPU kernel of one warm call, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    events = [
        event
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation and " Sync" not in event.name
    ]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name[:120], event.time_range.elapsed_us()) for event in events]


def layer_period(names: Sequence[str], num_layers: int) -> tuple[int, int] | None:
    """Where the layers begin among the kernels of a pass, and how many kernels each has; None if none repeat.

    The kernels of a layer are the shortest run of names that follows itself `num_layers` times. The LayerNorm
    before the first layer is the kernel that ends each layer, so of several beginnings the last is right.
    """
    for period in range(1, len(names) // num_layers + 1):
        repeated = period * (num_layers - 1)
        for first in range(len(names) - period * num_layers, -1, -1):
            if all(names[index] == names[index + period] for index in range(first, first + repeated)):
                return first, period
    return None


def layer_work(workload: Workload, dtype: torch.dtype) -> dict[str, tuple[str, float]]:
    """Minimum work of each of `LAYER_LAUNCHES`: `flops` or `bytes`, and the amount."""
    per_product = 2.0 * workload.total_tokens * workload.shape.hidden_size**2
    work: dict[str, tuple[str, float]] = {
        name: ("flops", factor * per_product)
        for name, factor in (("qkv", 3), ("attention_out", 1), ("fc1", 4), ("fc2", 4))
    }
    work["attention"] = ("flops", 4.0 * workload.shape.hidden_size * workload.sum_of_squares)
    for name, case in (
        ("rotary", "rotary_qk_"),
        ("bias_gelu", "bias_gelu_"),
        ("attention_add_norm", "add_layer_norm_"),
        ("ffn_add_norm", "add_layer_norm_"),
    ):
        work[name] = ("bytes", float(CASES[case].bytes(workload, dtype)))
    return work


def by_position(profiled: Kernels, workload: Workload, config: ESM2Config, dtype: torch.dtype) -> Any:
    """Microseconds of each launch of a layer, mean over the layers, and the rate it reached.

    Returns:
        `gpu_microseconds` of all kernels, their `launches`, and under `layer` an entry for each launch; where
        the layers cannot be told apart, under `kernels` the totals by name.
    """
    total = sum(elapsed for _, elapsed in profiled)
    found: dict[str, Any] = {"gpu_microseconds": total, "launches": len(profiled)}
    period = layer_period([name for name, _ in profiled], config.num_layers)
    if period is None:
        totals: dict[str, float] = {}
        for name, elapsed in profiled:
            totals[name] = totals.get(name, 0.0) + elapsed
        return found | {"kernels": dict(sorted(totals.items(), key=lambda item: -item[1]))}
    first, length = period
    kernel_names = " ".join(name for name, _ in profiled[first : first + length])
    names = [name for name in LAYER_LAUNCHES if name not in FUSED or FUSED[name] not in kernel_names]
    work = layer_work(workload, dtype) if length == len(names) else {}
    found["layer"] = []
    for position in range(length):
        times = [profiled[first + layer * length + position][1] for layer in range(config.num_layers)]
        entry: dict[str, Any] = {
            "kernel": profiled[first + position][0],
            "microseconds": sum(times) / len(times),
            "share": sum(times) / total,
        }
        if work:
            name = names[position]
            unit, amount = work[name]
            entry |= {"name": name, f"{unit}_per_second": 1e6 * amount / entry["microseconds"]}
        found["layer"].append(entry)
    found["outside_layers_share"] = 1 - sum(entry["share"] for entry in found["layer"])
    return found


def matmuls(device: torch.device, save: Save, seconds: float) -> None:
    """The four matrix multiplications of a layer alone, as the model calls them, by number of rows."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {}
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with matmul_precision(PRECISIONS["fp16"]):
        for size in MATMUL_SIZES[device.type]:
            if time.monotonic() > end:
                found["stopped_early"] = True
                break
            found[size] = {}
            for rows in MATMUL_ROWS[device.type]:
                timed = _matmuls_of(MODEL_SIZES[size], rows, dtype, device)
                for _ in range(MATMUL_ROUNDS[device.type]):
                    for one, _ in timed.values():
                        one.prepare()
                        one.run()
                found[size][rows] = {
                    name: {
                        "seconds": one.median,
                        "all_seconds": one.seconds,
                        "flops_per_second": flops / one.median,
                    }
                    for name, (one, flops) in timed.items()
                }
                del timed
                save(found)


def _matmuls_of(
    config: ESM2Config, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Rounds, float]]:
    """Rounds of each multiplication, and its operations."""
    hidden, ffn = config.hidden_size, config.ffn_size
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    timed = {}
    for name, in_features, out_features in (
        ("qkv", hidden, 3 * hidden),
        ("attention_out", hidden, hidden),
        ("fc1", hidden, ffn),
        ("fc2", ffn, hidden),
    ):
        weight = torch.randn(out_features, in_features, dtype=dtype, device=device) * in_features**-0.5
        bias = torch.randn(out_features, dtype=dtype, device=device)
        num_bytes = rows * (in_features + out_features) * dtype.itemsize
        inputs = [
            torch.randn(rows, in_features, dtype=dtype, device=device)
            for _ in range(num_buffers(num_bytes, device))
        ]
        # The bias of fc1 is added by the kernel behind it.
        multiply: Callable[..., object] = F.linear if name == "fc1" else partial(kernels.linear, bias=bias)
        calls = [partial(multiply, hidden_states, weight) for hidden_states in inputs]
        timed[name] = Rounds(calls, device, pool=pool), 2.0 * rows * in_features * out_features
    return timed


def counted_launches(device: torch.device, save: Save, seconds: float) -> None:
    """The kernels that take most of our own time, each once between `cudaProfilerStart` and `Stop`."""
    config, dtype = MODEL_SIZES["650M"], torch.float16
    workload = Workload(config, token_lengths("uniref", COUNTED_TOKENS[device.type]), device)
    calls: dict[str, Callable[[], object]] = {
        name: partial(KERNELS[name].function, **KERNELS[name].arguments(workload, dtype))
        for name in COUNTED
        if device.type == "cuda" or not KERNELS[name].direct
    }
    try:
        _, varlen = select_backend("varlen", device, PRECISIONS["fp16"], config.head_dim)
    except BackendError:
        pass
    else:
        arguments = KERNELS["packed_attention"].arguments(workload, dtype)
        del arguments["input_precision"]
        calls["varlen"] = partial(varlen, *arguments.values())
    for name, call in calls.items():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
            with torch.cuda.profiler.profile():
                call()
                torch.cuda.synchronize()
        save({"launched": [*list(calls)[: list(calls).index(name) + 1]]})
