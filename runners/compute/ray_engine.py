"""Many workers on Ray: each has one GPU, or a share of the CPU cores, of this machine or of a cluster.

The run directory must be on a file system shared by all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esm_packed.checkpoints import Checkpoint
from esm_packed.errors import EngineError
from esm_packed.packing import default_token_budget
from esm_packed.runners.compute.ray_cluster import RayCluster
from esm_packed.runners.compute.ray_schedule import Schedule, is_lasting, root_cause
from esm_packed.runners.compute.ray_worker import RayWorker
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.metrics import StageTimes
from esm_packed.runners.watch.watch import Watch


class RayEngine:
    """Workers on Ray.

    Args:
        request: how to compute, and where: `workers`, `threads`, `ray_address`.
        device: cuda or cpu.
        gpu_numbers: GPUs of this machine to use; empty for all that Ray has.
        checkpoint: the model's, for its hash.
        console: for notes.

    Raises:
        UsageError: Ray is not installed, cannot be reached, or has no such devices.
    """

    worker_class: type[RayWorker] = RayWorker

    def __init__(
        self,
        request: EmbedRequest,
        device: torch.device,
        gpu_numbers: Sequence[int],
        checkpoint: Checkpoint,
        console: Console,
    ) -> None:
        self._device = device
        self._console = console
        self._cluster = RayCluster(request, device, gpu_numbers, self.worker_class, checkpoint.sha256)
        self.num_workers = len(self._cluster.slots)
        self.times = StageTimes()

    def describe(self) -> str:
        """The number of workers and their devices."""
        threads = counted(self._cluster.threads, "thread")
        kind = "GPU" if self._device.type == "cuda" else f"CPU, {threads}"
        return f"{counted(self.num_workers, 'Ray worker')} ({kind} each)"

    def token_budget(self, *, measured: bool) -> int:
        """See `Engine`: what the first GPU's memory holds."""
        if self._device.type != "cuda":
            return default_token_budget(self._device)
        ray, slot = self._cluster.ray, self._cluster.slots[0]
        self._cluster.start(slot)
        try:
            return int(ray.get(slot.actor.token_budget.remote(measured)))
        except ray.exceptions.RayError as error:
            cause = root_cause(error)
            if is_lasting(cause):
                raise cause from error
            raise EngineError(f"a worker cannot be started: {cause}") from error

    def compute(self, run: Run, shards: Sequence[int], watch: Watch) -> None:
        """See `Engine`.

        Raises:
            EngineError: workers cannot be started, or fail on every shard.
        """
        schedule = Schedule(self._cluster, run, shards, watch, self._console)
        try:
            schedule.run()
        finally:
            self.times.add(schedule.times)

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.close()
