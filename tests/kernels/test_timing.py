"""Times are of one launch, the median of warm rounds that begin with fresh arguments."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from esm_packed.kernels import timing
from esm_packed.kernels.timing import Rounds, num_buffers, time_call

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], Callable[[], None]]:
    """Makes a call that takes the given seconds, one after the other."""
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))

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


@pytest.mark.parametrize(
    ("bytes_each", "wanted"), [(1 << 20, 150), (40 << 20, 4), (1 << 30, 2), (3 << 30, 1)]
)
def test_buffers_are_larger_than_the_cache_and_fit_into_memory(
    bytes_each: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 MiB of L2 cache, 5 GiB of free memory."""
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 80 << 30))
    assert num_buffers(bytes_each, torch.device("cuda", 0)) == wanted
    assert num_buffers(bytes_each, CPU) == 1
