"""The directory a run is worked on in, and who may do what in it.

OUT.h5.run/
    ESM-PACKED-RUN          the marker: this folder is ours, and so is all that it holds
    claim                   held by the one process that plans, admits, merges or cleans up
    plan.json               what the run is (see `plan`)
    queries.npz             of a scoring run, what is computed (see `queries`)
    index/                  the records of the inputs (see `index`); index.new/ until known to be the plan's
    shards/00007.shard      finished work, each file whole or not there
    slices/3-of-8.claim     held by a process that computes one slice of the shards
    logs/                   a log of each worker
    tmp/                    files that are being written; what killed processes left is swept

A process that computes all shards holds the claim from beginning to end. One with a slice holds it while it
joins and while it leaves, so that nobody joins a run that is being replaced, merged or removed.

The directory is made as `.OUT.h5.run.new`, gets its marker and then its name, and is removed as
`.OUT.h5.run.old`: no kill leaves it without its marker. Nothing is touched in a directory without one.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from esm_packed.errors import UsageError
from esm_packed.files import read_regular, sync
from esm_packed.runners.state.claims import Claim, is_live
from esm_packed.runners.state.slices import Slice

WHOLE_RUN = "the whole run"

MARKER = "ESM-PACKED-RUN"
_MARKER_TEXT = b"""\
esm-packed run directory, format 1
esm-packed removes this folder, with everything in it, when the run is complete.
"""
_FOLDERS = ("index", "index.new", "shards", "slices", "logs", "tmp")
_LONGEST_AFFIX = len("..run.new")


class RunDirectory:
    """`OUT.h5.run`, beside the output it becomes."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.run")
        self.plan_path = self.path / "plan.json"
        self.queries_path = self.path / "queries.npz"
        self.index_path = self.path / "index"
        self.new_index_path = self.path / "index.new"
        self.logs_path = self.path / "logs"
        self.scratch_path = self.path / "tmp"
        self._slices = self.path / "slices"
        self._being_made = output.with_name(f".{self.path.name}.new")
        self._being_removed = output.with_name(f".{self.path.name}.old")

    def check_name(self) -> None:
        """See that the name of the output leaves room for those of the directory.

        Raises:
            UsageError: it does not.
        """
        try:
            longest = os.pathconf(self.output.parent, "PC_NAME_MAX") - _LONGEST_AFFIX
        except (OSError, ValueError):
            return
        if len(os.fsencode(self.output.name)) > longest:
            raise UsageError(
                f"{self.output.name}: too long for the name of an output, beside which the run directory "
                f"stands; use at most {longest} bytes"
            )

    @staticmethod
    def holds(path: Path) -> bool:
        """Whether a path lies in some run directory."""
        return _is_made_by_us(path.parent)

    def exists(self) -> bool:
        """Whether there is such a directory.

        Raises:
            UsageError: something else has its name.
        """
        if not os.path.lexists(self.path):
            return False
        self._prove()
        return True

    def make(self) -> None:
        """Make the directory and the folders in it, as far as they are missing.

        Raises:
            UsageError: something that is not ours has its name, or is in it.
            FileNotFoundError: another process has removed it meanwhile.
            OSError: the folder of the output cannot be written to.
        """
        old = self._being_removed
        if _is_foreign(old):
            raise UsageError(
                f"{old}: in the way of the run directory, and not made by esm-packed; move it away"
            )
        while not self.exists():
            self._mark(self._being_made)
            try:
                self._being_made.rename(self.path)
            except FileNotFoundError:  # another process has given it its name
                continue
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        for name in _FOLDERS:
            if name != self.new_index_path.name:
                (self.path / name).mkdir(exist_ok=True)

    def sweep(self) -> None:
        """Remove what killed processes left half-written. Call it with the claim held.

        While slices are being computed nothing is removed from the directory.
        """
        _discard(self._being_removed)
        if self.live_slices():
            return
        self._put_draft_aside()
        for folder in (self.scratch_path, self._slices):
            for entry in folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def shard_path(self, shard: int) -> Path:
        """Where a finished shard lies."""
        return self.path / "shards" / f"{shard:05}.shard"

    def finished(self, num_shards: int) -> list[int]:
        """Shards whose files are there; what they hold is checked when they are read."""
        names = {entry.name for entry in os.scandir(self.path / "shards")}
        return [shard for shard in range(num_shards) if self.shard_path(shard).name in names]

    def claim(self, purpose: str = WHOLE_RUN) -> Claim:
        """The claim on the whole run."""
        return Claim(self.path / "claim", purpose, self.scratch_path)

    def slice_claim(self, part: Slice) -> Claim:
        """The claim of the process that computes `part`."""
        path = self._slices / f"{part.index}-of-{part.count}.claim"
        return Claim(path, f"slice {part}", self.scratch_path)

    def live_slices(self) -> dict[Slice, Path]:
        """Slices that are being computed, and their claims."""
        if not self._slices.is_dir():
            return {}
        now = self._clock()
        names = sorted(entry.name for entry in os.scandir(self._slices) if entry.name.endswith(".claim"))
        live = {}
        for name in names:
            index, _, count = name.removesuffix(".claim").partition("-of-")
            if _is_number(index) and _is_number(count) and is_live(self._slices / name, now):
                live[Slice(int(index), int(count))] = self._slices / name
        return live

    def _clock(self) -> float:
        """The time by the clock of the file system, or by our own where nothing can be written."""
        probe = self.scratch_path / secrets.token_hex(8)
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def adopt_index(self) -> None:
        """Put the new index in the place of the old one. Only for an index that this process has made."""
        shutil.rmtree(self.index_path)
        self.new_index_path.rename(self.index_path)

    def forget_shards(self) -> int:
        """Remove all shards, which belong to no plan, or to one that is given up; how many there were."""
        entries = list((self.path / "shards").iterdir())
        for entry in entries:
            entry.unlink(missing_ok=True)
        return len(entries)

    def remove(self) -> None:
        """Delete the directory with all it holds, if it is there. Call it with the claim held."""
        if not self.exists():
            return
        self._put_draft_aside()
        for entry in os.scandir(self.path):  # what takes long first, while the directory has its name
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
        _discard(self._being_removed)
        try:
            self.path.rename(self._being_removed)
        except OSError:  # what is left under that name cannot be deleted now; this one goes with the next run
            return
        _discard(self._being_removed)

    def _put_draft_aside(self) -> None:
        """Take the draft of a process that lost the race to make the directory, or was killed, into it."""
        if _is_made_by_us(self._being_made):
            with suppress(OSError):
                self._being_made.rename(self.scratch_path / secrets.token_hex(8))

    def _mark(self, draft: Path) -> None:
        """Make `draft` a folder that holds nothing but the marker."""
        with suppress(FileExistsError):
            draft.mkdir()
        status = draft.lstat()
        if not stat.S_ISDIR(status.st_mode) or {entry.name for entry in draft.iterdir()} - {MARKER}:
            raise UsageError(f"{draft}: in the way of the run directory, and not made by esm-packed; move it")
        # all processes write the same bytes, so that it does not matter who is first
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(draft / MARKER, flags, 0o666), "wb") as file:
            file.write(_MARKER_TEXT)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            sync(draft)

    def _prove(self) -> None:
        """See that the directory is ours, and that nothing in it leads elsewhere.

        Raises:
            UsageError: it is not.
        """
        path = self.path
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise UsageError(f"{path}: in the way of the run directory, and no folder; move it away")
        if not _is_made_by_us(path):
            if path.lstat().st_ino != status.st_ino:
                raise FileNotFoundError(errno.ENOENT, "removed by another process", str(path))
            raise UsageError(
                f"{path}: this folder was not made by esm-packed (it has no {MARKER}), and nothing in it is "
                "touched; move it away, or name another output"
            )
        if status.st_uid != os.geteuid() and path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(
                f"{path}: belongs to another user, and others than the owner of {path.parent} may write "
                "there; name an output in another folder"
            )
        for entry in os.scandir(path):
            is_folder = entry.name in _FOLDERS
            _check_kind(entry, is_folder)
            if is_folder:
                for inner in os.scandir(entry):
                    # a draft of the directory itself may have been put aside here
                    _check_kind(inner, entry.name == self.scratch_path.name and inner.is_dir())
                    if entry.name == self.logs_path.name and inner.stat(follow_symlinks=False).st_nlink > 1:
                        raise UsageError(f"{inner.path}: has another name elsewhere; move it away")


def _check_kind(entry: os.DirEntry[str], is_folder: bool) -> None:
    """See that a directory entry is a folder, or a regular file, and no link."""
    is_right = (entry.is_dir if is_folder else entry.is_file)(follow_symlinks=False)
    if not is_right and os.path.lexists(entry.path):
        kind = "folder" if is_folder else "regular file"
        raise UsageError(f"{entry.path}: no {kind}, and not made by esm-packed; move it away")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 7


def _is_foreign(path: Path) -> bool:
    """Whether there is something of this name that others may have made."""
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and (_is_made_by_us(path) or not any(path.iterdir())):
            return False
        return path.lstat().st_ino == status.st_ino  # and not a folder that has just come and gone
    except FileNotFoundError:
        return False


def _discard(path: Path) -> None:
    """Delete a folder, if it is ours, its marker last, so that it stays ours until it is gone.

    Network file systems keep files that a process has open; then the folder stays, and is deleted later.
    """
    with suppress(OSError):
        if _is_made_by_us(path):
            for entry in os.scandir(path):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != MARKER:
                    Path(entry).unlink(missing_ok=True)
            if all(entry.name == MARKER for entry in os.scandir(path)):
                (path / MARKER).unlink(missing_ok=True)
        path.rmdir()


def _is_made_by_us(path: Path) -> bool:
    """Whether this is a folder, no link to one, that has the marker."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode) and read_regular(path / MARKER) == _MARKER_TEXT
    except OSError:
        return False
