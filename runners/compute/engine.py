"""Who computes the shards of a run: one device in this process, or many workers (see `ray_engine`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from esm_packed.checkpoints import Checkpoint
from esm_packed.config import DEFAULT_TOKEN_BUDGETS
from esm_packed.runners.compute.budget import measured_token_budget
from esm_packed.runners.compute.worker import Worker, device_name, set_threads
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.watch.metrics import StageTimes
from esm_packed.runners.watch.watch import Watch, WorkerState


class Engine(AbstractContextManager["Engine"], Protocol):
    """Computes shards.

    Attributes:
        num_workers: how many devices, or groups of CPU cores, work side by side.
        times: of all workers together; `wall` is the sum over workers.
    """

    num_workers: int
    times: StageTimes

    def describe(self) -> str:
        """What the work is done on."""
        ...

    def token_budget(self) -> int:
        """Tokens that a pack may hold on these devices."""
        ...

    def compute(self, run: Run, shards: Sequence[int], watch: Watch) -> None:
        """Compute `shards` and write each to its file.

        Raises:
            Exception: what ended the work; shards that are finished are kept.
        """
        ...


class InProcessEngine:
    """One device, in this process.

    Args:
        request: how to compute.
        checkpoint: of the model, which is loaded when it is needed.
        device: where.
    """

    num_workers = 1

    def __init__(self, request: EmbedRequest, checkpoint: Checkpoint, device: torch.device) -> None:
        set_threads(request.threads)
        self._request = request
        self._checkpoint = checkpoint
        self._device = device
        self._loaded: Worker | None = None
        self._watch: Watch | None = None
        self.times = StageTimes()

    def describe(self) -> str:
        """The device."""
        return device_name(self._device)

    def token_budget(self) -> int:
        """On a GPU what its memory holds, measured; on a CPU what its cache holds, by default."""
        default = DEFAULT_TOKEN_BUDGETS[self._device.type]
        if self._device.type != "cuda":
            return default
        return measured_token_budget(self._worker().model, default)

    def compute(self, run: Run, shards: Sequence[int], watch: Watch) -> None:
        """See `Engine`."""
        worker = self._worker()
        worker.begin(run)
        assert worker.pipeline is not None
        self._watch = watch
        try:
            worker.compute(run, shards)
        finally:
            self._watch = None
            watch.write_log(self._states(), "end")
            self.times.add(worker.pipeline.times)

    def _worker(self) -> Worker:
        if self._loaded is None:
            self._loaded = Worker(self._request, self._checkpoint, self._device, on_pack=self._on_pack)
        return self._loaded

    def _on_pack(self, residues: int) -> None:
        assert self._loaded is not None
        assert self._loaded.pipeline is not None
        if self._watch is not None:
            self._watch.update(self._loaded.pipeline.times.residues, self._states)

    def _states(self) -> list[WorkerState]:
        assert self._loaded is not None
        assert self._loaded.pipeline is not None
        return [WorkerState(0, str(self._device), self._loaded.pipeline.snapshot())]

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass
