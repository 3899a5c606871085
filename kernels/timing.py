"""Timing of GPU work.

A timed round on a GPU is the replay of a CUDA graph between two events. The graph launches over several sets
of buffers in turn, together larger than three times the L2 cache; a replay before the first event keeps the
GPU busy while the host queues the rest. On a CPU a round is a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

L2_MULTIPLE = 3
ROUND_SECONDS = 1.5e-3
"""A round repeats launches for about this long, so that its start and end are negligible."""

MAX_LAUNCHES = 100


def num_buffers(bytes_each: int, device: torch.device) -> int:
    """Sets of buffers of `bytes_each` that fill three L2 caches, limited to half of the free memory."""
    if device.type != "cuda":
        return 1
    torch.cuda.empty_cache()
    bytes_each = max(1, bytes_each)
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    wanted = max(2, -(-L2_MULTIPLE * cache // bytes_each))
    return max(1, min(wanted, torch.cuda.mem_get_info(device)[0] // 2 // bytes_each))


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    if device.type != "cuda":
        before = time.perf_counter()
        function()
        return time.perf_counter() - before
    event: Any = torch.cuda.Event  # not typed in torch
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def time_call(function: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of `function`, called once to warm up and then `rounds` times."""
    function()
    return [timed(function, device) for _ in range(rounds)]


class Rounds:
    """Rounds of calls that rotate through the buffers.

    Args:
        calls: one for each set of buffers. Their results are kept until their next turn, so that results
            rotate with the arguments.
        device: where they compute.
        graph: whether they can be captured; functions that synchronize cannot.
        reset: restores the arguments; runs outside the timing.
        pool: memory shared by graphs whose results are not read (`torch.cuda.graph_pool_handle`).
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], Any]],
        device: torch.device,
        *,
        graph: bool = True,
        reset: Callable[[], None] | None = None,
        pool: Any = None,
    ) -> None:
        self._calls = calls
        self._device = device
        self._reset = reset or (lambda: None)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.launches = len(calls)
        self.seconds: list[float] = []
        self._launch()
        if device.type != "cuda":
            return
        seconds = time_call(self._launch, device, 1)[0] / self.launches
        wanted = max(len(calls), int(ROUND_SECONDS / max(seconds, 1e-7)))
        self.launches = min(MAX_LAUNCHES, -(-wanted // len(calls)) * len(calls))
        if graph:
            self._graph = self._capture(pool)

    def _launch(self) -> None:
        results: list[Any] = [None] * len(self._calls)
        for index in range(self.launches):
            turn = index % len(self._calls)
            results[turn] = self._calls[turn]()

    def _capture(self, pool: Any) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # cuBLAS creates its workspace for this stream outside the graph
            self._launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._launch()
        return graph

    def prepare(self) -> None:
        """Restore the arguments; not timed."""
        self._reset()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def run(self) -> None:
        """Run one timed round; append its seconds per launch to `seconds`."""
        launch = self._launch
        if self._graph is not None:
            launch = self._graph.replay
            launch()
        self.seconds.append(timed(launch, self._device) / self.launches)

    @property
    def captured(self) -> bool:
        """Whether a round is the replay of a graph."""
        return self._graph is not None

    @property
    def median(self) -> float:
        """Seconds of one launch."""
        return median(self.seconds)
