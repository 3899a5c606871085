"""The working directory of a run, and which process may do what in it.

OUT.h5.run/
    ESM-PACKED-RUN          the marker: this directory and all its content belong to esm-packed
    claim                   held by the one process that plans, admits, merges or cleans up
    plan.json               the definition of the run (see `plan`)
    queries.npz             what a scoring run computes (see `queries`)
    index/                  the records of the inputs (see `index`); index.new/ until found to match the plan
    shards/00007.shard      finished work; each file is either complete or absent
    slices/3-of-8.claim     held by a process that computes one slice of the shards
    logs/                   a log of each worker
    tmp/                    unfinished files; leftovers of killed processes are removed

A process that computes all shards holds the claim from start to end. A process with a slice holds it while
joining and while leaving, so that no process joins a run that is being replaced, merged or removed.

The directory is created as `.OUT.h5.run.new`, gets its marker and then its final name, and is renamed to
`.OUT.h5.run.old` for removal, so a killed process never leaves it without its marker. Nothing is changed in a
directory without a marker.
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
esm-packed removes this directory, with everything in it, when the run is complete.
"""
_NOT_OURS = "not created by esm-packed, but the run directory needs this name; move it"
_SUBDIRECTORIES = ("index", "index.new", "shards", "slices", "logs", "tmp")
_LONGEST_AFFIX = len("..run.new")


class RunDirectory:
    """`OUT.h5.run`, next to the output file that is created from it."""

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
        """Check that the output's name is short enough for the directory's names, which are longer.

        Raises:
            UsageError: the name is too long.
        """
        try:
            longest = os.pathconf(self.output.parent, "PC_NAME_MAX") - _LONGEST_AFFIX
        except (OSError, ValueError):
            return
        if len(os.fsencode(self.output.name)) > longest:
            raise UsageError(
                f"{self.output.name}: name too long, because the name of the run directory is longer; use at "
                f"most {longest} bytes"
            )

    @staticmethod
    def holds(path: Path) -> bool:
        """Whether a path lies directly in a run directory."""
        return _is_made_by_us(path.parent)

    def exists(self) -> bool:
        """Whether the directory exists.

        Raises:
            UsageError: something else has its name.
        """
        if not os.path.lexists(self.path):
            return False
        self._prove()
        return True

    def make(self) -> None:
        """Create the directory and its subdirectories if missing.

        Raises:
            UsageError: something not created by esm-packed has its name, or is in it.
            FileNotFoundError: another process removed it in the meantime.
            OSError: the output's directory cannot be written to.
        """
        old = self._being_removed
        if _is_foreign(old):
            raise UsageError(f"{old}: {_NOT_OURS}")
        while not self.exists():
            self._mark(self._being_made)
            try:
                self._being_made.rename(self.path)
            except FileNotFoundError:  # another process has renamed it
                continue
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
        for name in _SUBDIRECTORIES:
            if name != self.new_index_path.name:
                (self.path / name).mkdir(exist_ok=True)

    def sweep(self) -> None:
        """Remove unfinished files of killed processes. The claim must be held.

        While slices are being computed, nothing is removed from the directory.
        """
        _discard(self._being_removed)
        if self.live_slices():
            return
        self._put_draft_aside()
        for directory in (self.scratch_path, self._slices):
            for entry in directory.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def shard_path(self, shard: int) -> Path:
        """Return the path of a finished shard."""
        return self.path / "shards" / f"{shard:05}.shard"

    def finished(self, num_shards: int) -> list[int]:
        """Return the shards whose files exist; their content is checked when they are read."""
        names = {entry.name for entry in os.scandir(self.path / "shards")}
        return [shard for shard in range(num_shards) if self.shard_path(shard).name in names]

    def claim(self, purpose: str = WHOLE_RUN) -> Claim:
        """Return the claim on the whole run."""
        return Claim(self.path / "claim", purpose, self.scratch_path)

    def slice_claim(self, part: Slice) -> Claim:
        """Return the claim of the process that computes `part`."""
        path = self._slices / f"{part.index}-of-{part.count}.claim"
        return Claim(path, f"slice {part}", self.scratch_path)

    def live_slices(self) -> dict[Slice, Path]:
        """Return the slices that are being computed, and the paths of their claims."""
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
        """Return the time by the clock of the file system, or the local clock if nothing can be written."""
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
        """Replace the old index by the new one. Only for an index built by this process."""
        shutil.rmtree(self.index_path)
        self.new_index_path.rename(self.index_path)

    def forget_shards(self) -> int:
        """Remove all shards, which belong to no plan or an abandoned one; return how many there were."""
        entries = list((self.path / "shards").iterdir())
        for entry in entries:
            entry.unlink(missing_ok=True)
        return len(entries)

    def remove(self) -> None:
        """Delete the directory and its content, if it exists. The claim must be held."""
        if not self.exists():
            return
        self._put_draft_aside()
        for entry in os.scandir(self.path):  # slow deletions first, while the directory has its name
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
        _discard(self._being_removed)
        try:
            self.path.rename(self._being_removed)
        except OSError:  # the old directory cannot be deleted now; the next run removes this one
            return
        _discard(self._being_removed)

    def _put_draft_aside(self) -> None:
        """Move the draft of a process that was killed, or lost the race to create the directory, into it."""
        if _is_made_by_us(self._being_made):
            with suppress(OSError):
                self._being_made.rename(self.scratch_path / secrets.token_hex(8))

    def _mark(self, draft: Path) -> None:
        """Make `draft` a directory that contains only the marker."""
        with suppress(FileExistsError):
            draft.mkdir()
        status = draft.lstat()
        if not stat.S_ISDIR(status.st_mode) or {entry.name for entry in draft.iterdir()} - {MARKER}:
            raise UsageError(f"{draft}: {_NOT_OURS}")
        # all processes write the same bytes, so it does not matter which one is first
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(draft / MARKER, flags, 0o666), "wb") as file:
            file.write(_MARKER_TEXT)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            sync(draft)

    def _prove(self) -> None:
        """Check that esm-packed created the directory, and that nothing in it links elsewhere.

        Raises:
            UsageError: a check fails.
        """
        path = self.path
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise UsageError(f"{path}: {_NOT_OURS}")
        if not _is_made_by_us(path):
            if path.lstat().st_ino != status.st_ino:
                raise FileNotFoundError(errno.ENOENT, "removed by another process", str(path))
            raise UsageError(
                f"{path}: not created by esm-packed (there is no {MARKER} in it) and left unchanged, but the "
                "run directory needs this name; move it, or choose another output"
            )
        if status.st_uid != os.geteuid() and path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(
                f"{path}: belongs to another user, and {path.parent} is writable by others than its owner; "
                "choose an output in another directory"
            )
        for entry in os.scandir(path):
            is_directory = entry.name in _SUBDIRECTORIES
            _check_kind(entry, is_directory)
            if is_directory:
                for inner in os.scandir(entry):
                    # a draft of the directory itself may have been put aside here
                    _check_kind(inner, entry.name == self.scratch_path.name and inner.is_dir())
                    if entry.name == self.logs_path.name and inner.stat(follow_symlinks=False).st_nlink > 1:
                        raise UsageError(f"{inner.path}: has another hard link; move it")


def _check_kind(entry: os.DirEntry[str], is_directory: bool) -> None:
    """Check that an entry is a directory, or a regular file, and not a link."""
    is_right = (entry.is_dir if is_directory else entry.is_file)(follow_symlinks=False)
    if not is_right and os.path.lexists(entry.path):
        kind = "directory" if is_directory else "regular file"
        raise UsageError(f"{entry.path}: not a {kind}, so not created by esm-packed; move it")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 7


def _is_foreign(path: Path) -> bool:
    """Whether something of this name exists that others may have created."""
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and (_is_made_by_us(path) or not any(path.iterdir())):
            return False
        return path.lstat().st_ino == status.st_ino  # and not a directory that has just been replaced
    except FileNotFoundError:
        return False


def _discard(path: Path) -> None:
    """Delete a directory with the marker, which is deleted last so that an interrupted deletion can resume.

    Network file systems keep files that a process has open; the directory then stays and is deleted later.
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
    """Whether this is a directory, not a link to one, that contains the marker."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode) and read_regular(path / MARKER) == _MARKER_TEXT
    except OSError:
        return False
