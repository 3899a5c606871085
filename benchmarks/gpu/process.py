"""Processes of a GPU check: each has a time limit, and its output goes into one log."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".gpu_cache"
"""Cache of compiled code for later calls on the same machine; ignored by git."""

CLOSING_SECONDS = 8.0
GRACE_SECONDS = 8.0
LOG_CHARACTERS = 300_000
"""Kept of the output of one step."""

_CUDA_TOOLS = ["/usr/local/cuda/bin", *map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*")))]
"""Directories of compute-sanitizer and ncu."""

Result = dict[str, Any]


@dataclass
class Done:
    """How a process ended."""

    code: int
    output: str
    timed_out: bool


@dataclass
class Check:
    """One run: its directories, remaining time and results so far."""

    out: Path
    work: Path
    device: str
    deadline: float
    jobs: int
    command: str
    commit: str | None
    report: Result = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    stopping: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.report = {
            "machine": {},
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": self.device,
            "steps": {},
        }
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), *_CUDA_TOOLS]),
            "PYTHONSAFEPATH": "1",  # the working tree must not stand in for the installed package
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_CACHE_DIR": str(CACHE / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }

    @property
    def site(self) -> Path:
        """Where the package is installed."""
        return self.work / "site"

    def left(self) -> float:
        """Seconds until everything must be written."""
        return self.deadline - CLOSING_SECONDS - time.monotonic()

    def save(self) -> None:
        """Write the JSON file, whole or not at all."""
        with self._lock:
            partial_file = self.out / "gpu_check.json.partial"
            partial_file.write_text(json.dumps(self.report, indent=1, default=str) + "\n")
            partial_file.replace(self.out / "gpu_check.json")

    def run(self, name: str, command: Sequence[str], seconds: float) -> Done:
        """Run a command, its output into the log; past `seconds` it is interrupted, then killed."""
        if self.stopping:
            raise RuntimeError("interrupted before it began")
        log = self.work / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment,
                process_group=0,
            )
        with self._lock:
            self._running.add(process)
        timed_out = False
        try:
            process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            self._stop(process)
            with self._lock:
                self._running.discard(process)
        output = log.read_text(errors="replace")
        with self._lock, (self.out / "log.txt").open("a") as file:
            file.write(f"\n=== {name}: {shlex.join(command)}\n{output[-LOG_CHARACTERS:]}\n")
        return Done(process.returncode, output, timed_out)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        # Children of the process, too: a compiler or a worker would hold the machine.
        for number, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            if process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop_all(self) -> None:
        """Kill what still runs, and let nothing else begin."""
        self.stopping = True
        with self._lock:
            running = list(self._running)
        for process in running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def num_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
