"""Files of an index: data followed by a checksum for each block, verified whenever the block is read."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.files import open_regular, sync
from esm_packed.runners.input.fasta import DamagedIndexError

METADATA = "index.json"
"""The file that authenticates all others of an index."""
BLOCK_BYTES = 1 << 18
_CHECKSUM = np.dtype("<u4")
_ROWS_AT_ONCE = 1 << 16


class Checksums:
    """CRC-32 of each block of the data passed to `update` in pieces."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._finished: list[int] = []
        self._current = 0

    def update(self, content: bytes | memoryview) -> None:
        """Add the next piece of data."""
        view = memoryview(content)
        while len(view):
            part = view[: BLOCK_BYTES - self.num_bytes % BLOCK_BYTES]
            self._current = zlib.crc32(part, self._current)
            self.num_bytes += len(part)
            view = view[len(part) :]
            if self.num_bytes % BLOCK_BYTES == 0:
                self._finished.append(self._current)
                self._current = 0

    def table(self) -> npt.NDArray[np.uint32]:
        """Return (num_blocks,) uint32 checksums; the last block may be partial."""
        rest = [self._current] if self.num_bytes % BLOCK_BYTES else []
        return np.array(self._finished + rest, dtype=_CHECKSUM)


def seal(path: Path, checksums: Checksums | None = None) -> dict[str, Any]:
    """Append the checksums to a file and wait until it is on disk.

    Args:
        path: the file.
        checksums: checksums of its whole content; None to compute them from the file.

    Returns:
        What `SealedFile` needs to verify the file; JSON-serializable.

    Raises:
        OSError: the disk is full or has failed.
    """
    if checksums is None:
        checksums = Checksums()
        with path.open("rb") as file:
            while content := file.read(BLOCK_BYTES):
                checksums.update(content)
    table = checksums.table().tobytes()
    with path.open("ab") as file:
        file.write(table)
    sync(path)
    return {"bytes": checksums.num_bytes, "sha256_of_checksums": hashlib.sha256(table).hexdigest()}


class SealedFile:
    """A file finished by `seal`, open for reading.

    The file is not memory-mapped, as truncating a mapped file would kill the process.

    Args:
        path: the file.
        seal: the return value of `seal`.

    Raises:
        OSError, ValueError: the file is missing, or its size or checksums do not match.
    """

    def __init__(self, path: Path, seal: dict[str, Any]) -> None:
        self.path = path
        self.num_bytes = int(seal["bytes"])
        self._file = open_regular(path)
        num_blocks = -(-self.num_bytes // BLOCK_BYTES)
        size = self.num_bytes + num_blocks * _CHECKSUM.itemsize
        table = self._read(self.num_bytes, size)
        if (
            os.fstat(self._file.fileno()).st_size != size
            or hashlib.sha256(table).hexdigest() != seal["sha256_of_checksums"]
        ):
            self._file.close()
            raise ValueError("damaged")
        self._table = np.frombuffer(table, _CHECKSUM).tolist()

    def close(self) -> None:
        """Close the file; network file systems keep open files even after deletion."""
        self._file.close()

    def read(self, begin: int, end: int) -> memoryview:
        """Return bytes [begin, end), 0 <= begin <= end <= num_bytes.

        Raises:
            DamagedIndexError: the file is damaged or truncated. The metadata of the index is then removed, so
                that the index is rebuilt.
        """
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        start = first * BLOCK_BYTES
        stop = min(last * BLOCK_BYTES, self.num_bytes)
        content = memoryview(self._read(start, stop))
        checksums = [
            zlib.crc32(content[offset : offset + BLOCK_BYTES])
            for offset in range(0, len(content), BLOCK_BYTES)
        ]
        if len(content) < stop - start or checksums != self._table[first:last]:
            self.path.with_name(METADATA).unlink(missing_ok=True)
            raise DamagedIndexError(f"{self.path}: damaged or truncated")
        return content[begin - start : end - start]

    def _read(self, begin: int, end: int) -> bytes:
        """Return bytes [begin, end), or fewer at the end of the file; one `pread` returns at most 2 GiB."""
        pieces = []
        while begin < end and (piece := os.pread(self._file.fileno(), end - begin, begin)):
            pieces.append(piece)
            begin += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class StoredRows:
    """Rows of one dtype in a sealed file, read on demand.

    Args:
        file: the file, which may be shared.
        dtype: dtype of a row.
        field: the field to return of each row; None returns whole rows.
    """

    def __init__(self, file: SealedFile, dtype: np.dtype[Any], field: str | None = None) -> None:
        self._file = file
        self._row = dtype
        self._field = field
        self.dtype: np.dtype[Any] = dtype if field is None else dtype[field]

    def __len__(self) -> int:
        return self._file.num_bytes // self._row.itemsize

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        """Return a copy of the rows of a slice without a step.

        Raises:
            DamagedIndexError: the file is damaged or truncated.
        """
        start, stop, _ = rows.indices(len(self))
        values = np.empty(max(0, stop - start), self.dtype)
        for first in range(start, stop, _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, stop)
            content = self._file.read(first * self._row.itemsize, last * self._row.itemsize)
            part = np.frombuffer(content, self._row)
            values[first - start : last - start] = part if self._field is None else part[self._field]
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list[Any]:
        """Return all rows as a list."""
        return list(self[:].tolist())
