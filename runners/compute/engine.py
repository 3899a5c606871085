"""What computes the shards of a run: one device in this process, or many workers (see `ray_engine`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Protocol

import torch

from esm_packed.checkpoints import Checkpoint
from esm_packed.packing import default_token_budget
from esm_packed.runners.compute.budget import measured_token_budget
from esm_packed.runners.compute.worker import Worker, device_name, set_threads
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.watch.metrics import StageTimes
from esm_packed.runners.watch.watch import Watch, WorkerState


class Engine(AbstractContextManager["Engine"], Protocol):
    """Computes shards.

    Attributes:
        num_workers: number of devices, or groups of CPU cores, that work in parallel.
        times: totals of all workers; `wall` is the sum over workers.
    """

    num_workers: int
    times: StageTimes

    def describe(self) -> str:
        """Description of the devices."""
        ...

    def token_budget(self, *, measured: bool) -> int:
        """Tokens that a pack may hold on these devices.

        Args:
            measured: on a GPU, limit the default to what its memory is measured to hold.
        """
        ...

    def compute(self, run: Run, shards: Sequence[int], watch: Watch) -> None:
        """Compute `shards` and write each to its file.

        Raises:
            Exception: whatever stopped the work; finished shards are kept.
        """
        ...


class InProcessEngine:
    """One device, in this process.

    Args:
        request: how to compute.
        checkpoint: checkpoint of the model, loaded when it is first needed.
        device: the device to use.
    """

    num_workers = 1

    def __init__(self, request: EmbedRequest, checkpoint: Checkpoint, device: torch.device) -> None:
        set_threads(request.threads)
        self._request = request
        self._checkpoint = checkpoint
        self._device = device
        self.times = StageTimes()

    def describe(self) -> str:
        """The device."""
        return device_name(self._device)

    def token_budget(self, *, measured: bool) -> int:
        """See `Engine`."""
        default = default_token_budget(self._device)
        if self._device.type != "cuda" or not measured:
            return default
        return measured_token_budget(self._worker.model, default)

    def compute(self, run: Run, shards: Sequence[int], watch: Watch) -> None:
        """See `Engine`."""

        def states() -> list[WorkerState]:
            return [WorkerState(0, str(self._device), pipeline.snapshot())]

        worker = self._worker.open(run, lambda residues: watch.update(pipeline.times.residues_done, states))
        pipeline = worker.pipeline
        try:
            worker.compute(shards)
        finally:
            watch.write_log(states(), "end")
            self.times.add(pipeline.times)

    @cached_property
    def _worker(self) -> Worker:
        return Worker(self._request, self._checkpoint, self._device)

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass
