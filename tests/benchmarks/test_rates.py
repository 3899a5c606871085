"""Rates are of the precision that is named, and count all operations and bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rates
import torch
from rates import copy_rate, matmul_rate

from esm_packed import kernels

CPU = torch.device("cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []

    def timed(function: Callable[[], torch.Tensor], device: torch.device, rounds: int) -> list[float]:
        copied.append(function())
        return [2.0, 1.0, 9.0]

    monkeypatch.setattr(rates, "time_call", timed)
    assert copy_rate(CPU) == 2 * copied[0].nbytes / 1.0


def test_rates_of_libraries_are_of_their_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[torch.Tensor] = []

    def timed(function: Callable[[], torch.Tensor], device: torch.device, rounds: int) -> list[float]:
        results.append(function())
        return [2.0, 1.0, 9.0]

    monkeypatch.setattr(rates, "time_call", timed)
    found = rates.library_rates()
    assert [result.dtype for result in results] == [
        torch.bfloat16 if name.endswith("BF16") else torch.float32 for name in found
    ]
    assert len({result.shape for result in results}) == 1
    assert set(found.values()) == {2 * results[0].shape[0] ** 3 / 1.0}
    torch.testing.assert_close(results[0], results[-1].float(), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("mode", DTYPES)
def test_a_matmul_is_of_its_precision(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operands: list[tuple[torch.Tensor, torch.Tensor]] = []

    def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        operands.append((states, weight))
        return states

    def timed(function: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
        function()
        return [2.0, 1.0, 9.0]

    monkeypatch.setattr(kernels, "linear", linear)
    monkeypatch.setattr(rates, "time_call", timed)
    rate = matmul_rate(CPU, mode)
    ((left, right),) = operands
    assert left.dtype == right.dtype == DTYPES[mode]
    assert rate == 2 * left.shape[0] * left.shape[1] * right.shape[0] / 1.0
