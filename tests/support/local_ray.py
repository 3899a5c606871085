"""Ray with all workers in this process, for tests of what is done about workers that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
import torch

from esm_packed.runners.compute.ray_cluster import Slot
from esm_packed.runners.compute.ray_worker import RayWorker
from esm_packed.runners.state.request import EmbedRequest


class WorkerError(ray.exceptions.RayError):
    """A worker has raised `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Call:
    """A call of a worker's method, which is over; one that ends in SystemExit was the worker's death."""

    def __init__(self, method: Callable[..., Any], *arguments: Any) -> None:
        self._error: Exception | None = None
        self._result: Any = None
        try:
            self._result = method(*arguments)
        except SystemExit:
            self._error = ray.exceptions.ActorDiedError()
        except Exception as error:
            self._error = WorkerError(error)

    def get(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


class Actor:
    def __init__(self, worker: RayWorker) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=partial(Call, getattr(self._worker, name)))


class LocalCluster:
    """In place of `RayCluster`."""

    def __init__(
        self,
        request: EmbedRequest,
        device: torch.device,
        gpu_numbers: Sequence[int],
        worker_class: type[RayWorker],
        model_sha256: str,
    ) -> None:
        self.ray = SimpleNamespace(
            exceptions=ray.exceptions,
            wait=lambda calls, **options: (calls, []),
            get=Call.get,
            kill=lambda actor: None,
        )
        self.threads = 1
        self.slots = [Slot(rank) for rank in range(request.workers or 1)]
        self._new_worker = partial(worker_class, request, model_sha256, device.type)

    def has_room(self) -> bool:
        return True

    def start(self, slot: Slot) -> None:
        if slot.actor is None:
            slot.actor = Actor(self._new_worker(slot.rank))

    def close(self) -> None:
        pass
