"""The Ray cluster that workers run on, connected to or started here, and its slots for workers."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from esm_packed.errors import UsageError
from esm_packed.runners.compute.ray_worker import RayWorker
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.system.environment import num_cpus
from esm_packed.runners.system.signals import ENDING_SIGNALS
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.metrics import Snapshot, StageTimes

OBJECT_STORE_BYTES = 512 << 20
AUTHENTICATED_RELEASE = (2, 59)
"""First release of Ray that requires a token for clusters that it starts on this machine."""


@dataclass(frozen=True)
class Task:
    """A shard, or, if `last` is not None, the items [first, last) of those it computes."""

    shard: int
    first: int = 0
    last: int | None = None

    def __str__(self) -> str:
        part = "" if self.last is None else f", sequences {self.first} to {self.last} of it"
        return f"shard {self.shard}{part}"


@dataclass
class Slot:
    """A slot for a worker; a worker that dies is replaced in its slot."""

    rank: int
    actor: Any = None
    name: str = "starting"
    pending: Any = None
    """Reference to the result of the worker's current call."""
    task: Task | None = None
    """The task that this call computes; None while a worker opens the run or waits."""
    failed_starts: int = 0
    times: StageTimes = field(default_factory=StageTimes)
    """Times of the tasks that the current worker has finished."""
    snapshot: Snapshot | None = None
    asked: Any = None

    @property
    def is_starting(self) -> bool:
        """Whether the worker is opening the run."""
        return self.pending is not None and self.task is None


class RayCluster:
    """A connection to Ray.

    Args:
        request: how to compute, and where: `workers`, `threads`, `ray_address`.
        device: cuda or cpu.
        gpu_numbers: GPUs of this machine to use; empty for all that Ray has.
        worker_class: class of the actors.
        model_sha256: hash of the checkpoint that the workers must find.

    Attributes:
        ray: the module.
        threads: CPU threads of a worker.
        slots: one for each worker.

    Raises:
        UsageError: Ray is not installed, cannot be reached, or has no such devices.
    """

    def __init__(
        self,
        request: EmbedRequest,
        device: torch.device,
        gpu_numbers: Sequence[int],
        worker_class: type[RayWorker],
        model_sha256: str,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if request.ray_address is None:
            _want_authentication()
        self.ray = _import_ray(request)
        self._request = request
        self._device = device
        self._worker_class = worker_class
        self._model_sha256 = model_sha256
        if gpu_numbers:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(_visible_gpu, gpu_numbers))
        self._connect(len(gpu_numbers))
        try:
            self.slots = [Slot(rank) for rank in range(self._count_workers())]
            self.threads = self._count_threads()
        except BaseException:
            self.close()
            raise

    def _connect(self, num_gpus: int) -> None:
        request = self._request
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if request.ray_address is not None:
            _check_reachable(request.ray_address)
            options["address"] = request.ray_address
        else:
            options |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "num_cpus": max(num_cpus(), (request.workers or 1) * (request.threads or 1)),
            }
            if num_gpus:
                options["num_gpus"] = num_gpus
        with _signals_kept():
            try:
                self.ray.init(**options)
            except Exception as error:
                raise UsageError(
                    f"Ray cannot be reached or started: {error} (with token authentication, RAY_AUTH_MODE "
                    "and the token must be those of the cluster)"
                ) from error

    def _count_workers(self) -> int:
        if self._device.type == "cuda":
            available = sum(self.capacities("GPU"))
            if not available:
                raise UsageError("--engine ray: Ray finds no GPU; use --device cpu for CPU cores")
            kind = "a GPU"
        else:
            threads = self._request.threads or 1
            available = sum(cores // threads for cores in self.capacities("CPU"))
            kind = counted(threads, "CPU core")
        wanted = self._request.workers or (available if self._device.type == "cuda" else 1)
        if wanted > available:
            raise UsageError(f"--workers {wanted}: Ray has resources for {available}, with {kind} each")
        return wanted

    def _count_threads(self) -> int:
        """CPU threads of a worker."""
        if self._request.threads is not None or self._device.type == "cuda":
            return self._request.threads or 1
        return _threads_each(self.capacities("CPU"), len(self.slots))

    def capacities(self, resource: str) -> list[int]:
        """Amount of a resource on each live node, as a worker cannot span several nodes."""
        return [int(node["Resources"].get(resource, 0)) for node in self.ray.nodes() if node["Alive"]]

    def has_room(self) -> bool:
        """Whether a worker fits on some node, whether or not that node is in use."""
        resource, needed = ("GPU", 1) if self._device.type == "cuda" else ("CPU", self.threads)
        return any(capacity >= needed for capacity in self.capacities(resource))

    def start(self, slot: Slot) -> None:
        """Start a worker in `slot` unless it has one."""
        if slot.actor is not None:
            return
        actor_class = self.ray.remote(self._worker_class)
        gpu = self._device.type == "cuda"
        options = {"num_cpus": self.threads, "num_gpus": int(gpu), "max_concurrency": 2, "max_restarts": 0}
        slot.actor = actor_class.options(**options).remote(
            replace(self._request, threads=self.threads),
            self._model_sha256,
            "cuda:0" if gpu else "cpu",
            slot.rank,
        )

    def close(self) -> None:
        """Disconnect, and stop what was started here."""
        with _signals_kept():
            self.ray.shutdown()


def _import_ray(request: EmbedRequest) -> Any:
    """The module `ray`.

    Raises:
        UsageError: it is not installed, or is too old for the request.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UsageError(
            "several workers need Ray: pip install 'ray>=2.59', or start one process per device with "
            "--slice INDEX/COUNT"
        ) from error
    if request.ray_address is None and _release(ray.__version__) < AUTHENTICATED_RELEASE:
        raise UsageError(
            f"Ray {ray.__version__} starts clusters without authentication, open to every user of this "
            "machine; upgrade it: pip install 'ray>=2.59'"
        )
    return ray


def _threads_each(cores: Sequence[int], num_workers: int) -> int:
    """Most threads per worker such that all workers fit on nodes with these numbers of cores."""
    most = sum(cores) // num_workers
    fitting = (
        threads for threads in range(most, 0, -1) if sum(each // threads for each in cores) >= num_workers
    )
    return next(fitting, 1)


def _want_authentication() -> None:
    """Make the cluster that Ray will start here refuse everyone without its token.

    Ray does so by default, but with a token in the home directory, which others may be able to read.
    """
    os.environ.pop("RAY_AUTH_MODE", None)  # "disabled" may be right for another cluster
    if "ray" not in sys.modules and "RAY_AUTH_TOKEN_PATH" not in os.environ:  # later Ray keeps its token
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(map(int, re.findall("[0-9]+", version)[:2]))


def _check_reachable(address: str) -> None:
    """Check that something listens at HOST:PORT; Ray itself would wait for minutes."""
    host, found, port = address.rpartition(":")
    if found and re.fullmatch("[0-9]+", port):
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError, ValueError) as error:  # invalid port or host name
            raise UsageError(f"Ray cannot be reached at {address}: {error}") from error


def _visible_gpu(number: int) -> str:
    """The driver's name for GPU `number` of those visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep our signal handlers, which Ray replaces by its own."""
    try:
        handlers = {name: signal.getsignal(name) for name in ENDING_SIGNALS}
        yield
    finally:
        for name, handler in handlers.items():
            with suppress(ValueError):  # not in the main thread, where Ray sets none either
                signal.signal(name, handler)
