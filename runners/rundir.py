"""The directory a run is worked on in, and the claim of the one process that works on it.

.OUT.h5.claim           held by the process at work
OUT.h5.run/
    plan.json           what the run is (see `plan`)
    index/              the records of the inputs (see `index`)
    shards/00007.h5     finished work, each file whole or not there
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 600.0


class ClaimedError(RuntimeError):
    """Another live process holds the claim; the message says which."""


class Claim:
    """A file that says who works on something. It is refreshed while the process lives, until released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = secrets.token_hex(8)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the claim, over from a holder that is gone if need be.

        Raises:
            ClaimedError: a live process holds it.
            OSError: the folder cannot be written to.
        """
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": self._token,
        }
        # Linking a complete file is atomic also on NFS, where O_EXCL alone may leave an empty one behind.
        draft = self.path.with_name(f".{self.path.name}.{self._token}.tmp")
        try:
            draft.write_text(json.dumps(holder))
            try:
                while not _link(draft, self.path) and not self._take_over(draft):
                    pass
            except FileNotFoundError:
                raise ClaimedError("another process, which has just swept this one's draft away") from None
        finally:
            draft.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._refresh, name=f"claim {self.path.name}", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the claim back."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if holder_of(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)

    def _take_over(self, draft: Path) -> bool:
        """Replace the claim of a holder that is gone; False if the claim has changed meanwhile."""
        now = draft.stat().st_mtime  # the clock of the file system
        holder = holder_of(self.path)
        pid, started = holder.get("pid"), holder.get("process_started")
        gone = (
            holder.get("host") == socket.gethostname()
            and isinstance(pid, int)
            and isinstance(started, str)
            and pid > 0
            and _process_start(pid) != started
        )
        # Whoever links this name is the successor of that one holder. A process that saw the stale claim long
        # ago may link it, too, but finds another holder then.
        generation = hashlib.sha256(repr(holder.get("token")).encode()).hexdigest()[:16]
        succession = self.path.with_name(f".{self.path.name}.after-{generation}.tmp")
        try:
            if not gone and now - self.path.stat().st_mtime < STALE_SECONDS:
                raise ClaimedError(
                    f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, "
                    f"since {holder.get('since', '?')}"
                )
            if not _link(draft, succession):
                if now - succession.stat().st_mtime < STALE_SECONDS:
                    raise ClaimedError("another process, which takes it over")
                succession.unlink()
                return False
        except FileNotFoundError:
            return False
        try:
            if holder_of(self.path).get("token") != holder.get("token"):
                return False
            copy = draft.with_suffix(".copy.tmp")
            _link(draft, copy)
            copy.replace(self.path)
        finally:
            succession.unlink(missing_ok=True)
        return True

    def __enter__(self) -> Claim:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder_of(path: Path) -> dict[str, Any]:
    """What a claim says of who holds it; empty when there is none, or it says nothing."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _link(source: Path, target: Path) -> bool:
    """Make `target` a second name of `source`, or a copy where there are no links; False if it exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:
        try:
            with target.open("x") as file:
                file.write(source.read_text())
        except FileExistsError:
            return False
    return True


def _process_start(pid: int) -> str:
    """When a process of this host began, in clock ticks since boot; empty when it is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return "running"  # no /proc: a process of this number lives
    fields = status.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


class RunDirectory:
    """`OUT.h5.run`, beside the output it becomes."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.run")
        self.plan_path = self.path / "plan.json"
        self.index_path = self.path / "index"

    def create(self) -> None:
        """Make the folders that are missing, and remove what a killed process left half-written."""
        for name in ("index", "shards"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        name = glob.escape(self.output.name)
        for litter in (
            self.output.parent.glob(f".{name}.*.tmp"),
            self.output.parent.glob(f"..{name}.claim.*.tmp"),
            self.path.glob(".*.tmp"),
            (self.path / "shards").glob(".*.tmp"),
        ):
            for path in litter:
                path.unlink(missing_ok=True)

    def shard_path(self, shard: int) -> Path:
        """Where a finished shard lies."""
        return self.path / "shards" / f"{shard:05}.h5"

    def finished(self, num_shards: int) -> list[int]:
        """Shards whose files are there; what they hold is checked when they are read."""
        names = {entry.name for entry in os.scandir(self.path / "shards")}
        return [shard for shard in range(num_shards) if self.shard_path(shard).name in names]

    def claim(self) -> Claim:
        """The claim of the one process that may work on the run; it lies outside and outlives it."""
        return Claim(self.output.with_name(f".{self.output.name}.claim"))

    def forget_shards(self) -> None:
        """Remove all shards: they belong to no plan, or to one that is given up."""
        for entry in (self.path / "shards").iterdir():
            entry.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the directory with all it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
