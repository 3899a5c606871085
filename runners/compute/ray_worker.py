"""A worker on Ray, and the errors it raises."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from esm_packed.checkpoints import load_checkpoint
from esm_packed.errors import UsageError
from esm_packed.numerics import resolve_device
from esm_packed.packing import default_token_budget
from esm_packed.runners.compute.budget import measured_token_budget
from esm_packed.runners.compute.worker import RunWorker, Worker, device_name, set_threads
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.watch.metrics import Snapshot, StageTimes


class RayWorker:
    """A `Worker` as an actor. Two threads: one computes, the other reports the progress.

    Whatever can fail is left to the methods: Ray passes on the exceptions that they raise, but only the text
    of those raised in the constructor.

    Args:
        request: how to compute.
        model_sha256: hash of the checkpoint that the driver opened.
        device: the device, as numbered in this process.
        rank: number of the worker in the run.
    """

    _opened: RunWorker

    def __init__(self, request: EmbedRequest, model_sha256: str, device: str, rank: int) -> None:
        self._request = request
        self._model_sha256 = model_sha256
        self._device = device
        self._rank = rank

    @cached_property
    def _worker(self) -> Worker:
        set_threads(self._request.threads)
        checkpoint = load_checkpoint(self._request.model)
        if checkpoint.sha256 != self._model_sha256:
            raise UsageError(
                f"{self._request.model} is a different model on {os.uname().nodename} (sha256 "
                f"{checkpoint.sha256})"
            )
        return Worker(self._request, checkpoint, resolve_device(self._device), self._rank)

    def token_budget(self, measured: bool) -> int:
        """See `Engine`, for its GPU."""
        model = self._worker.model
        default = default_token_budget(model.device)
        return measured_token_budget(model, default) if measured else default

    def open(self, output: str, plan_hash: str) -> str:
        """Open the run of `output` before anything is computed; return where this worker runs."""
        directory = RunDirectory(Path(output))
        if not directory.plan_path.exists():
            raise UsageError(
                f"{directory.path} does not exist on {os.uname().nodename}; all workers must share the "
                "output's directory"
            )
        run = Run.open(directory)
        if run.plan.hash != plan_hash:
            raise UsageError(f"{directory.path} contains another run on {os.uname().nodename}")
        self._opened = self._worker.open(run)
        return f"{device_name(self._worker.model.device)} on {os.uname().nodename}, process {os.getpid()}"

    def compute(self, shard: int) -> StageTimes:
        """Compute and write a shard; return what the worker has done so far."""
        self._opened.compute([shard])
        return self._opened.pipeline.times

    def compute_piece(self, shard: int, first: int, last: int) -> StageTimes:
        """Compute and write sequences [first, last) of a shard; return what the worker has done so far."""
        self._opened.compute_piece(shard, first, last)
        return self._opened.pipeline.times

    def snapshot(self) -> Snapshot:
        """The current state of the worker."""
        return self._opened.pipeline.snapshot()
