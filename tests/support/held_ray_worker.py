"""Imported by a process that is to embed on Ray: its workers stop before the run is finished."""

from __future__ import annotations

import sys
import time

import ray

from esm_packed.runners.compute.ray_engine import RayEngine
from esm_packed.runners.compute.ray_worker import RayWorker
from esm_packed.runners.watch.metrics import StageTimes

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]


class HeldWorker(RayWorker):
    """Computes five shards, each as slowly as a large model would."""

    def compute(self, shard: int) -> StageTimes:
        time.sleep(0.3)
        while len(self._opened.run.finished(range(self._opened.run.plan.num_shards))) >= 5:
            time.sleep(0.1)  # until the driver has ended
        return super().compute(shard)


RayEngine.worker_class = HeldWorker
