"""Many workers on Ray: shards are handed out as workers become free, and what kills a worker is left out.

Each worker is an actor with one GPU, or a share of the CPU cores, on this machine or in a cluster; the run
directory must be on a file system that all of them see. A worker that dies is replaced. A shard that fails
MAX_ATTEMPTS times is computed in parts; those that fail are halved until the sequence that fails alone is
found. It is recorded as failed, and everything else is kept.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esm_packed.attention import BackendError
from esm_packed.checkpoints import Checkpoint, CheckpointError, load_checkpoint
from esm_packed.config import DEFAULT_TOKEN_BUDGETS
from esm_packed.errors import EngineError, UsageError
from esm_packed.numerics import resolve_device
from esm_packed.runners.compute.budget import measured_token_budget
from esm_packed.runners.compute.worker import Worker, device_name, set_threads
from esm_packed.runners.input.fasta import InputError
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import PlanError
from esm_packed.runners.state.request import STORE_DTYPES, EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_FAILED, Shard, StoreError
from esm_packed.runners.system.signals import ENDING_SIGNALS
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.metrics import Snapshot, StageTimes
from esm_packed.runners.watch.watch import Watch, WorkerState

MAX_ATTEMPTS = 3
"""Failures of a shard, or of a single sequence, before it is split or given up."""

BACK_OFF_SECONDS = 1.0
"""Before the first repetition of a shard; doubled each time."""

MAX_FAILURES_IN_A_ROW = 12
"""Without anything that works in between: then it is not a sequence that is at fault."""

MAX_FAILED_STARTS = 3
NO_ROOM_SECONDS = 60.0
"""How long the run waits for a node, after all that a worker fits on are gone."""

POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 512 << 20
AUTHENTICATED_RELEASE = (2, 59)
"""The first that asks for a token at a cluster that it starts on this machine."""

NOT_THE_SHARDS_FAULT = (UsageError, InputError, PlanError, StoreError, BackendError, CheckpointError)
LASTING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOENT)
"""What would happen again with any shard, or for any worker."""


class RayWorker:
    """A `Worker` as an actor. Two threads: one computes, the other tells how it goes.

    Args:
        request: how to compute.
        model_sha256: of the checkpoint that the driver opened.
        device: where, as this process sees its devices.
        rank: its number in the run.
    """

    def __init__(self, request: EmbedRequest, model_sha256: str, device: str, rank: int) -> None:
        set_threads(request.threads)
        checkpoint = load_checkpoint(request.model)
        if checkpoint.sha256 != model_sha256:
            raise UsageError(
                f"{request.model} is another model on {os.uname().nodename}: {checkpoint.sha256}"
            )
        self._worker = Worker(request, checkpoint, resolve_device(device), rank)
        self._run: Run | None = None

    def token_budget(self) -> int:
        """What the memory of its GPU holds."""
        model = self._worker.model
        return measured_token_budget(model, DEFAULT_TOKEN_BUDGETS[model.device.type])

    def begin(self, output: str, plan_hash: str) -> str:
        """Open the run of `output`; where this worker runs."""
        directory = RunDirectory(Path(output))
        if not directory.plan_path.exists():
            raise UsageError(
                f"{directory.path} is not on {os.uname().nodename}; all workers must share the folder "
                "of the output"
            )
        run = Run.open(directory)
        if run.plan.hash != plan_hash:
            raise UsageError(f"{directory.path} holds another run on {os.uname().nodename}")
        self._worker.begin(run)
        self._run = run
        return f"{device_name(self._worker.model.device)} on {os.uname().nodename}, process {os.getpid()}"

    def compute(self, shard: int) -> StageTimes:
        """Compute a shard and write it; what the worker has done so far."""
        assert self._run is not None
        self._worker.compute(self._run, [shard])
        return self._times()

    def compute_part(self, shard: int, first: int, last: int) -> tuple[Shard, StageTimes]:
        """Compute the sequences [first, last) of a shard; their rows, and what the worker has done so far."""
        assert self._run is not None
        return self._worker.compute_part(self._run, shard, first, last), self._times()

    def snapshot(self) -> Snapshot | None:
        """Where it is."""
        return self._worker.pipeline.snapshot() if self._worker.pipeline is not None else None

    def _times(self) -> StageTimes:
        assert self._worker.pipeline is not None
        return self._worker.pipeline.times


@dataclass(frozen=True)
class _Task:
    """A shard, or if `last` is not None the sequences [first, last) of those it computes."""

    shard: int
    first: int = 0
    last: int | None = None


@dataclass
class _Slot:
    """A place for a worker; when one dies another takes it."""

    rank: int
    actor: Any = None
    starting: Any = None
    name: str = "starting"
    working: Any = None
    task: _Task | None = None
    failed_starts: int = 0
    times: StageTimes = field(default_factory=StageTimes)
    """Of finished tasks of the worker that is there now."""
    snapshot: Snapshot | None = None
    asked: Any = None


class RayEngine:
    """Workers on Ray.

    Args:
        request: how to compute, and where: `workers`, `threads`, `ray_address`.
        device: cuda or cpu.
        gpu_numbers: GPUs of this machine to use; empty for all that Ray has.
        checkpoint: the model, for its hash.
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
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if request.ray_address is None:
            _want_authentication()
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UsageError(
                "several workers need Ray: pip install 'ray>=2.59', or start a process for each device "
                "with --slice INDEX/COUNT"
            ) from error
        if request.ray_address is None and _release(ray.__version__) < AUTHENTICATED_RELEASE:
            raise UsageError(
                f"Ray {ray.__version__} lets everyone on this machine into the cluster that it starts; "
                "pip install 'ray>=2.59' brings one that does not"
            )
        self._ray: Any = ray
        self._request = request
        self._device = device
        self._checkpoint = checkpoint
        self._console = console
        self.times = StageTimes()
        if gpu_numbers:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(_visible_gpu, gpu_numbers))
        self._connect(len(gpu_numbers))
        try:
            self.num_workers = self._count_workers()
            self._threads = self._count_threads()
        except BaseException:
            self.__exit__()
            raise
        self._slots = [_Slot(rank) for rank in range(self.num_workers)]

    def _connect(self, num_gpus: int) -> None:
        request = self._request
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if request.ray_address is not None:
            _check_reachable(request.ray_address)
            options["address"] = request.ray_address
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            options |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "num_cpus": max(cores, (request.workers or 1) * (request.threads or 1)),
            }
            if num_gpus:
                options["num_gpus"] = num_gpus
        with _signals_kept():
            try:
                self._ray.init(**options)
            except Exception as error:
                raise UsageError(
                    f"Ray cannot be reached or started: {error} (a cluster with token authentication wants "
                    "the same RAY_AUTH_MODE and token here)"
                ) from error

    def _count_workers(self) -> int:
        if self._device.type == "cuda":
            available = sum(self.capacities("GPU"))
            if not available:
                raise UsageError("--engine ray: Ray finds no GPU; --device cpu computes on CPU cores")
            kind = "a GPU"
        else:
            threads = self._request.threads or 1
            available = sum(cores // threads for cores in self.capacities("CPU"))
            kind = f"{threads} CPU core{'s' * (threads > 1)}"
        wanted = self._request.workers or (available if self._device.type == "cuda" else 1)
        if wanted > available:
            raise UsageError(f"--workers {wanted}: Ray has room for {available}, with {kind} each")
        return wanted

    def _count_threads(self) -> int:
        """CPU threads of a worker."""
        if self._request.threads is not None or self._device.type == "cuda":
            return self._request.threads or 1
        return _threads_each(self.capacities("CPU"), self.num_workers)

    def capacities(self, resource: str) -> list[int]:
        """How much of a resource each node has that is alive: no worker can be spread over several."""
        return [int(node["Resources"].get(resource, 0)) for node in self._ray.nodes() if node["Alive"]]

    def has_room(self) -> bool:
        """Whether there is a node that a worker fits on, be it in use or not."""
        resource, needed = ("GPU", 1) if self._device.type == "cuda" else ("CPU", self._threads)
        return any(capacity >= needed for capacity in self.capacities(resource))

    def describe(self) -> str:
        """How many workers there are, and on what."""
        kind = (
            "GPU"
            if self._device.type == "cuda"
            else f"CPU, {self._threads} thread" + "s" * (self._threads > 1)
        )
        return f"{self.num_workers} Ray worker{'s' * (self.num_workers > 1)} ({kind} each)"

    def token_budget(self) -> int:
        """See `Engine`: what the first GPU's memory holds."""
        default = DEFAULT_TOKEN_BUDGETS[self._device.type]
        if self._device.type != "cuda":
            return default
        slot = self._slots[0]
        self._start(slot)
        try:
            return int(self._ray.get(slot.actor.token_budget.remote()))
        except self._ray.exceptions.RayActorError as error:
            raise EngineError(f"a worker cannot be started: {_root_cause(error)}") from error

    def compute(self, run: Run, shards: Sequence[int], watch: Watch) -> None:
        """See `Engine`.

        Raises:
            EngineError: workers cannot be started, or fail whatever they are given.
        """
        _Schedule(self, run, shards, watch).run()

    def _start(self, slot: _Slot) -> None:
        if slot.actor is not None:
            return
        actor_class = self._ray.remote(self.worker_class)
        gpu = self._device.type == "cuda"
        slot.actor = actor_class.options(
            num_cpus=self._threads, num_gpus=1 if gpu else 0, max_concurrency=2, max_restarts=0
        ).remote(
            replace(self._request, threads=self._threads),
            self._checkpoint.sha256,
            "cuda:0" if gpu else "cpu",
            slot.rank,
        )

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        with _signals_kept():
            self._ray.shutdown()


class _Schedule:
    """One call of `RayEngine.compute`."""

    def __init__(self, engine: RayEngine, run: Run, shards: Sequence[int], watch: Watch) -> None:
        self._engine = engine
        self._ray = engine._ray
        self._run = run
        self._watch = watch
        self._waiting = deque(map(_Task, shards))
        self._delayed: list[tuple[float, _Task]] = []
        self._attempts: Counter[_Task] = Counter()
        self._failures_in_a_row = 0
        self._parts: dict[int, dict[_Task, Shard]] = {}
        self._done_residues = 0
        self._last_room = time.monotonic()

    def run(self) -> None:
        slots = self._engine._slots
        for slot in slots:
            self._open(slot)
        try:
            while self._waiting or self._delayed or any(slot.task is not None for slot in slots):
                self._hand_out()
                self._look(POLL_SECONDS)
                self._ask()
                self._check_room()
                in_flight = sum(_new_residues(slot) for slot in slots if slot.task is not None)
                self._watch.update(self._done_residues + in_flight, self._states)
        finally:
            self._watch.write_log(self._states(), "end")

    def _open(self, slot: _Slot) -> None:
        """Have a worker in `slot` that opens the run."""
        self._engine._start(slot)
        slot.times, slot.snapshot, slot.asked = StageTimes(), None, None
        slot.starting = slot.actor.begin.remote(str(self._run.directory.output), self._run.plan.hash)

    def _hand_out(self) -> None:
        now = time.monotonic()
        self._waiting.extendleft(task for ready, task in self._delayed if ready <= now)
        self._delayed = [each for each in self._delayed if each[0] > now]
        for slot in self._engine._slots:
            if not self._waiting:
                return
            if slot.starting is not None or slot.task is not None:
                continue
            task = slot.task = self._waiting.popleft()
            if task.last is None:
                slot.working = slot.actor.compute.remote(task.shard)
            else:
                slot.working = slot.actor.compute_part.remote(task.shard, task.first, task.last)

    def _look(self, seconds: float) -> None:
        """Wait for a worker that has started, finished or failed."""
        slots = self._engine._slots
        pending = {slot.starting or slot.working: slot for slot in slots if slot.starting or slot.working}
        if not pending:
            time.sleep(seconds)
            return
        done, _ = self._ray.wait(list(pending), num_returns=1, timeout=seconds)
        for reference in done:
            slot = pending[reference]
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self._failed(slot, error)
            else:
                if slot.starting is not None:
                    slot.starting, slot.failed_starts = None, 0
                    slot.name = result
                else:
                    self._finished(slot, result)

    def _finished(self, slot: _Slot, result: Any) -> None:
        task = slot.task
        assert task is not None
        slot.task = slot.working = None
        self._failures_in_a_row = 0
        times = result
        if task.last is not None:
            part, times = result
            self._keep_part(task, part)
        self._done_residues += times.residues - slot.times.residues
        self._engine.times.add(_difference(times, slot.times))
        slot.times = times
        if slot.snapshot is not None:
            slot.snapshot = replace(slot.snapshot, times=times, shard=None)

    def _failed(self, slot: _Slot, error: Exception) -> None:
        cause = _root_cause(error)
        if isinstance(cause, NOT_THE_SHARDS_FAULT) or getattr(cause, "errno", None) in LASTING_ERRORS:
            raise cause
        task, was_starting = slot.task, slot.starting is not None
        self._replace(slot)
        if was_starting:
            slot.failed_starts += 1
            if slot.failed_starts == MAX_FAILED_STARTS:
                raise EngineError(f"worker {slot.rank} cannot be started: {cause}")
            return
        assert task is not None
        self._attempts[task] += 1
        self._failures_in_a_row += 1
        attempts = self._attempts[task]
        name = f"shard {task.shard}" + (
            "" if task.last is None else f", sequences {task.first} to {task.last} of it"
        )
        self._engine._console.note(f"worker {slot.rank}: {name} failed: {cause}")
        if self._failures_in_a_row > MAX_FAILURES_IN_A_ROW:
            raise EngineError(f"workers fail whatever they are given, last with: {cause}")
        num_sequences = self._sequences(task)
        if not num_sequences:
            raise EngineError(f"{name} fails, though it has nothing to compute: {cause}")
        # a part is known to fail: only a single sequence gets the benefit of the doubt again
        if attempts < MAX_ATTEMPTS and (task.last is None or num_sequences == 1):
            self._delayed.append((time.monotonic() + BACK_OFF_SECONDS * 2 ** (attempts - 1), task))
        elif num_sequences > 1:
            middle = task.first + num_sequences // 2
            last = task.first + num_sequences
            # at the end: the half that works comes before the quarters of the other, so failures alternate
            self._waiting += [_Task(task.shard, task.first, middle), _Task(task.shard, middle, last)]
        else:
            self._keep_part(
                _Task(task.shard, task.first, task.first + 1), self._failed_row(f"its worker failed: {cause}")
            )

    def _replace(self, slot: _Slot) -> None:
        with suppress(Exception):
            self._ray.kill(slot.actor)
        slot.actor = slot.working = slot.task = slot.starting = None
        slot.name = "starting"
        self._open(slot)

    def _sequences(self, task: _Task) -> int:
        if task.last is not None:
            return task.last - task.first
        return len(self._run.computed(task.shard))

    def _failed_row(self, reason: str) -> Shard:
        dtype = STORE_DTYPES[self._engine._request.store_dtype]
        shape = (1, self._run.plan.hidden_size)
        return Shard(
            np.full(1, STATUS_FAILED, np.uint8),
            {layer: np.full(shape, np.nan, dtype) for layer in self._run.plan.layers},
            {0: reason},
        )

    def _keep_part(self, task: _Task, part: Shard) -> None:
        """Keep a part of a shard, and write the shard when it is complete."""
        parts = self._parts.setdefault(task.shard, {})
        parts[task] = part
        if sum(map(self._sequences, parts)) < len(self._run.computed(task.shard)):
            return
        ordered = sorted(parts, key=lambda task: task.first)
        made_by = next((parts[each].made_by for each in ordered if parts[each].made_by), {})
        whole = Shard(
            np.concatenate([parts[each].status for each in ordered]),
            {
                layer: np.concatenate([parts[each].embeddings[layer] for each in ordered])
                for layer in self._run.plan.layers
            },
            {each.first + row: reason for each in ordered for row, reason in parts[each].reasons.items()},
            made_by=made_by,
        )
        assert (whole.status != STATUS_COMPUTED).sum() == len(whole.reasons)
        self._run.write(task.shard, whole)
        del self._parts[task.shard]

    def _check_room(self) -> None:
        """See that there is a worker, or may come to be one: Ray would wait for a new node for ever."""
        now = time.monotonic()
        if any(slot.starting is None for slot in self._engine._slots) or self._engine.has_room():
            self._last_room = now
        elif now - self._last_room >= NO_ROOM_SECONDS:
            raise EngineError("no node of the cluster has room for a worker any more")

    def _ask(self) -> None:
        """Ask workers how it goes, without waiting for their answers."""
        for slot in self._engine._slots:
            if slot.starting is not None:
                continue
            if slot.asked is not None:
                ready, _ = self._ray.wait([slot.asked], timeout=0)
                if not ready:
                    continue
                with suppress(self._ray.exceptions.RayError):
                    snapshot = self._ray.get(slot.asked)
                    # an answer from before the last task was finished says less than is known
                    if snapshot is None or snapshot.times.residues >= slot.times.residues:
                        slot.snapshot = snapshot
            slot.asked = slot.actor.snapshot.remote()

    def _states(self) -> list[WorkerState]:
        return [WorkerState(slot.rank, slot.name, slot.snapshot) for slot in self._engine._slots]


def _threads_each(cores: Sequence[int], num_workers: int) -> int:
    """The most threads with which workers fit on nodes that have so many cores."""
    most = sum(cores) // num_workers
    fitting = (
        threads for threads in range(most, 0, -1) if sum(each // threads for each in cores) >= num_workers
    )
    return next(fitting, 1)


def _new_residues(slot: _Slot) -> int:
    """Residues of the task in work that the worker has told of."""
    if slot.snapshot is None:
        return 0
    return max(0, slot.snapshot.times.residues - slot.times.residues)


def _difference(now: StageTimes, before: StageTimes) -> StageTimes:
    return StageTimes(**{name: value - getattr(before, name) for name, value in vars(now).items()})


def _root_cause(error: BaseException) -> BaseException:
    """What a worker raised, or that it died."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    if not type(error).__module__.startswith("ray."):
        return error
    text = str(error).strip()
    for known in NOT_THE_SHARDS_FAULT:  # an actor that cannot be made has its reason in the text alone
        for line in text.splitlines():
            _, found, message = line.partition(f"{known.__name__}: ")
            if found:
                return known(message)
    if text.startswith("The actor died") or "actor is dead" in text or "worker process has died" in text:
        return RuntimeError("the process died")
    if "is temporarily unavailable" in text:
        return RuntimeError("the worker cannot be reached")
    return RuntimeError(text.splitlines()[-1] if text else type(error).__name__)


def _want_authentication() -> None:
    """Let the cluster that Ray will start here take orders from nobody who lacks its token.

    Ray does so by default, with a token in the home folder, which others may be able to read.
    """
    os.environ.pop("RAY_AUTH_MODE", None)  # "disabled" may be right for another cluster
    if "ray" not in sys.modules and "RAY_AUTH_TOKEN_PATH" not in os.environ:  # later Ray keeps the one it has
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, re.findall("[0-9]+", version)[:2]))


def _check_reachable(address: str) -> None:
    """See that something listens at HOST:PORT, for which Ray itself waits for minutes."""
    host, found, port = address.rpartition(":")
    if found and re.fullmatch("[0-9]+", port):
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError, ValueError) as error:  # no such port, no name of a host
            raise UsageError(f"Ray cannot be reached at {address}: {error}") from error


def _visible_gpu(number: int) -> str:
    """What the driver calls GPU `number` of those this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray sets handlers of its own for signals; keep ours."""
    try:
        handlers = {name: signal.getsignal(name) for name in ENDING_SIGNALS}
        yield
    finally:
        for name, handler in handlers.items():
            with suppress(ValueError):  # not in the main thread, where Ray sets none either
                signal.signal(name, handler)
