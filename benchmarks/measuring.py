"""The machine, and what a benchmark record says: the same fields in every suite, null where unknown."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rates import copy_rate, library_rates, matmul_rate

from esm_packed.config import ESM2Config
from esm_packed.numerics import PRECISIONS
from esm_packed.packing import SPECIAL_TOKENS
from esm_packed.reports.validation.run import cpu_name
from esm_packed.runners.state.cut import sequence_flops

REPOSITORY = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")

FIELDS = (
    "suite",
    "block",
    "provider",
    "model",
    "workload",
    "dtype",
    "layout",
    "token_budget",
    "backend",
    "sequences",
    "useful_tokens",
    "padded_tokens",
    "seconds",
    "tokens_per_second",
    "sequences_per_second",
    "flops",
    "computed_flops",
    "flops_per_second",
    "mfu_measured",
    "mfu_datasheet",
    "floor_seconds",
    "share_of_floor",
    "bytes",
    "bytes_per_second",
    "peak_memory_bytes",
    "max_error",
    "relative_error",
    "launches",
    "load_average",
)
"""`useful_tokens` counts BOS, residues and EOS, `padded_tokens` all that is computed, padding included,
as `flops` and `computed_flops` count operations.
`floor_seconds` is `forward_floor` and `share_of_floor` that over the time. `load_average` is
that of the machine over the last minute.
"""

_DENSE_TFLOPS: dict[str, dict[str, float]] = {
    r"A100": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    r"A10\b|A10G": {"fp16": 125, "bf16": 125, "tf32": 62.5, "fp32": 31.2},
    r"H100 PCIe": {"fp16": 756, "bf16": 756, "tf32": 378, "fp32": 51},
    r"H100.*HBM3|H200": {"fp16": 989, "bf16": 989, "tf32": 494, "fp32": 67},
    r"L40S": {"fp16": 362, "bf16": 362, "tf32": 183, "fp32": 91.6},
    r"L4\b": {"fp16": 121, "bf16": 121, "tf32": 60, "fp32": 30.3},
    r"RTX 4090": {"fp16": 165, "bf16": 165, "tf32": 82.6, "fp32": 82.6},
}
"""NVIDIA's datasheets, without sparsity, FP32 accumulation."""


def datasheet_rate(gpu: str | None, dtype: str) -> float | None:
    """Floating-point operations per second that the vendor states, or None where we do not know them."""
    for pattern, rates in _DENSE_TFLOPS.items():
        if gpu is not None and re.search(pattern, gpu):
            return 1e12 * rates[dtype] if dtype in rates else None
    return None


@cache
def measured_rate(name: str) -> float:
    """Rate of this machine, measured once: `copy` in bytes per second, else a precision mode's matmuls."""
    return copy_rate(DEVICE) if name == "copy" else matmul_rate(DEVICE, name)


def gpu_name() -> str | None:
    """The GPU that computes, None without one."""
    return torch.cuda.get_device_name(DEVICE) if ON_GPU else None


def flops_of(config: ESM2Config, residues: npt.ArrayLike) -> float:
    """Floating-point operations of a forward pass on useful tokens, without the language-model head."""
    return float(sequence_flops(np.asarray(residues, dtype=np.int64), config).sum())


def forward_floor(
    config: ESM2Config, residues: Sequence[int], dtype: str, token_budget: int
) -> tuple[float, float]:
    """Minimum work of a forward pass of the layers, and the time that this machine takes for it.

    All floating-point operations on useful tokens at the measured rate of matrix multiplications, and then
    the bytes that no fusion into these saves at the measured rate of copies: twice in each layer the residual
    stream and what is added to it are read, their sum is kept, and handed on normalized, all in the dtype of
    the mode; and each pack reads the weights.

    Args:
        config: shape of the model.
        residues: of each protein.
        dtype: precision mode.
        token_budget: tokens in a pack.

    Returns:
        Bytes, and seconds.
    """
    itemsize = PRECISIONS[dtype].dtype.itemsize
    tokens = sum(residues) + SPECIAL_TOKENS * len(residues)
    additions = 2 * config.num_layers * 4 * tokens * config.hidden_size * itemsize
    weights = config.num_layers * 12 * config.hidden_size**2 * itemsize * -(-tokens // token_budget)
    moved = float(additions + weights)
    return moved, flops_of(config, residues) / measured_rate(dtype) + moved / measured_rate("copy")


def record(benchmark: Any, seconds: float | None = None, **values: Any) -> dict[str, Any]:
    """Fill `benchmark.extra_info` with `FIELDS`, those not given or known being None, and further values.

    Args:
        benchmark: the fixture of pytest-benchmark, after its timing.
        seconds: of what `values` count; None for the median of the rounds.
        values: fields; rates and shares follow from them.

    Returns:
        The record.
    """
    if seconds is None and benchmark.stats is not None:  # None with --benchmark-disable
        seconds = median(benchmark.stats.stats.data)
    measured = {"seconds": seconds, "load_average": os.getloadavg()[0]}
    info: dict[str, Any] = dict.fromkeys(FIELDS) | values | measured
    if seconds:
        for amount, rate in (
            ("useful_tokens", "tokens_per_second"),
            ("sequences", "sequences_per_second"),
            ("flops", "flops_per_second"),
            ("bytes", "bytes_per_second"),
        ):
            info[rate] = None if info[amount] is None else info[amount] / seconds
    if seconds and info["floor_seconds"] is not None:
        info["share_of_floor"] = info["floor_seconds"] / seconds
    if info["flops_per_second"] is not None and info["dtype"] in ("fp16", "bf16", "tf32", "fp32"):
        info["mfu_measured"] = info["flops_per_second"] / measured_rate(info["dtype"])
        datasheet = datasheet_rate(gpu_name(), info["dtype"])
        info["mfu_datasheet"] = None if datasheet is None else info["flops_per_second"] / datasheet
    benchmark.extra_info.update(info)
    return info


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object], resident_bytes: int) -> int | None:
    """Most bytes of GPU memory that `run` allocates, plus `resident_bytes`; None on a CPU."""
    if not ON_GPU:
        return None
    gc.collect()  # an earlier model that is held by a cycle must not be freed within
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(DEVICE) - before + resident_bytes


def gpu_activities(run: Callable[[], object]) -> list[str] | None:
    """Names of the kernels and copies of one call in their order; None on a CPU."""
    if not ON_GPU:
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


def machine_info(command: Sequence[str]) -> dict[str, Any]:
    """Machine, versions and settings, for `machine_info` of pytest-benchmark.

    Args:
        command: arguments of pytest.
    """
    packages = (
        *("torch", "triton", "flash-attn", "fair-esm", "transformers", "faesm", "esm-efficient"),
        *("openvino", "onnxruntime"),
    )
    cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    found: dict[str, Any] = {
        "cpu_model": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_matmul_rates": None if ON_GPU else library_rates(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "packages": {package: _version(package) for package in packages},
        "torch": torch.__version__,
        "torch_libraries": _torch_libraries(),
        "cuda": torch.version.cuda,
        "gpu": gpu_name(),
        "gpu_count": torch.cuda.device_count(),
        "gpu_state": _nvidia_smi(),
        "tf32": {
            "matmul_fp32_precision": getattr(matmul, "fp32_precision", None),
            "fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
            "flash_sdp": cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        },
        "command": " ".join(["pytest", *command]),
        "git_commit": _git_commit(),
        "system": platform.platform(),
    }
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_libraries() -> list[str]:
    libraries = ("Math Kernel Library", "MKL-DNN", "CPU capability")
    lines = torch.__config__.show().splitlines()
    return [line.strip(" -") for line in lines if any(library in line for library in libraries)]


def _nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks in MHz, and power limit in W of the first GPU."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, map(str.strip, done.stdout.splitlines()[0].split(",")), strict=False))


def _git_commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
