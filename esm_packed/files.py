"""Regular files: read safely, written atomically, never over a file that is being read."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: it is a link, pipe or device, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """The content of a file, as `open_regular` opens it."""
    with open_regular(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, as `open_regular` opens it."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit on the size of files is behind `error`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__
    return False


@contextmanager
def whole_or_nothing(path: Path, scratch: Path | None = None, *, overwrite: bool = True) -> Iterator[Path]:
    """A name to write under; moved to `path` when the block ends well, removed when it does not.

    Args:
        path: the file to make.
        scratch: a directory on the same file system for the unfinished file; None for that of `path`.
        overwrite: replace a file that is there by then; without it another run's output is never lost.

    Raises:
        FileExistsError: `path` has come to exist meanwhile and may not be replaced.
        OSError: a directory cannot be written to, or the file system fails while data are flushed.
    """
    unfinished = f"{path.name}.{secrets.token_hex(4)}"
    temporary = scratch / unfinished if scratch is not None else path.with_name(f".{unfinished}")
    try:
        yield temporary
        sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _move_to_new(temporary, path)
        with suppress(OSError):  # the file itself is safe, and not every file system can flush a directory
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_new(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # it exists, or the file system has no hard links
        if os.path.lexists(target):
            raise FileExistsError(
                errno.EEXIST, "another run has made this file meanwhile; this result is dropped", str(target)
            ) from None
        source.replace(target)


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
