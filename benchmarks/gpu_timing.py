"""Times of GPU work, and the rates of the machine that they are held against.

A timed round on a GPU is the replay of a CUDA graph between two events. The graph launches over several sets
of buffers in turn, together larger than three times the L2 cache; a replay in front of the first event keeps
the GPU busy while the host queues the rest. On a CPU, where this only shows that the code runs, a round is a
call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from esm_packed import kernels
from esm_packed.numerics import PRECISIONS, matmul_precision

L2_MULTIPLE = 3
ROUND_SECONDS = 1.5e-3
"""A round launches so often that it takes about this long, so that what starts and ends it hardly counts."""

MAX_LAUNCHES = 100


def num_buffers(bytes_each: int, device: torch.device) -> int:
    """Sets of buffers of `bytes_each` that make three L2 caches."""
    if device.type != "cuda":
        return 1
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    return max(2, -(-L2_MULTIPLE * cache // max(1, bytes_each)))


class Rounds:
    """Rounds of calls that take turns over the buffers.

    Args:
        calls: one for each set of buffers; what they return is kept until their next turn, so that results
            rotate with the arguments.
        device: where they compute.
        graph: whether they can be captured; what waits for the device cannot.
        reset: puts the arguments back as they were; runs outside the timing.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], Any]],
        device: torch.device,
        *,
        graph: bool = True,
        reset: Callable[[], None] | None = None,
    ) -> None:
        self._calls = calls
        self._cuda = device.type == "cuda"
        self._reset = reset or (lambda: None)
        self._results: list[Any] = [None] * len(calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.launches = len(calls)
        self.seconds: list[float] = []
        self._launch()
        if not self._cuda:
            return
        seconds = self._trial()
        wanted = max(len(calls), int(ROUND_SECONDS / max(seconds, 1e-7)))
        self.launches = min(MAX_LAUNCHES, -(-wanted // len(calls)) * len(calls))
        if graph:
            self._graph = self._capture()

    def _launch(self) -> None:
        for index in range(self.launches):
            turn = index % len(self._calls)
            self._results[turn] = self._calls[turn]()

    def _trial(self) -> float:
        """Seconds of one launch, warm."""
        self._launch()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._launch()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.launches

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch()
        return graph

    def _once(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._launch()

    def prepare(self) -> None:
        """Put the arguments back; not part of the timing."""
        self._reset()
        if self._cuda:
            torch.cuda.synchronize()

    def run(self) -> None:
        """One timed round; its seconds per launch are added to `seconds`."""
        if not self._cuda:
            before = time.perf_counter()
            self._launch()
            self.seconds.append((time.perf_counter() - before) / self.launches)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self._graph is not None:
            self._graph.replay()
        start.record()
        self._once()
        end.record()
        end.synchronize()
        self.seconds.append(float(start.elapsed_time(end)) / 1e3 / self.launches)

    @property
    def captured(self) -> bool:
        """Whether a round is the replay of a graph."""
        return self._graph is not None

    @property
    def median(self) -> float:
        """Seconds of one launch."""
        return median(self.seconds)


def time_call(function: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Seconds of `function`, once for warming up and then `rounds` times."""
    function()
    seconds = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            seconds.append(float(start.elapsed_time(end)) / 1e3)
        else:
            before = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - before)
    return seconds


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
