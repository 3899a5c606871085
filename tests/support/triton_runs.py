"""Runs of a case's Triton kernel and of its reference, and what lies around their tensors meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerances import assert_as_close_as_pytorch

from esm_packed.kernels.cases import CASES, Arguments

GUARD = 1 << 16
"""Poisoned elements on each side of arguments and results, more than a block holds."""


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """What stands in guards. It is no NaN: what is computed from it must differ from it."""
    return float("inf") if dtype.is_floating_point else True if dtype == torch.bool else -77


def is_poison(tensor: torch.Tensor) -> bool:
    return bool((tensor == poison_of(tensor.dtype)).all())


def call(name: str, function: Callable[..., Any], arguments: Arguments) -> list[torch.Tensor]:
    """What `function` returns, and then what it leaves in the argument it modifies."""
    return [result.cpu() for result in CASES[name].results(function, arguments).values()]


def run(name: str, arguments: Arguments, device: torch.device) -> list[torch.Tensor]:
    """The results of the Triton kernel on copies of `arguments`."""
    return call(name, CASES[name].function, moved(arguments, device))


def moved(arguments: Arguments, device: torch.device) -> Arguments:
    """Contiguous copies between guards."""
    return {
        key: torch.empty_like(value, device=device).copy_(value) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }


def expect(name: str, arguments: Arguments, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The results of the reference on copies of `arguments`, with all that is floating point in `dtype`."""
    return list(CASES[name].truth(arguments, dtype).values())


def check(name: str, arguments: Arguments, device: torch.device) -> list[torch.Tensor]:
    """Hold the kernel to the error of PyTorch in the same dtype, and return its results."""
    actual = run(name, arguments, device)
    truth = expect(name, arguments, torch.float64)
    for ours, same_dtype, true in zip(actual, expect(name, arguments), truth, strict=True):
        assert ours.dtype == same_dtype.dtype
        if ours.is_floating_point():
            assert_as_close_as_pytorch(ours, same_dtype, true)
        else:
            assert torch.equal(ours, same_dtype)
    return actual


def assert_identical(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
