"""A shard: its input, and the file of its results.

    arrays      stored consecutively; a row for each item, residue or pair of residues
    manifest    JSON: the run and the shard, shapes, notes on single items, checksums
    trailer     length of the manifest (8 bytes, little-endian) and its SHA-256

The ragged arrays of a shard may have moved to a part of the output, an HDF5 file; the manifest then names it.

An item is a unit of computation, such as a sequence. The row counts of the items determine where their rows
lie, so rows can be written in any order, and the file is never held in memory as a whole. Each block of an
array has a CRC-32, which is verified when it is read. It protects against accidental damage, not deliberate
changes, and takes half as long as SHA-256 with hardware instructions.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from esm_packed.errors import UserError
from esm_packed.files import open_regular, whole_or_nothing
from esm_packed.outputs import Per

SHARD_FORMAT = "esm-packed shard 3"
STATUS_COMPUTED = 0
STATUS_RECOMPUTED = 1
STATUS_FAILED = 2
STATUS_NOT_COMPUTED = 3

BLOCK_BYTES = 1 << 22
_TRAILER = struct.Struct("<Q32s")
_MANIFEST_BYTES = 1_024
"""Size of the manifest of a shard without failures, excluding its checksums."""

Rows = npt.NDArray[Any]
Items = npt.NDArray[np.int64]


class StoreError(UserError, ValueError):
    """A file that is not a complete esm-packed output."""


class Comparison(NamedTuple):
    """Difference between a mean embedding and its FP32 reference.

    Args:
        cosine: cosine similarity of the two.
        max_error: largest difference of a component.
        relative_error: L2 norm of the difference divided by that of the FP32 embedding.
    """

    cosine: float
    max_error: float
    relative_error: float


class ItemStatus(NamedTuple):
    """Status of an item that was not computed normally.

    Args:
        status: one of the STATUS values.
        reason: the reason for it.
    """

    status: int
    reason: str


@dataclass(frozen=True)
class ShardInput:
    """The input of a shard.

    Args:
        number: number of the shard.
        token_ids: the residues of each of its items.
        compared: items, as indices into `token_ids`, that are also computed individually in FP32.
        given: (num_items,) True for items whose rows come from elsewhere and are not computed; None if there
            are none.
        sites: residues of each item at which log-probabilities are read; None if items are embedded.
    """

    number: int
    token_ids: Sequence[npt.NDArray[np.uint8]]
    compared: Sequence[int] = ()
    given: npt.NDArray[np.bool_] | None = None
    sites: Sequence[Items] | None = None

    def sites_of(self, item: int) -> Items | None:
        """Return the sites at which an item is read."""
        return None if self.sites is None else self.sites[item]

    def piece(self, first: int, last: int) -> ShardInput:
        """Return the input of the items [first, last), without comparisons."""
        sites = None if self.sites is None else self.sites[first:last]
        return ShardInput(self.number, self.token_ids[first:last], sites=sites)


class Array(NamedTuple):
    """An array in a shard.

    Args:
        name: name of an output, such as `mean/33`.
        dtype: dtype of its values.
        columns: number of values in a row.
        per: what each row stands for.
    """

    name: str
    dtype: str
    columns: int
    per: Per = "sequence"

    @property
    def is_ragged(self) -> bool:
        """Whether items have different numbers of rows."""
        return self.per != "sequence"

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return self.columns * np.dtype(self.dtype).itemsize

    @property
    def block_rows(self) -> int:
        """Number of rows that share a checksum."""
        return max(1, BLOCK_BYTES // self.row_bytes)


class ShardShape:
    """The location of each item's rows in the file of a shard.

    Args:
        arrays: the arrays, in file order.
        counts: (num_items,) number of rows of each item, by what a row stands for.
        has_ragged: whether the ragged arrays are in this file rather than in a part of the output.
    """

    def __init__(
        self, arrays: Sequence[Array], counts: Mapping[Per, Items], *, has_ragged: bool = True
    ) -> None:
        self.arrays = {array.name: array for array in arrays}
        self.num_items = len(counts["sequence"])
        self._counts = counts
        self._starts = {per: np.concatenate([[0], np.cumsum(each)]) for per, each in counts.items()}
        self.block_bytes = max((array.block_rows * array.row_bytes for array in arrays), default=0)
        self.array_bytes = 0
        self._offsets: dict[str, int] = {}
        for array in arrays:
            if has_ragged or not array.is_ragged:
                self._offsets[array.name] = self.array_bytes
                self.array_bytes += self.num_rows(array) * array.row_bytes

    def starts(self, array: Array) -> Items:
        """Return the (num_items + 1,) first row of each item, followed by the number of rows."""
        return self._starts[array.per]

    def num_rows(self, array: Array) -> int:
        """Return the number of rows of an array."""
        return int(self.starts(array)[-1])

    def offset(self, array: Array, row: int) -> int:
        """Return the byte offset of a row in the file."""
        return self._offsets[array.name] + row * array.row_bytes

    def blocks(self, array: Array) -> Iterator[tuple[int, int]]:
        """Yield rows [start, stop) of each block of an array; an array without rows is one block."""
        num_rows = self.num_rows(array)
        for start in range(0, max(1, num_rows), array.block_rows):
            yield start, min(start + array.block_rows, num_rows)

    def piece(self, first: int, last: int) -> ShardShape:
        """Return the shape of a shard of the items [first, last)."""
        counts = {per: each[first:last] for per, each in self._counts.items()}
        return ShardShape(list(self.arrays.values()), counts)

    def without_ragged(self) -> ShardShape:
        """Return the shape of the same shard after its ragged arrays have moved to a part of the output."""
        return ShardShape(list(self.arrays.values()), self._counts, has_ragged=False)

    def describe(self) -> list[list[str | int]]:
        """Return the names, types and sizes of the arrays."""
        return [[*array, self.num_items, self.num_rows(array)] for array in self.arrays.values()]


def arrays_bytes(arrays: Iterable[Array], num_rows: Mapping[Per, int]) -> int:
    """Return the size in bytes of arrays with the given numbers of rows, by what a row stands for."""
    return sum(array.row_bytes * num_rows[array.per] for array in arrays)


def shards_bytes(num_shards: int, arrays: Iterable[Array], num_rows: Mapping[Per, int]) -> int:
    """Return the size in bytes of `num_shards` shards with `num_rows` rows in total."""
    return num_shards * _MANIFEST_BYTES + arrays_bytes(arrays, num_rows)


class ShardWriter:
    """Writes the file of a shard as its items are computed, in any order; see `shard_output`.

    Attributes:
        made_by: the device, attention backend and versions used; set it before `complete`.
    """

    def __init__(self, file: BinaryIO, shape: ShardShape) -> None:
        self.shape = shape
        self.made_by: Mapping[str, str] = {}
        self._file = file
        self._is_written = np.zeros(shape.num_items, np.bool_)
        self._statuses: dict[int, ItemStatus] = {}
        self._comparisons: dict[int, Comparison] = {}

    def write(
        self,
        items: Items,
        rows: Mapping[str, Rows],
        statuses: Mapping[int, ItemStatus] | None = None,
        comparisons: Mapping[int, Comparison] | None = None,
    ) -> None:
        """Write the rows of some items.

        Args:
            items: (n,) item numbers.
            rows: rows by array name: those of `items[0]`, then those of `items[1]`, and so on.
            statuses: statuses of items that were not computed normally.
            comparisons: comparisons of sampled items.

        Raises:
            ValueError: the number of rows does not match the items.
            OSError: the disk is full or has failed.
        """
        for array in self.shape.arrays.values():
            self._write_array(array, items, np.ascontiguousarray(rows[array.name], array.dtype))
        self._is_written[items] = True
        self._statuses.update(statuses or {})
        self._comparisons.update(comparisons or {})

    def write_failed(self, item: int, reason: str) -> None:
        """Write rows of NaN for an item that failed."""
        rows = {}
        for name, array in self.shape.arrays.items():
            start, stop = self.shape.starts(array)[item : item + 2]
            rows[name] = np.full((stop - start, array.columns), np.nan, array.dtype)
        self.write(np.array([item]), rows, {item: ItemStatus(STATUS_FAILED, reason)})

    def write_piece(self, piece: ShardReader, first: int) -> None:
        """Copy all items of `piece`, which start at item `first`, one block at a time."""
        buffer = bytearray(piece.shape.block_bytes)
        for array in self.shape.arrays.values():
            begin = int(self.shape.starts(array)[first])
            for start, stop in piece.shape.blocks(array):
                rows = piece.block(array, start, stop, buffer)
                _write_at(self._file, rows, self.shape.offset(array, begin + start))
        self.made_by = self.made_by or piece.made_by
        self._is_written[first : first + piece.shape.num_items] = True
        self._statuses.update((first + item, status) for item, status in piece.statuses.items())
        self._comparisons.update((first + item, each) for item, each in piece.comparisons.items())

    def _write_array(self, array: Array, items: Items, rows: Rows) -> None:
        starts = self.shape.starts(array)
        bounds = np.concatenate([[0], np.cumsum(starts[items + 1] - starts[items])])
        if rows.shape != (bounds[-1], array.columns):
            raise ValueError(f"{array.name} of {len(items)} items: {rows.shape}, not {bounds[-1]} rows")
        # write consecutive items with one call
        firsts = np.flatnonzero(np.diff(items, prepend=-2) != 1)
        limits = bounds[[*firsts, len(items)]].tolist()
        for item, start, stop in zip(items[firsts].tolist(), limits, limits[1:], strict=False):
            _write_at(self._file, rows[start:stop], self.shape.offset(array, int(starts[item])))

    def complete(self, number: int, plan: str) -> None:
        """Write checksums and notes after the arrays.

        Raises:
            ValueError: an item has not been written.
        """
        if not self._is_written.all():
            raise ValueError(f"shard {number}: {np.count_nonzero(~self._is_written)} items are not written")
        shape, buffer = self.shape, bytearray(self.shape.block_bytes)
        checksums = {
            name: [
                zlib.crc32(
                    _read_at(self._file, buffer, shape.offset(array, start), (stop - start) * array.row_bytes)
                )
                for start, stop in shape.blocks(array)
            ]
            for name, array in shape.arrays.items()
        }
        manifest = {
            **_identity(number, plan),
            "arrays": shape.describe(),
            "statuses": self._statuses,
            "comparisons": self._comparisons,
            "made_by": dict(self.made_by),
            "checksums": checksums,
        }
        _write_manifest(self._file, manifest, shape)


@contextmanager
def shard_output(
    path: Path, scratch: Path, number: int, plan: str, shape: ShardShape
) -> Iterator[ShardWriter]:
    """Context manager to write a shard; its file appears complete if the block succeeds, or not at all.

    Args:
        path: the file to create; an existing one is replaced.
        scratch: a directory on the same file system for the unfinished file.
        number: number of the shard in its plan.
        plan: hash of the plan.
        shape: shape of the shard.

    Raises:
        ValueError: an item is missing at the end.
        OSError: the disk is full or has failed.
    """
    with whole_or_nothing(path, scratch) as temporary, temporary.open("x+b", buffering=0) as file:
        writer = ShardWriter(file, shape)
        yield writer
        writer.complete(number, plan)


class ShardReader:
    """Reads the file of a finished shard; each block is verified as it is read.

    Args:
        path: the file.
        number: number of the shard in its plan.
        plan: hash of the plan.
        shape: expected shape of the shard.
        parts: directory with the parts of the output, for ragged arrays that have moved there.

    Attributes:
        part: the file in that directory that holds them; None if they have not moved.
        statuses: statuses of items that were not computed normally.
        comparisons: comparisons of sampled items with FP32.
        made_by: the device, attention backend and versions used.

    Raises:
        StoreError: the file is truncated, altered, or from another run; also raised by `block` and `verify`.
        FileNotFoundError: the file does not exist.
    """

    def __init__(
        self, path: Path, number: int, plan: str, shape: ShardShape, parts: Path | None = None
    ) -> None:
        self._path = path
        self._parts = parts
        self._part_file: Any = None
        self._file = open_regular(path)
        try:
            self._content = manifest = self._manifest()
            if {name: manifest.get(name) for name in _identity(0, "")} != _identity(number, plan):
                raise StoreError(f"{path}: another shard, or another run's")
            if manifest["arrays"] != shape.describe():
                raise StoreError(f"{path}: not the arrays of this run")
        except BaseException:
            self._file.close()
            raise
        self.part: str | None = manifest.get("part")
        self._first_rows: dict[Per, int] = manifest.get("first_rows", {})
        self.shape = shape if self.part is None else shape.without_ragged()
        self.statuses = {int(item): ItemStatus(*each) for item, each in manifest["statuses"].items()}
        self.comparisons = {int(item): Comparison(*each) for item, each in manifest["comparisons"].items()}
        self.made_by: dict[str, str] = manifest["made_by"]
        self._checksums: dict[str, list[int]] = manifest["checksums"]

    def _manifest(self) -> dict[str, Any]:
        size = os.fstat(self._file.fileno()).st_size
        length, digest = _TRAILER.unpack(self._bytes(size - _TRAILER.size, _TRAILER.size))
        content = self._bytes(size - _TRAILER.size - length, length)
        if hashlib.sha256(content).digest() != digest:
            raise self._damaged()
        manifest: dict[str, Any] = json.loads(content)
        return manifest

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset < 0 or len(content := os.pread(self._file.fileno(), size, offset)) < size:
            raise self._damaged()
        return content

    def _damaged(self) -> StoreError:
        return StoreError(f"{self._path}: damaged or truncated")

    @property
    def status(self) -> npt.NDArray[np.uint8]:
        """(num_items,) STATUS values."""
        status = np.full(self.shape.num_items, STATUS_COMPUTED, np.uint8)
        for item, each in self.statuses.items():
            status[item] = each.status
        return status

    def block(self, array: Array, start: int, stop: int, buffer: bytearray) -> Rows:
        """Return rows [start, stop) of an array, which must be one of its blocks.

        Args:
            array: an array of the shape.
            start: first row.
            stop: one past the last row.
            buffer: holds the rows until it is reused; has `shape.block_bytes` bytes.
        """
        if array.is_ragged and self.part is not None:
            content = memoryview(self._rows_in_part(array, start, stop).tobytes())
        else:
            size = (stop - start) * array.row_bytes
            content = _read_at(self._file, buffer, self.shape.offset(array, start), size)
        if zlib.crc32(content) != self._checksums[array.name][start // array.block_rows]:
            raise self._damaged()
        return np.frombuffer(content, array.dtype).reshape(stop - start, array.columns)

    def _rows_in_part(self, array: Array, start: int, stop: int) -> Rows:
        """Return rows [start, stop) of a ragged array from its part."""
        if self.part is None or self._parts is None:
            raise self._damaged()
        try:
            if self._part_file is None:
                self._part_file = h5py.File(self._parts / Path(self.part).name, "r")
            first = self._first_rows[array.per]
            rows: Rows = self._part_file[array.name][first + start : first + stop]
        except (OSError, RuntimeError, KeyError):
            raise StoreError(f"{self._parts / self.part}: missing or damaged") from None
        return np.ascontiguousarray(rows, array.dtype)

    def write_without_ragged(
        self, path: Path, scratch: Path, part: str, first_rows: Mapping[Per, int]
    ) -> None:
        """Rewrite the shard without its ragged arrays, which are now in a part.

        Args:
            path: the file to create.
            scratch: a directory on the same file system for the unfinished file.
            part: the file that holds them.
            first_rows: their first rows in it, by what a row stands for.
        """
        shape, buffer = self.shape.without_ragged(), bytearray(self.shape.block_bytes)
        with whole_or_nothing(path, scratch) as temporary, temporary.open("x+b", buffering=0) as file:
            for array in shape.arrays.values():
                if not array.is_ragged:
                    for start, stop in shape.blocks(array):
                        rows = self.block(array, start, stop, buffer)
                        _write_at(file, rows, shape.offset(array, start))
            _write_manifest(file, {**self._content, "part": part, "first_rows": first_rows}, shape)

    def verify(self) -> None:
        """Verify all blocks."""
        buffer = bytearray(self.shape.block_bytes)
        for array in self.shape.arrays.values():
            for start, stop in self.shape.blocks(array):
                self.block(array, start, stop, buffer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._part_file is not None:
            self._part_file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(number: int, plan: str) -> dict[str, Any]:
    """Return the manifest entries that identify the shard and its run."""
    return {"format": SHARD_FORMAT, "plan_hash": plan, "shard": number}


def _write_manifest(file: BinaryIO, manifest: Mapping[str, Any], shape: ShardShape) -> None:
    content = json.dumps(manifest).encode()
    trailer = _TRAILER.pack(len(content), hashlib.sha256(content).digest())
    _write_at(file, np.frombuffer(content + trailer, np.uint8), shape.array_bytes)


def _write_at(file: BinaryIO, rows: Rows, offset: int) -> None:
    data = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written


def _read_at(file: BinaryIO, buffer: bytearray, offset: int, size: int) -> memoryview:
    """Read `size` bytes at `offset` into `buffer`; fewer at the end of the file."""
    view = memoryview(buffer)[:size]
    done = 0
    while done < size and (count := os.preadv(file.fileno(), [view[done:]], offset + done)):
        done += count
    return view[:done]
