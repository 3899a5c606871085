"""A claim: a file that says which process works on something, so that no second one does."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 600.0


class ClaimedError(RuntimeError):
    """Another live process holds the claim.

    Args:
        holder: which one, for the terminal.
        purpose: what it claims it for; empty where that is not known.
    """

    def __init__(self, holder: str, purpose: str = "") -> None:
        super().__init__(holder)
        self.purpose = purpose


class Claim:
    """A file that says who works on something. It is refreshed while the process lives, until released.

    Args:
        path: the file.
        purpose: what it is claimed for, for others to read.
    """

    def __init__(self, path: Path, purpose: str = "") -> None:
        self.path = path
        self.purpose = purpose
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
            "purpose": self.purpose,
            "token": self._token,
            **_slurm_incarnation(),
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
        # Whoever links this name is the successor of that one holder. A process that saw the stale claim long
        # ago may link it, too, but finds another holder then.
        generation = hashlib.sha256(repr(holder.get("token")).encode()).hexdigest()[:16]
        succession = self.path.with_name(f".{self.path.name}.after-{generation}.tmp")
        try:
            if not _is_gone(holder) and now - self.path.stat().st_mtime < STALE_SECONDS:
                raise ClaimedError(describe_holder(holder), str(holder.get("purpose", "")))
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


def is_live(path: Path, now: float) -> bool:
    """Whether there is a claim, and its holder shows signs of life.

    Args:
        path: of the claim.
        now: seconds since the epoch by the clock of the file system.
    """
    try:
        silent = now - path.stat().st_mtime
    except FileNotFoundError:
        return False
    return silent < STALE_SECONDS and not _is_gone(holder_of(path))


def describe_holder(holder: dict[str, Any]) -> str:
    """As `process 17 on node3, since 2026-01-31 12:00:00`."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that does not live any more, or of this requeued job."""
    mine = _slurm_incarnation()
    if mine and mine["job"] == holder.get("job") and holder.get("restarts", 0) < mine["restarts"]:
        return True
    pid, started = holder.get("pid"), holder.get("process_started")
    return (
        holder.get("host") == socket.gethostname()
        and isinstance(pid, int)
        and isinstance(started, str)
        and pid > 0
        and _process_start(pid) != started
    )


def _slurm_incarnation() -> dict[str, Any]:
    """The Slurm job of this process, and how often it was requeued: its earlier processes are gone."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return {"job": job, "restarts": int(restarts)} if job and restarts.isdecimal() else {}


def _link(source: Path, target: Path) -> bool:
    """Make `target` a second name of `source`, or a copy where there are no links; False if it exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError:
        content = source.read_text()  # first: nothing may fail once the target is there
        try:
            with target.open("x") as file:
                file.write(content)
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
