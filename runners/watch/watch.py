"""Monitoring a run: one display for all of its workers, and metrics in a JSON Lines file."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mode

from esm_packed.runners.watch.console import Advance, Console, byte_size
from esm_packed.runners.watch.metrics import RESULTS_AHEAD, STAGES, Snapshot, StageTimes

DISPLAY_SECONDS = 1.0
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerState:
    """The state of a worker at one moment.

    Args:
        rank: its number in the run.
        name: the device it runs on.
        snapshot: state of its pipeline; None while it starts.
    """

    rank: int
    name: str
    snapshot: Snapshot | None

    @property
    def stage(self) -> str:
        """The stage that the others wait for: reading, computing or writing."""
        if self.snapshot is not None and self.snapshot.results_waiting >= RESULTS_AHEAD:
            return "writing"
        return "computing" if self.snapshot is not None and self.snapshot.packs_waiting else "reading"

    def describe(self) -> str:
        """A line for the terminal."""
        if self.snapshot is None:
            return f"  {self.rank}: {self.name}, starting"
        times = self.snapshot.times
        text = f"  {self.rank}: {self.name}, {times.residues / max(times.wall, 1e-9):,.0f} residues/s"
        if self.snapshot.shard is not None:
            text += f", shard {self.snapshot.shard}, {self.stage}"
        if self.snapshot.memory_bytes is not None:
            text += f", {byte_size(self.snapshot.memory_bytes)} on the device"
        return text


class Watch:
    """Shows the progress of a run, and logs metrics.

    Args:
        console: gets a note if the log can no longer be written.
        advance: reports finished residues to the display, and to a bar the stage most workers wait for.
        show: shows a line for each worker; None if there is only one.
        log: file for metrics, one JSON object per line; None for no log.
        total: residues to compute.
    """

    def __init__(
        self,
        console: Console,
        advance: Advance,
        show: Callable[[Sequence[str]], None] | None,
        log: Path | None,
        total: int,
    ) -> None:
        self._console = console
        self._advance = advance
        self._show = show
        self._log = log
        self._total = total
        self._done = 0
        self._begin = self._last_shown = time.monotonic()
        self._last_logged = float("-inf")

    @property
    def done(self) -> int:
        """Residues computed since the start."""
        return self._done

    def update(self, done: int, states: Callable[[], Sequence[WorkerState]]) -> None:
        """Update the display and the log.

        Args:
            done: residues computed since the start.
            states: returns the states of the workers; called only when they are due to be shown or logged.
        """
        if done != self._done:
            self._advance(done - self._done)
            self._done = done
        now = time.monotonic()
        is_shown = self._show is not None or self._console.has_bar
        if is_shown and now - self._last_shown >= DISPLAY_SECONDS:
            self._last_shown = now
            seen = states()
            self._advance(0, mode(state.stage for state in seen))
            if self._show is not None:
                self._show([state.describe() for state in seen])
        if self._log is not None and now - self._last_logged >= LOG_SECONDS:
            self.write_log(states(), "running")

    def write_log(self, states: Sequence[WorkerState], event: str) -> None:
        """Append a line of metrics to the log, if there is one.

        A failure to write it does not end the run.
        """
        if self._log is None:
            return
        self._last_logged = time.monotonic()
        elapsed = self._last_logged - self._begin
        rate = self._done / elapsed if elapsed > 0 else 0.0
        times = StageTimes()
        for state in states:
            if state.snapshot is not None:
                times.add(state.snapshot.times)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "elapsed_seconds": round(elapsed, 3),
            "residues_done": self._done,
            "residues_total": self._total,
            "residues_per_second": round(rate, 1),
            "eta_seconds": round((self._total - self._done) / rate, 1) if rate else None,
            "tokens_per_second": round(times.tokens / elapsed, 1) if elapsed > 0 else 0.0,
            "sequences_per_second": round(times.sequences / elapsed, 2) if elapsed > 0 else 0.0,
            "packing_efficiency": round(times.packing_efficiency, 4),
            "workers": [_worker_metrics(state) for state in states],
        }
        try:
            with self._log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._console.note(f"{self._log}: {error.strerror}; no more metrics are written")
            self._log = None


def _worker_metrics(state: WorkerState) -> dict[str, object]:
    if state.snapshot is None:
        return {"rank": state.rank, "device": state.name, "state": "starting"}
    times = state.snapshot.times
    return {
        "rank": state.rank,
        "device": state.name,
        "state": "working" if state.snapshot.shard is not None else "idle",
        "shard": state.snapshot.shard,
        "packs_waiting": state.snapshot.packs_waiting,
        "results_waiting": state.snapshot.results_waiting,
        "stage_seconds": {stage: round(getattr(times, stage), 3) for stage in STAGES},
        "device_busy": round(times.busy, 4),
        "device_memory_bytes": state.snapshot.memory_bytes,
        "device_utilization_percent": state.snapshot.utilization,
        **{name: value for name, value in asdict(times).items() if isinstance(value, int)},
    }


@contextmanager
def watching(console: Console, num_workers: int, log: Path | None, total: int) -> Iterator[Watch]:
    """A `Watch` while `total` residues are computed."""
    with ExitStack() as stack:
        advance = stack.enter_context(console.progress("embedding", "residues", total))
        show = stack.enter_context(console.lines(num_workers)) if num_workers > 1 else None
        yield Watch(console, advance, show, log, total)
