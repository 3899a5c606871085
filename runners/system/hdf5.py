"""HDF5 files whose writer raises an error, instead of crashing, when the disk is full."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py

from esm_packed.runners.system.signals import signals_deferred


class FailureKeepingFile(io.RawIOBase):
    """A file object for HDF5 that hides failed writes from it.

    HDF5 2.0 crashes the process after a failed write (a full disk, a quota, an I/O error). The first failure
    is kept for the writer to raise, and later writes are dropped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self._position = 0
        self._end = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        try:
            count = os.preadv(self._descriptor, [buffer], self._position)
        except OSError as error:
            self.failure = self.failure or error
            return 0
        self._position += count
        return count

    def write(self, data: Any) -> int:
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        start, self._position = self._position, self._position + size
        self._end = max(self._end, self._position)
        while remaining and self.failure is None:
            try:
                written = os.pwrite(self._descriptor, remaining, start)
            except OSError as error:
                self.failure = error
            else:
                remaining = remaining[written:]
                start += written
        return size

    def truncate(self, size: int | None = None) -> int:
        self._end = self._position if size is None else size
        if self.failure is None:
            try:
                os.ftruncate(self._descriptor, self._end)
            except OSError as error:
                self.failure = error
        return self._end


class NewFile:
    """A new HDF5 file, to be written in a `with` block.

    Args:
        path: the file to create; it must not exist.

    Attributes:
        file: the `h5py.File`, to be used within `writing`.

    Raises:
        OSError: the disk is full or fails; the file is then unusable. `writing` and `close` raise it, too.
    """

    def __init__(self, path: Path) -> None:
        self._output = FailureKeepingFile(path)
        self.file: Any = None
        try:
            with self.writing():
                self.file = h5py.File(self._output, "w")
        except BaseException:
            self.abandon()
            raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Run HDF5 with signals deferred; raise the original error of a failed write."""
        try:
            with signals_deferred():
                yield
        finally:
            if self._output.failure is not None:
                raise self._output.failure

    def close(self) -> None:
        """Flush and close; the file is valid only if this returns."""
        with self.writing():
            try:
                self.file.close()
            finally:
                self._output.close()

    def abandon(self) -> None:
        """Close after a failure, ignoring further errors of HDF5."""
        with signals_deferred(), suppress(OSError, RuntimeError):
            try:
                if self.file is not None:
                    self.file.close()
            finally:
                self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()
