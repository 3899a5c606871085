"""Assigns shards to workers as they become free, and isolates sequences that kill a worker.

A worker that dies is replaced. A shard that fails MAX_ATTEMPTS times is computed in pieces; pieces that fail
are halved until a single failing sequence is found. It is recorded as failed; everything else is kept.
"""

from __future__ import annotations

import errno
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from esm_packed.errors import EngineError, UserError
from esm_packed.runners.compute.ray_cluster import RayCluster, Slot, Task
from esm_packed.runners.state.run import Run
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.metrics import StageTimes
from esm_packed.runners.watch.watch import Watch, WorkerState

MAX_ATTEMPTS = 3
"""Failures after which a shard is split, or a single sequence given up."""

BACK_OFF_SECONDS = 1.0
"""Delay before the first retry of a shard; doubled each time."""

MAX_FAILURES_IN_A_ROW = 12
"""Consecutive failures, without any success, after which the cause is not taken to be a sequence."""

MAX_FAILED_STARTS = 3
NO_ROOM_SECONDS = 60.0
"""How long the run waits for a node once all nodes that a worker fits on are gone."""

POLL_SECONDS = 0.5
LASTING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOENT)
"""Errors that would recur with any shard and on any worker."""


class Schedule:
    """Has the workers of a cluster compute shards.

    Args:
        cluster: the cluster.
        run: the run that the shards belong to.
        shards: their numbers.
        watch: updated with the progress.
        console: for notes.

    Attributes:
        times: totals of all workers.
    """

    def __init__(
        self, cluster: RayCluster, run: Run, shards: Sequence[int], watch: Watch, console: Console
    ) -> None:
        self.times = StageTimes()
        self._cluster = cluster
        self._ray = cluster.ray
        self._run = run
        self._watch = watch
        self._console = console
        self._waiting = deque(map(Task, shards))
        self._delayed: list[tuple[float, Task]] = []
        self._attempts: Counter[Task] = Counter()
        self._failures_in_a_row = 0
        self._pieces: dict[int, dict[Task, str | None]] = {}
        """By shard: pieces of it that are done, None, or a single sequence that failed, why."""
        self._done_residues = 0
        self._last_room = time.monotonic()

    def run(self) -> None:
        """Compute all shards.

        Raises:
            EngineError: workers cannot be started, or fail on every shard.
        """
        slots = self._cluster.slots
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

    def _open(self, slot: Slot) -> None:
        """Have a worker in `slot` open the run, starting one if there is none."""
        self._cluster.start(slot)
        slot.times, slot.snapshot, slot.asked = StageTimes(), None, None
        slot.pending = slot.actor.open.remote(str(self._run.directory.output), self._run.plan.hash)

    def _hand_out(self) -> None:
        now = time.monotonic()
        self._waiting.extendleft(task for ready, task in self._delayed if ready <= now)
        self._delayed = [each for each in self._delayed if each[0] > now]
        for slot in self._cluster.slots:
            if not self._waiting:
                return
            if slot.pending is not None:
                continue
            task = slot.task = self._waiting.popleft()
            if task.last is None:
                slot.pending = slot.actor.compute.remote(task.shard)
            else:
                slot.pending = slot.actor.compute_piece.remote(task.shard, task.first, task.last)

    def _look(self, seconds: float) -> None:
        """Wait until a worker has started, finished or failed."""
        pending = {slot.pending: slot for slot in self._cluster.slots if slot.pending is not None}
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
                task, slot.task, slot.pending = slot.task, None, None
                if task is None:
                    slot.name, slot.failed_starts = result, 0
                else:
                    self._finished(slot, task, result)

    def _finished(self, slot: Slot, task: Task, times: StageTimes) -> None:
        self._failures_in_a_row = 0
        if task.last is not None:
            self._keep_piece(task, None)
        self._done_residues += times.residues_done - slot.times.residues_done
        self.times.add(_difference(times, slot.times))
        slot.times = times
        if slot.snapshot is not None:
            slot.snapshot = replace(slot.snapshot, times=times, shard=None)

    def _failed(self, slot: Slot, error: Exception) -> None:
        cause = root_cause(error)
        if is_lasting(cause):
            raise cause
        task = slot.task
        self._replace(slot)
        if task is None:
            slot.failed_starts += 1
            if slot.failed_starts == MAX_FAILED_STARTS:
                raise EngineError(f"worker {slot.rank} cannot be started: {cause}")
            return
        self._attempts[task] += 1
        self._failures_in_a_row += 1
        attempts = self._attempts[task]
        self._console.note(f"worker {slot.rank}: {task} failed: {cause}")
        if self._failures_in_a_row > MAX_FAILURES_IN_A_ROW:
            raise EngineError(f"workers fail on every shard, most recently with: {cause}")
        num_sequences = self._sequences(task)
        if not num_sequences:
            raise EngineError(f"{task} fails although it has nothing to compute: {cause}")
        # a piece is known to fail: only a single sequence is retried
        if attempts < MAX_ATTEMPTS and (task.last is None or num_sequences == 1):
            self._delayed.append((time.monotonic() + BACK_OFF_SECONDS * 2 ** (attempts - 1), task))
        elif num_sequences > 1:
            middle = task.first + num_sequences // 2
            last = task.first + num_sequences
            # appended at the end: the good half runs before the quarters of the other, so failures alternate
            self._waiting += [Task(task.shard, task.first, middle), Task(task.shard, middle, last)]
        else:
            self._keep_piece(Task(task.shard, task.first, task.first + 1), f"its worker failed: {cause}")

    def _replace(self, slot: Slot) -> None:
        with suppress(Exception):
            self._ray.kill(slot.actor)
        slot.actor = slot.pending = slot.task = None
        slot.name = "starting"
        self._open(slot)

    def _sequences(self, task: Task) -> int:
        if task.last is not None:
            return task.last - task.first
        return len(self._run.computed(task.shard))

    def _keep_piece(self, task: Task, failure: str | None) -> None:
        """Keep a piece of a shard, and write the shard when it is complete.

        Args:
            task: the piece.
            failure: why it failed, only for a single sequence; None if it was computed.
        """
        pieces = self._pieces.setdefault(task.shard, {})
        pieces[task] = failure
        if sum(map(self._sequences, pieces)) < len(self._run.computed(task.shard)):
            return
        with self._run.output(task.shard) as whole:
            for piece, reason in pieces.items():
                if reason is not None:
                    whole.write_failed(piece.first, reason)
                else:
                    self._run.take_piece(
                        piece.shard, piece.first, piece.first + self._sequences(piece), whole
                    )
        del self._pieces[task.shard]

    def _check_room(self) -> None:
        """Check that there is, or can be, a worker: Ray would wait forever for a new node."""
        now = time.monotonic()
        if not all(slot.is_starting for slot in self._cluster.slots) or self._cluster.has_room():
            self._last_room = now
        elif now - self._last_room >= NO_ROOM_SECONDS:
            raise EngineError("no node of the cluster has the resources for a worker")

    def _ask(self) -> None:
        """Ask workers for their progress without waiting for their answers."""
        for slot in self._cluster.slots:
            if slot.is_starting:
                continue
            if slot.asked is not None:
                ready, _ = self._ray.wait([slot.asked], timeout=0)
                if not ready:
                    continue
                with suppress(self._ray.exceptions.RayError):
                    snapshot = self._ray.get(slot.asked)
                    # an answer from before the last task finished is outdated
                    if snapshot is None or snapshot.times.residues_done >= slot.times.residues_done:
                        slot.snapshot = snapshot
            slot.asked = slot.actor.snapshot.remote()

    def _states(self) -> list[WorkerState]:
        return [WorkerState(slot.rank, slot.name, slot.snapshot) for slot in self._cluster.slots]


def _new_residues(slot: Slot) -> int:
    """Residues of the current task that the worker has reported."""
    if slot.snapshot is None:
        return 0
    return max(0, slot.snapshot.times.residues_done - slot.times.residues_done)


def _difference(now: StageTimes, before: StageTimes) -> StageTimes:
    return StageTimes(**{name: value - getattr(before, name) for name, value in vars(now).items()})


def is_lasting(cause: BaseException) -> bool:
    """Whether the error would recur with any shard and on any worker."""
    return isinstance(cause, UserError) or getattr(cause, "errno", None) in LASTING_ERRORS


def root_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, or one that says that it died."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    if not type(error).__module__.startswith("ray."):
        return error
    from ray import exceptions

    if isinstance(error, exceptions.ActorUnavailableError):
        return RuntimeError("the worker cannot be reached")
    has_died = isinstance(error, (exceptions.ActorDiedError, exceptions.WorkerCrashedError))
    if has_died and not getattr(error, "actor_init_failed", False):
        return RuntimeError("the process died")
    lines = str(error).strip().splitlines()
    return RuntimeError(lines[-1] if lines else type(error).__name__)
