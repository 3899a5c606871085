"""Rates are of median times, of the precision that is named, and count all operations and bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import gpu_timing
import pytest
import torch
from gpu_timing import Rounds, copy_rate, matmul_rate, time_call

from esm_packed import kernels

CPU = torch.device("cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], Callable[[], None]]:
    """Makes a call that takes the given seconds, one after the other."""
    now = 0.0
    monkeypatch.setattr(gpu_timing, "time", SimpleNamespace(perf_counter=lambda: now))

    def call_taking(seconds: list[float]) -> Callable[[], None]:
        left = iter(seconds)

        def call() -> None:
            nonlocal now
            now += next(left)

        return call

    return call_taking


def test_a_launch_takes_its_share_of_the_median_round(
    clock: Callable[[list[float]], Callable[[], None]],
) -> None:
    first, second = clock([50, 1, 4, 9]), clock([50, 1, 2, 9])  # the first time is a warm-up
    rounds = Rounds([first, second], CPU)
    for _ in range(3):
        rounds.prepare()
        rounds.run()
    assert rounds.seconds == [1.0, 3.0, 9.0]
    assert rounds.median == 3.0
    assert rounds.launches == 2
    assert not rounds.captured


def test_rounds_begin_with_fresh_arguments() -> None:
    resets: list[int] = []
    rounds = Rounds([lambda: None], CPU, reset=lambda: resets.append(len(rounds.seconds)))
    for _ in range(2):
        rounds.prepare()
        rounds.run()
    assert resets == [0, 1]


def test_the_first_call_is_not_timed(clock: Callable[[list[float]], Callable[[], None]]) -> None:
    assert time_call(clock([50, 1, 4, 2]), CPU, 3) == [1, 4, 2]


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []

    def timed(function: Callable[[], torch.Tensor], device: torch.device, rounds: int) -> list[float]:
        copied.append(function())
        return [2.0, 1.0, 9.0]

    monkeypatch.setattr(gpu_timing, "time_call", timed)
    assert copy_rate(CPU) == 2 * copied[0].nbytes / 1.0


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
    monkeypatch.setattr(gpu_timing, "time_call", timed)
    rate = matmul_rate(CPU, mode)
    ((left, right),) = operands
    assert left.dtype == right.dtype == DTYPES[mode]
    assert rate == 2 * left.shape[0] * left.shape[1] * right.shape[0] / 1.0
