"""Precision modes, and torch's global switches, which a forward pass must not inherit."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DType = str | torch.dtype | np.dtype[Any] | type[np.generic]


@dataclass(frozen=True)
class Precision:
    """Dtypes of a precision mode.

    Args:
        name: the mode.
        dtype: weights and the operands of matrix multiplications.
        residual_dtype: the residual stream between the layers.
        tf32: whether FP32 matrix multiplications may run on TF32 tensor cores.
    """

    name: str
    dtype: torch.dtype
    residual_dtype: torch.dtype
    tf32: bool = False

    @property
    def table_dtype(self) -> torch.dtype:
        """Dtype of rotary angles, softmax statistics and pooling: FP64 in the FP64 mode, else FP32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_below_fp32(self) -> bool:
        """Whether FP32 would be more accurate, and hold larger numbers than FP16."""
        return self.tf32 or self.dtype.itemsize < torch.float32.itemsize


PRECISIONS: dict[str, Precision] = {
    "fp64": Precision("fp64", torch.float64, torch.float64),
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "tf32": Precision("tf32", torch.float32, torch.float32, tf32=True),
    "fp16": Precision("fp16", torch.float16, torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, torch.float32),
}


_TORCH_NAMES = {
    "float64": "fp64",
    "double": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}
"""Torch's names of dtypes, by mode. torch.float32 means IEEE: TF32 is asked for by name."""


def resolve_device(name: str | torch.device) -> torch.device:
    """The device called `name`: `cpu`, `cuda`, `cuda:INDEX`, or `auto` for the first GPU, else the CPU.

    Raises:
        TypeError: `name` is neither a name nor a `torch.device`.
        ValueError: there is no such device, or it is not supported.
    """
    if not isinstance(name, (str, torch.device)):
        raise TypeError(f"device is {name!r}; pass 'auto', 'cpu', 'cuda' or 'cuda:INDEX', or a torch.device")
    if isinstance(name, str):
        name = name.lower()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {str(name)!r} is not one of auto, cpu, cuda, cuda:INDEX") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(
            f"device {device} is not supported: it has not been checked against fair-esm; use cpu"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch {torch.__version__} finds no CUDA device; use cpu")
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"device {device}: there are only {torch.cuda.device_count()}, from cuda:0 on")
    return device


def resolve_precision(name: DType | None, device: torch.device) -> Precision:
    """The mode called `name`, or the default of `device`: `fp16` on CUDA, `fp32` elsewhere.

    Args:
        name: one of `PRECISIONS`, or a dtype such as `torch.float16`, `"float16"`, `"half"` or
            `numpy.float16`.
        device: what it is to run on.

    Raises:
        ValueError: unknown mode, or TF32 on a device without it.
    """
    if name is None:
        name = "fp16" if device.type == "cuda" else "fp32"
    if isinstance(name, type) and issubclass(name, np.generic):
        name = np.dtype(name)
    torch_name = str(name).lower().removeprefix("torch.")
    mode = _TORCH_NAMES.get(torch_name, torch_name)
    if mode not in PRECISIONS:
        raise ValueError(f"dtype {name!r} is not known; choose from {', '.join(PRECISIONS)}")
    if mode == "tf32" and device.type != "cuda":
        raise ValueError(f"dtype 'tf32' needs a CUDA device, not {device}; choose 'fp32'")
    return PRECISIONS[mode]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a device or this process ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(
        text in str(error) for text in ("DefaultCPUAllocator", "std::bad_alloc", os.strerror(errno.ENOMEM))
    )


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Set torch's global matrix-multiplication switches as `precision` requires, then restore them.

    FP32 runs in IEEE arithmetic unless the mode is TF32; half types accumulate and reduce in FP32.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    wanted = [
        (cuda, "fp32_precision", "tf32" if precision.tf32 else "ieee"),
        (cpu, "fp32_precision", "ieee"),
        (cuda, "allow_fp16_reduced_precision_reduction", False),
        (cuda, "allow_bf16_reduced_precision_reduction", False),
        (cuda, "allow_fp16_accumulation", False),
    ]
    before = [getattr(module, switch) for module, switch, _ in wanted]
    try:
        for module, switch, value in wanted:
            setattr(module, switch, value)
        yield
    finally:
        for (module, switch, _), value in zip(wanted, before, strict=True):
            setattr(module, switch, value)
