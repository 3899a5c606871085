"""The HDF5 file embeddings are kept in: written by ranges of rows, seen under its name only when whole."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from esm_packed.runners.fasta import Modified
from esm_packed.runners.files import open_regular, whole_or_nothing
from esm_packed.runners.memory import RowBuffers, Rows

FORMAT = "esm-packed"
SHARD_FORMAT = "esm-packed shard"
FORMAT_VERSION = 1

STATUS_COMPUTED = 0
STATUS_RECOMPUTED = 1
STATUS_FAILED = 2
STATUS_NOT_COMPUTED = 3

_CHUNK_BYTES = 1 << 18
_RECORDS_IN_CHUNK = 1024
_REFERENCE_BYTES = 16
"""Of a text in a data set, which leads to the text in a heap."""
_HEAP_BYTES = 20
"""Of a text in a heap beside its own: 16, and half of the 8 it is rounded up to."""
_EMPTY_FILE_BYTES = 24_000
_EMPTY_SHARD_BYTES = 8_192
_TEXT = h5py.string_dtype()
_PROBLEM = np.dtype([("sequence_id", _TEXT), ("file", _TEXT), ("line", np.int64), ("reason", _TEXT)])
_COMPARISON = np.dtype(
    [("sequence_id", _TEXT), ("cosine", "f8"), ("max_error", "f8"), ("relative_error", "f8")]
)


class StoredProblem(NamedTuple):
    """A record that has no embedding, or only a row of NaN, and why."""

    sequence_id: str
    file: str
    line: int
    reason: str


class Comparison(NamedTuple):
    """How far a mean embedding is from the same in FP32.

    Args:
        cosine: similarity of the two.
        max_error: largest difference of a component.
        relative_error: L2 norm of the difference over that of the FP32 embedding.
    """

    cosine: float
    max_error: float
    relative_error: float


class StoredComparison(NamedTuple):
    """A sampled sequence and how its embedding compares with FP32."""

    sequence_id: str
    comparison: Comparison


class StoreError(ValueError):
    """A file that is not a whole esm-packed output."""


def plan_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what defines a run, independent of the order of keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def output_bytes(
    num_sequences: int,
    mean_id_bytes: float,
    hidden_size: int,
    num_layers: int,
    store_dtype: str,
    *,
    problems: Sequence[Sequence[object]] = (),
    num_compared: int = 0,
) -> int:
    """Size of an output file in bytes, to within a tenth and 32 kB.

    Args:
        num_sequences: rows.
        mean_id_bytes: mean size of a sequence ID in bytes of UTF-8.
        hidden_size: columns of the embeddings.
        num_layers: layers kept.
        store_dtype: "float32" or "float16".
        problems: records left out, each as the fields of a `StoredProblem`.
        num_compared: sequences compared with FP32.
    """

    def columns(rows: int, chunk_rows: int, row_bytes: int) -> int:
        return math.ceil(rows / chunk_rows) * chunk_rows * row_bytes

    row_bytes = [np.dtype(dtype).itemsize for dtype in _COLUMN_KINDS.values()]
    row_bytes += [hidden_size * np.dtype(store_dtype).itemsize] * num_layers
    num_ids = num_sequences + num_compared
    texts = [field for problem in problems for field in problem if isinstance(field, str)]
    return (
        _EMPTY_FILE_BYTES
        + sum(columns(num_sequences, _chunk_rows(num_sequences, size), size) for size in row_bytes)
        + columns(num_sequences, _chunk_rows(num_sequences, _TEXT.itemsize), _REFERENCE_BYTES)
        + columns(len(problems), _RECORDS_IN_CHUNK, 3 * _REFERENCE_BYTES + 8)
        + columns(num_compared, _RECORDS_IN_CHUNK, _REFERENCE_BYTES + 3 * 8)
        + num_ids * _HEAP_BYTES
        + math.ceil(num_ids * mean_id_bytes)
        + sum(_HEAP_BYTES + len(text.encode("utf-8", "replace")) for text in texts)
    )


def shards_bytes(
    num_shards: int, num_computed: int, hidden_size: int, num_layers: int, store_dtype: str
) -> int:
    """Size in bytes of the files of `num_shards` shards, in which `num_computed` sequences are computed."""
    row = 1 + hidden_size * num_layers * np.dtype(store_dtype).itemsize
    return num_shards * _EMPTY_SHARD_BYTES + num_computed * row


def _chunk_rows(rows: int, row_bytes: int) -> int:
    return min(max(rows, 1), max(1, _CHUNK_BYTES // row_bytes))


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Hold Ctrl-C and its kin back while HDF5 runs: an exception inside its callbacks corrupts its state."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(handler := signal.getsignal(number)):
            handlers[number] = handler
            signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(pending):
            signal.raise_signal(late)


class _FailureKeepingFile(io.RawIOBase):
    """A file for HDF5 to write to that never tells it about a failed write.

    HDF5 2.0 crashes the process after a write fails (a full disk, a quota, an I/O error). The first failure
    is kept for the writer to raise, and everything after it is dropped.
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


@dataclass(frozen=True)
class Shard:
    """What was computed of one shard of a run, a row for each record that was not left to a copy.

    Args:
        status: (n,) uint8, STATUS values.
        embeddings: layer to (n, hidden_size).
        reasons: row to why it failed or was recomputed.
        comparisons: sampled row to how it compares with FP32.
        made_by: the device, attention backend and versions that computed it.
    """

    status: npt.NDArray[np.uint8]
    embeddings: Mapping[int, npt.NDArray[np.floating[Any]]]
    reasons: Mapping[int, str]
    comparisons: Mapping[int, Comparison] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)


def write_shard(path: Path, scratch: Path, shard: Shard, number: int, plan: str) -> None:
    """Write a finished shard: on disk whole, or not at all.

    Args:
        path: the file to make; one that is there is replaced.
        scratch: a folder on the same file system for the unfinished file.
        shard: what it holds.
        number: of the shard in its plan.
        plan: hash of the plan.

    Raises:
        OSError: the disk is full or fails.
    """
    with whole_or_nothing(path, scratch) as temporary:
        with _hdf5_output(temporary) as file:
            file.attrs["format"] = SHARD_FORMAT
            file.attrs["plan_hash"] = plan
            file.attrs["shard"] = number
            file.create_dataset("status", data=shard.status)
            for layer, rows in shard.embeddings.items():
                file.create_dataset(f"mean/{layer}", data=rows)
            for name in ("reasons", "comparisons", "made_by"):
                file.create_dataset(name, data=json.dumps(dict(getattr(shard, name))), dtype=_TEXT)
        # HDF5 does not mind what stands behind its own end of a file.
        with temporary.open("r+b") as raw:
            digest = hashlib.file_digest(raw, "sha256").digest()
            raw.write(digest)


def read_shard(path: Path, number: int, plan: str, buffers: RowBuffers | None = None) -> Shard:
    """Read a finished shard and see that it is what was written.

    Args:
        path: its file.
        number: of the shard in its plan.
        plan: hash of the plan.
        buffers: hold the embeddings, until the next shard is read into them; None for memory of their own.

    Raises:
        StoreError: it is cut short, altered, or another run's.
        FileNotFoundError: it is not there.
    """
    with open_regular(path) as raw:
        digest = hashlib.sha256()
        remaining = max(0, os.fstat(raw.fileno()).st_size - digest.digest_size)
        while remaining and (block := raw.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        is_whole = raw.read() == digest.digest()
    if not is_whole:  # HDF5 can hang on a damaged file, so it must not see one
        raise StoreError(f"{path}: damaged or cut short")
    with h5py.File(path, "r") as file:
        attributes = dict(file.attrs)
        if attributes != {"format": SHARD_FORMAT, "plan_hash": plan, "shard": number}:
            raise StoreError(f"{path}: another shard, or another run's")
        notes = {name: json.loads(file[name].asstr()[()]) for name in ("reasons", "comparisons", "made_by")}
        return Shard(
            status=file["status"][:],
            embeddings={
                int(layer): _read_rows(rows, int(layer), buffers or RowBuffers())
                for layer, rows in file["mean"].items()
            },
            reasons={int(row): text for row, text in notes["reasons"].items()},
            comparisons={int(row): Comparison(*values) for row, values in notes["comparisons"].items()},
            made_by=notes["made_by"],
        )


def _read_rows(dataset: Any, layer: int, buffers: RowBuffers) -> Rows:
    rows = buffers.rows(layer, dataset.shape, dataset.dtype)
    if dataset.size:
        dataset.read_direct(rows)
    return rows


@contextmanager
def _hdf5_output(path: Path) -> Iterator[Any]:
    """A new HDF5 file; a failed write is raised as what it was when the block ends, or before."""
    output = _FailureKeepingFile(path)
    try:
        with signals_deferred():
            try:
                with h5py.File(output, "w") as file:
                    yield file
            finally:
                output.close()
    finally:
        if output.failure is not None:
            raise output.failure


class EmbeddingWriter:
    """Writes an output file of a known number of rows, in any order of row ranges.

    Args:
        path: the file to create; it must not exist.
        num_sequences: rows.
        hidden_size: columns of the embeddings.
        layers: the layers kept; the last one is the dataset `embeddings`, the others are `mean/LAYER`.
        store_dtype: "float32" or "float16".

    Raises:
        OSError: any of the methods, when the disk is full or fails; what was written is then worthless.
    """

    def __init__(
        self, path: Path, *, num_sequences: int, hidden_size: int, layers: Sequence[int], store_dtype: str
    ) -> None:
        self._output = _FailureKeepingFile(path)
        self._file: Any = None
        try:
            with self._hdf5():
                self._file = h5py.File(self._output, "w")
                self._create_datasets(num_sequences, hidden_size, layers, np.dtype(store_dtype))
        except BaseException:
            self._abandon()
            raise

    def _create_datasets(
        self, num_sequences: int, hidden_size: int, layers: Sequence[int], store_dtype: np.dtype[Any]
    ) -> None:
        self._columns = {
            name: self._create(name, num_sequences, (), np.dtype(dtype))
            for name, dtype in (
                ("sequence_ids", _TEXT),
                ("lengths", np.int32),
                ("embedded_lengths", np.int32),
                ("truncated", np.bool_),
                ("status", np.uint8),
                ("modified", np.uint8),
            )
        }
        self._columns["modified"].attrs["flags"] = ", ".join(
            f"{flag.value} {flag.label}" for flag in Modified
        )
        self._embeddings = {
            layer: self._create(_dataset_of(layer, layers), num_sequences, (hidden_size,), store_dtype)
            for layer in layers
        }
        self._append("problems", _PROBLEM, ())
        self._file.attrs["format"] = FORMAT
        self._file.attrs["format_version"] = FORMAT_VERSION
        self._file.attrs["layers"] = np.array(layers, dtype=np.int32)
        self._file.attrs["pooling"] = "mean"

    def _create(self, name: str, rows: int, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        row_bytes = dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        chunk_rows = _chunk_rows(rows, row_bytes)
        return self._file.create_dataset(name, (rows, *row_shape), dtype, chunks=(chunk_rows, *row_shape))

    def write_rows(
        self,
        start: int,
        *,
        sequence_ids: Sequence[str],
        lengths: npt.NDArray[np.int32],
        embedded_lengths: npt.NDArray[np.int32],
        status: npt.NDArray[np.uint8],
        modified: npt.NDArray[np.uint8],
        embeddings: Mapping[int, npt.NDArray[np.floating[Any]]],
    ) -> None:
        """Fill the rows from `start` on.

        Args:
            start: first row.
            sequence_ids: (n,) names.
            lengths: (n,) residues in the input.
            embedded_lengths: (n,) residues embedded.
            status: (n,) one of the STATUS values.
            modified: (n,) `Modified` flags.
            embeddings: for each layer (n, hidden_size).
        """
        rows = slice(start, start + len(sequence_ids))
        with self._hdf5():
            self._columns["sequence_ids"][rows] = np.array(sequence_ids, dtype=object)
            self._columns["lengths"][rows] = lengths
            self._columns["embedded_lengths"][rows] = embedded_lengths
            self._columns["truncated"][rows] = embedded_lengths < lengths
            self._columns["status"][rows] = status
            self._columns["modified"][rows] = modified
            for layer, dataset in self._embeddings.items():
                dataset[rows] = embeddings[layer]

    def embeddings(self, layer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating[Any]]:
        """Embeddings written before, of ascending distinct `rows`."""
        with self._hdf5():
            values: npt.NDArray[np.floating[Any]] = self._embeddings[layer][rows]
        return values

    def status(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Status written before, of ascending distinct `rows`."""
        with self._hdf5():
            values: npt.NDArray[np.uint8] = self._columns["status"][rows]
        return values

    def write_problems(self, problems: Sequence[StoredProblem]) -> None:
        """Append records that are left out or failed."""
        self._append(
            "problems",
            _PROBLEM,
            [(_utf8(each.sequence_id), _utf8(each.file), each.line, _utf8(each.reason)) for each in problems],
        )

    def write_comparisons(self, comparisons: Sequence[StoredComparison]) -> None:
        """Append sampled sequences and how they compare with FP32."""
        if comparisons:
            records = [(_utf8(each.sequence_id), *each.comparison) for each in comparisons]
            self._append("fp32_compare", _COMPARISON, records)

    def _append(self, name: str, dtype: np.dtype[Any], records: Sequence[tuple[Any, ...]]) -> None:
        with self._hdf5():
            if name not in self._file:
                self._file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(_RECORDS_IN_CHUNK,))
            if records:
                dataset = self._file[name]
                written = len(dataset)
                dataset.resize(written + len(records), axis=0)
                dataset[written:] = np.array(records, dtype=dtype)

    def write_plan(self, identity: Mapping[str, Any], input_names: Sequence[str]) -> None:
        """Keep what defines a run: its hash in an attribute, the whole as JSON (attributes end at 64 KB)."""
        plan = json.dumps({"identity": identity, "input_names": list(input_names)}, sort_keys=True)
        with self._hdf5():
            self._file.attrs["plan_hash"] = plan_hash(identity)
            self._file.create_dataset("plan", data=plan, dtype=_TEXT)

    def write_attributes(self, attributes: Mapping[str, str | int | float]) -> None:
        """Set root attributes."""
        with self._hdf5():
            for name, value in attributes.items():
                self._file.attrs[name] = value

    def close(self) -> None:
        """Flush and close; the file is good only if this returns."""
        with self._hdf5():
            try:
                self._file.close()
            finally:
                self._output.close()

    @contextmanager
    def _hdf5(self) -> Iterator[None]:
        """Run HDF5 undisturbed by signals; raise a failed write as what it was, whatever HDF5 made of it."""
        try:
            with signals_deferred():
                yield
        finally:
            if self._output.failure is not None:
                raise self._output.failure

    def _abandon(self) -> None:
        """Close after a failure, of which HDF5 may complain again."""
        with signals_deferred(), suppress(OSError, RuntimeError):
            try:
                if self._file is not None:
                    self._file.close()
            finally:
                self._output.close()

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._abandon()


def _dataset_of(layer: int, layers: Sequence[int]) -> str:
    return "embeddings" if layer == layers[-1] else f"mean/{layer}"


def _utf8(text: str) -> str:
    """`text` without surrogates, which stand for what is not UTF-8 in a file's name, as HDF5 needs it."""
    return text.encode("utf-8", "replace").decode()


_COLUMN_KINDS = {
    "lengths": "i4",
    "embedded_lengths": "i4",
    "truncated": "b1",
    "status": "u1",
    "modified": "u1",
}
_MOST_COMPRESSED = 1032
"""Bytes that one byte of a compressed data set can stand for."""

_MOST_ATTRIBUTE_BYTES = 1 << 20
_ATTRIBUTE_CLASSES = (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM)


class EmbeddingReader:
    """Reads an output file.

    Whatever the file holds is checked: what is read later has the type and the shape that it should have, and
    no more rows than the size of the file allows.

    Args:
        path: the file.

    Raises:
        StoreError: it is not a whole esm-packed output; the methods raise it, too, where it is damaged.
        OSError: it is not there or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # HDF5 would wait for a pipe
            raise StoreError(f"{self._path}: not a file")
        self._file_bytes = found.st_size
        try:
            self._file = h5py.File(path, "r")
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{self._path}: not an HDF5 file, or cut short") from error
        try:
            with self._reading():
                self._check()
        except BaseException:
            self._file.close()
            raise

    def _check(self) -> None:
        """See that all that an output has is there, in types and shapes that fit each other."""
        self._attributes = self._read_attributes()
        if self._attributes.get("format") != FORMAT or "plan_hash" not in self._attributes:
            raise StoreError(f"{self._path}: HDF5, but not written by esm-packed")
        version = self._attributes.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise StoreError(f"{self._path}: written by a newer esm-packed (format_version {version})")
        if not isinstance(version, int):
            raise ValueError(f"format_version {version!r}")
        layers = self._attributes.get("layers")
        if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
            raise ValueError(f"layers {layers!r}")
        self._num_sequences = self._dataset("lengths").shape[0]
        for name, kind in _COLUMN_KINDS.items():
            self._expect(name, kind, (self._num_sequences,), is_read_whole=True)
        self._expect("sequence_ids", "text", (self._num_sequences,))
        self._hidden_size = self._dataset("embeddings").shape[1]
        for layer in layers:
            self._expect(_dataset_of(layer, layers), "f2 f4", (self._num_sequences, self._hidden_size))
        for name, record in (("problems", _PROBLEM), ("fp32_compare", _COMPARISON)):
            if name in self._file or record is _PROBLEM:
                self._expect_records(name, record)
        self._expect("plan", "text", ())
        self._plan = self._read_plan()

    def _read_attributes(self) -> dict[str, Any]:
        """Those of text and numbers; HDF5 may crash on damaged ones of other types, and we write none."""
        attributes = {}
        for name in self._file.attrs:
            attribute = self._file.attrs.get_id(name)
            if attribute.get_type().get_class() not in _ATTRIBUTE_CLASSES:
                continue
            if attribute.get_storage_size() > _MOST_ATTRIBUTE_BYTES:
                raise ValueError(f"attribute {name!r} is too large")
            value = self._file.attrs[name]
            attributes[os.fsdecode(name)] = value.tolist() if hasattr(value, "tolist") else value
        return attributes

    def _dataset(self, name: str) -> Any:
        """The data set `name`, which lies in this very file."""
        found = self._file
        for part in name.split("/"):
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"no data set {name}")
            found = found[part]
        if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
            raise ValueError(f"no data set {name}")
        return found

    def _expect(self, name: str, kinds: str, shape: tuple[int, ...], is_read_whole: bool = False) -> None:
        """See that data set `name` is of this shape, and of one of these kinds."""
        dataset = self._dataset(name)
        if dataset.shape != shape or not _is_of_kind(dataset.dtype, kinds):
            raise ValueError(f"{name} is {dataset.shape} of {dataset.dtype}, not {shape} of {kinds}")
        if is_read_whole:
            self._check_stored(dataset)

    def _expect_records(self, name: str, record: np.dtype[Any]) -> None:
        dataset = self._dataset(name)
        found = dataset.dtype
        if (
            len(dataset.shape) != 1
            or found.names != record.names
            or not all(_is_of_kind(found[each], _kind_of(record[each])) for each in record.names or ())
        ):
            raise ValueError(f"{name} is {dataset.shape} of {found}")
        self._check_stored(dataset)

    def _check_stored(self, dataset: Any) -> None:
        """See that the values of a data set are in the file: one never written may declare any number."""
        stored = dataset.id.get_storage_size()
        declared = math.prod(dataset.shape) * dataset.dtype.itemsize
        is_filtered = dataset.id.get_create_plist().get_nfilters() > 0
        if declared > stored * (_MOST_COMPRESSED if is_filtered else 1) or stored > self._file_bytes:
            raise ValueError(f"{dataset.name} has more rows than are in the file")

    def _read_plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(self._file["plan"].asstr()[()])
        if (
            plan_hash(plan["identity"]) != self._attributes["plan_hash"]
            or not isinstance(plan["identity"], dict)
            or not isinstance(plan["input_names"], list)
            or not all(isinstance(name, str) for name in plan["input_names"])
        ):
            raise ValueError("the plan is not that of plan_hash")
        return plan

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise whatever h5py makes of a damaged file as what it is."""
        try:
            yield
        except StoreError:
            raise
        except (OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{self._path}: damaged, or not a whole esm-packed output ({error})") from error

    @property
    def attributes(self) -> dict[str, Any]:
        """Root attributes, as Python values."""
        return dict(self._attributes)

    @property
    def num_sequences(self) -> int:
        """Rows."""
        return int(self._num_sequences)

    @property
    def layers(self) -> list[int]:
        """Layers kept; the last one is the dataset `embeddings`."""
        return list(self._attributes["layers"])

    def sequence_ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the rows [start, stop)."""
        with self._reading():
            names: list[str] = self._file["sequence_ids"].asstr()[start:stop].tolist()
        return names

    def column(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """`lengths`, `embedded_lengths`, `truncated`, `status` or `modified` of the rows [start, stop)."""
        dataset = self._file[name]
        with self._reading():
            values: npt.NDArray[Any] = dataset[start:stop]
        return values

    def changed(self, start: int = 0, stop: int | None = None) -> dict[str, npt.NDArray[np.int64]]:
        """How embedded sequences differ from the input, in words, each with the rows of which it is true.

        Returns:
            `truncated` and the label of each `Modified` flag to (n,) int64 row numbers in [start, stop).
        """
        modified = self.column("modified", start, stop)
        found = {"truncated": self.column("truncated", start, stop)}
        found |= {flag.label: (modified & flag.value) != 0 for flag in Modified}
        return {change: start + np.flatnonzero(is_changed) for change, is_changed in found.items()}

    def embeddings(
        self, layer: int | None = None, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.floating[Any]]:
        """(stop - start, hidden_size) embeddings of one layer (the last one kept unless named)."""
        dataset = self._file[_dataset_of(self.layers[-1] if layer is None else layer, self.layers)]
        with self._reading():
            rows: npt.NDArray[np.floating[Any]] = dataset[start:stop]
        return rows

    @property
    def hidden_size(self) -> int:
        """Columns of the embeddings."""
        return int(self._hidden_size)

    @property
    def plan(self) -> dict[str, Any]:
        """What defines the run (`identity`) and the names of its input files (`input_names`)."""
        return self._plan

    @property
    def num_problems(self) -> int:
        """Records left out and rows that failed."""
        return len(self._file["problems"])

    def problems(self, start: int = 0, stop: int | None = None) -> list[StoredProblem]:
        """Records left out and rows that failed, with reasons; all, or those in [start, stop)."""
        with self._reading():
            return [
                StoredProblem(sequence_id.decode(), file.decode(), int(line), reason.decode())
                for sequence_id, file, line, reason in self._file["problems"][start:stop].tolist()
            ]

    def comparisons(self) -> list[StoredComparison]:
        """Sampled sequences and how they compare with FP32."""
        if "fp32_compare" not in self._file:
            return []
        with self._reading():
            return [
                StoredComparison(sequence_id.decode(), Comparison(*values))
                for sequence_id, *values in self._file["fp32_compare"][:].tolist()
            ]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> EmbeddingReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _kind_of(dtype: np.dtype[Any]) -> str:
    """As `i4`, or `text`."""
    return "text" if h5py.check_string_dtype(dtype) is not None else f"{dtype.kind}{dtype.itemsize}"


def _is_of_kind(dtype: np.dtype[Any], kinds: str) -> bool:
    """Whether a type is one of `kinds`, whatever its byte order."""
    return dtype.shape == () and _kind_of(dtype) in kinds.split()
