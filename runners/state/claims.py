"""Claims: files that say which process is working on something, so that no other process does."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from esm_packed.files import read_regular

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 600.0


class ClaimedError(RuntimeError):
    """Another live process holds the claim.

    Args:
        holder: description of that process, for display.
        purpose: what the claim is for; empty if unknown.
    """

    def __init__(self, holder: str, purpose: str = "") -> None:
        super().__init__(holder)
        self.purpose = purpose


class Claim:
    """A file that says who is working on something. It is refreshed while the process lives, until released.

    Args:
        path: the file.
        purpose: what the claim is for, shown to other processes.
        scratch: directory on the same file system for temporary files; that of `path` if None.
    """

    def __init__(self, path: Path, purpose: str = "", scratch: Path | None = None) -> None:
        self.path = path
        self.purpose = purpose
        self._scratch = path.parent if scratch is None else scratch
        self._token = secrets.token_hex(8)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquire the claim, taking it over if its holder is gone.

        Raises:
            ClaimedError: a live process holds it.
            OSError: the directory cannot be written to.
            RuntimeError: no thread can be started to refresh the claim.
        """
        holder = {
            **_process_table(),
            "pid": os.getpid(),
            "process_started": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "purpose": self.purpose,
            "token": self._token,
            **_slurm_incarnation(),
        }
        # Linking a complete file is atomic even on NFS, where O_EXCL alone may leave an empty one behind.
        draft = self._scratch / f"{self._token}.claim"
        try:
            draft.write_text(json.dumps(holder))
            try:
                while not _link(draft, self.path) and not self._take_over(draft):
                    pass
            except FileNotFoundError:
                if not self.path.parent.is_dir():
                    raise
                raise ClaimedError(
                    "another process, which has just swept this one's draft away", "cleaning up"
                ) from None
            self._start_refreshing()
        except BaseException:
            self.release()
            raise
        finally:
            draft.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether the file still names this claim; a process that was suspended for long may have lost it."""
        return holder_of(self.path).get("token") == self._token

    def is_anothers(self) -> bool:
        """Whether the file names another claim."""
        return bool(holder_of(self.path).get("token", self._token) != self._token)

    def release(self) -> None:
        """Release the claim; do nothing if it was never acquired or has been taken over."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if self.is_held():
            self.path.unlink(missing_ok=True)

    def _start_refreshing(self) -> None:
        self._stopped.clear()
        thread = threading.Thread(target=self._refresh, name=f"claim {self.path.name}", daemon=True)
        thread.start()
        self._thread = thread  # only now: a thread that did not start cannot be joined

    def _refresh(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)

    def _take_over(self, draft: Path) -> bool:
        """Replace the claim of a holder that is gone; return False if the claim has changed meanwhile."""
        now = draft.stat().st_mtime  # the clock of the file system
        holder = holder_of(self.path)
        successions: list[Path] = []
        try:
            if not stat.S_ISREG(self.path.lstat().st_mode):
                raise OSError(errno.EINVAL, "is not a regular file; delete it", str(self.path))
            if _may_live(self.path, holder, now):
                raise ClaimedError(describe_holder(holder), str(holder.get("purpose", "")))
            # The process that links this name is the successor of that holder. If it is killed before the
            # claim is replaced, it has a successor in turn. A process that saw the old claim long ago may
            # also link one of the names, but then finds another holder.
            predecessor = holder
            while True:
                successions.append(self._succession_of(predecessor))
                if _link(draft, successions[-1]):
                    break
                predecessor = holder_of(successions[-1])
                if _may_live(successions[-1], predecessor, now):
                    raise ClaimedError("another process, which takes it over", "taking it over")
        except FileNotFoundError:
            return False
        try:
            if holder_of(self.path).get("token") != holder.get("token"):
                return False
            copy = draft.with_suffix(".copy")
            _link(draft, copy)
            copy.replace(self.path)
            for succession in successions[:-1]:
                succession.unlink(missing_ok=True)
        finally:
            successions[-1].unlink(missing_ok=True)
        return True

    def _succession_of(self, holder: dict[str, Any]) -> Path:
        """Return the path of the file that names the successor of `holder`."""
        generation = hashlib.sha256(repr(holder.get("token")).encode()).hexdigest()[:16]
        return self._scratch / f"{self.path.name}.after-{generation}"

    def __enter__(self) -> Claim:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder_of(path: Path) -> dict[str, Any]:
    """Return the holder recorded in a claim; empty if there is no claim or it cannot be read."""
    try:
        holder = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def is_live(path: Path, now: float) -> bool:
    """Whether there is a claim whose holder may be alive.

    Args:
        path: path of the claim.
        now: seconds since the epoch by the clock of the file system.
    """
    try:
        return _may_live(path, holder_of(path), now)
    except FileNotFoundError:
        return False


def _may_live(path: Path, holder: dict[str, Any], now: float) -> bool:
    """Whether `holder` may be alive: its claim `path` is not stale, and it is not known to be gone."""
    return not _is_stale(path, now) and not _is_gone(holder)


def _is_stale(path: Path, now: float) -> bool:
    """Whether a claim has not been refreshed for long; a time far in the future also counts as stale."""
    return abs(now - path.lstat().st_mtime) >= STALE_SECONDS


def describe_holder(holder: dict[str, Any]) -> str:
    """Describe a holder, as in `process 17 on node3, since 2026-01-31 12:00:00`."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that has ended, or of this Slurm job before a requeue."""
    mine = _slurm_incarnation()
    if mine and mine["job"] == holder.get("job") and holder.get("restarts", 0) < mine["restarts"]:
        return True
    pid, started = holder.get("pid"), holder.get("process_started")
    return (
        all(holder.get(name) == value for name, value in _process_table().items())
        and isinstance(pid, int)
        and isinstance(started, str)
        and 0 < pid < 1 << 31
        and _process_start(pid) != started
    )


def _process_table() -> dict[str, str]:
    """Identify the table in which PIDs are looked up; containers may share a host or its name."""
    return {
        "host": socket.gethostname(),
        "boot": _text_of("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _text_of("/proc/self/ns/pid"),
    }


def _text_of(path: str) -> str:
    """Return the content of a /proc file, or the target of a link; empty on systems without /proc."""
    with suppress(OSError):
        return str(Path(path).readlink()) if Path(path).is_symlink() else Path(path).read_text().strip()
    return ""


def _slurm_incarnation() -> dict[str, Any]:
    """Return the Slurm job of this process and its requeue count; processes before a requeue are gone."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return (
        {"job": job, "restarts": int(restarts)} if job and restarts.isascii() and restarts.isdecimal() else {}
    )


def _link(source: Path, target: Path) -> bool:
    """Hard-link `source` to `target`, or copy it if links are not supported; False if `target` exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError:
        content = source.read_text()  # read first: nothing may fail once the target exists
        try:
            with target.open("x") as file:
                file.write(content)
        except FileExistsError:
            return False
    return True


def _process_start(pid: int) -> str:
    """Return when a process of this host started, in clock ticks since boot; empty if it is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return "running"  # no /proc: a process with this PID is alive
    fields = status.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
