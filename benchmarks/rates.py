"""Rates of the machine that times are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from esm_packed import kernels
from esm_packed.kernels.timing import time_call
from esm_packed.numerics import PRECISIONS, matmul_precision


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest copy from device memory to device memory."""
    num_bytes = 1 << (32 if device.type == "cuda" else 25)
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * num_bytes / min(time_call(lambda: target.copy_(source), device, 7))


def matmul_rate(device: torch.device, mode: str) -> float:
    """Floating-point operations per second of the fastest of some large square matrix multiplications.

    Values are random. On a GPU that is `torch.mm`; on a CPU, where libraries differ by a factor, it is what
    the model calls.

    Args:
        device: where it runs.
        mode: `fp16`, `bf16`, `tf32` or `fp32`.
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mode, torch.float32)
    left = torch.empty(size, size, dtype=dtype, device=device).normal_()
    right = torch.empty(size, size, dtype=dtype, device=device).normal_()
    out = torch.empty(size, size, dtype=dtype, device=device)

    def multiply() -> object:
        if device.type == "cuda":
            return torch.mm(left, right, out=out)
        return kernels.linear(left, right, out[0])

    with matmul_precision(PRECISIONS[mode]):
        return 2 * size**3 / min(time_call(multiply, device, 10))


def library_rates() -> dict[str, float]:
    """Floating-point operations per second of a linear layer of 1,024 x 1,024 x 1,024 in each CPU library.

    PyTorch hands `F.linear` in FP32 to MKL where it was built with it, else to another BLAS; what it calls
    oneDNN is asked for by name.
    """
    size = 1024
    states, weight = torch.randn(size, size), torch.randn(size, size)
    bias = torch.zeros(size)
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    calls: dict[str, Callable[[], object]] = {
        "MKL FP32" if has_mkl else "BLAS FP32": lambda: F.linear(states, weight, bias)
    }
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for dtype in (torch.float32, torch.bfloat16):
            operands = [tensor.to(dtype) for tensor in (states, weight, bias)]
            calls[f"oneDNN {'FP32' if dtype == torch.float32 else 'BF16'}"] = partial(
                torch.ops.mkldnn._linear_pointwise, *operands, "none", [], ""
            )
    cpu = torch.device("cpu")
    with torch.inference_mode():
        return {name: 2 * size**3 / min(time_call(call, cpu, 10)) for name, call in calls.items()}
