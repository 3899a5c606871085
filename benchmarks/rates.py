"""The rates of the machine that times are held against."""

from __future__ import annotations

import torch

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
