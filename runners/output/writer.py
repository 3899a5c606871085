"""The HDF5 file embeddings are kept in: written by ranges of rows, seen under its name only when whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.fasta import Modified
from esm_packed.runners.output.layout import (
    COMPARISON,
    FORMAT,
    FORMAT_VERSION,
    PROBLEM,
    RECORDS_IN_CHUNK,
    TEXT,
    StoredComparison,
    StoredProblem,
    chunk_rows,
)
from esm_packed.runners.output.names import dataset_of
from esm_packed.runners.state.plan import plan_hash
from esm_packed.runners.system.hdf5 import FailureKeepingFile
from esm_packed.runners.system.signals import signals_deferred


class _Appended:
    """A data set that is written from its first row to its last, in whole chunks, which pass HDF5 by."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._chunk = np.zeros(dataset.chunks, dataset.dtype)
        self.num_rows = 0

    def append(self, rows: npt.NDArray[np.floating[Any]]) -> None:
        rows = np.ascontiguousarray(rows, self._chunk.dtype)
        size, total = len(self._chunk), len(self._dataset)
        done = 0
        while done < len(rows):
            begin = self.num_rows % size
            part = rows[done : done + size - begin]
            if len(part) < size:
                self._chunk[begin : begin + len(part)] = part
            done += len(part)
            self.num_rows += len(part)
            if self.num_rows % size == 0:
                whole = part if len(part) == size else self._chunk
                self._dataset.id.write_direct_chunk((self.num_rows - size, 0), whole)
            elif self.num_rows == total:  # beyond the data set the last chunk is of no consequence
                self._dataset.id.write_direct_chunk((total - total % size, 0), self._chunk)

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating[Any]]:
        """Of ascending distinct `rows`; the last ones may not be in the data set yet."""
        num_written = self.num_rows - self.num_rows % len(self._chunk)
        within = int(np.searchsorted(rows, num_written))
        written = self._dataset[rows[:within]]
        return np.concatenate([written, self._chunk[rows[within:] - num_written]])


class EmbeddingWriter:
    """Writes an output file of a known number of rows: columns in any order, embeddings from first to last.

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
        self._output = FailureKeepingFile(path)
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
                ("sequence_ids", TEXT),
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
            layer: _Appended(
                self._create(dataset_of("mean", layer, layers), num_sequences, (hidden_size,), store_dtype)
            )
            for layer in layers
        }
        self._append("problems", PROBLEM, ())
        self._file.attrs["format"] = FORMAT
        self._file.attrs["format_version"] = FORMAT_VERSION
        self._file.attrs["layers"] = np.array(layers, dtype=np.int32)
        self._file.attrs["pooling"] = "mean"

    def _create(self, name: str, rows: int, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        row_bytes = dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        chunks = (chunk_rows(rows, row_bytes), *row_shape)
        return self._file.create_dataset(name, (rows, *row_shape), dtype, chunks=chunks)

    def write_rows(
        self,
        start: int,
        *,
        sequence_ids: Sequence[str],
        lengths: npt.NDArray[np.int32],
        embedded_lengths: npt.NDArray[np.int32],
        status: npt.NDArray[np.uint8],
        modified: npt.NDArray[np.uint8],
    ) -> None:
        """Fill the rows from `start` on, but for their embeddings.

        Args:
            start: first row.
            sequence_ids: (n,) names.
            lengths: (n,) residues in the input.
            embedded_lengths: (n,) residues embedded.
            status: (n,) one of the STATUS values.
            modified: (n,) `Modified` flags.
        """
        rows = slice(start, start + len(sequence_ids))
        with self._hdf5():
            self._columns["sequence_ids"][rows] = np.array(sequence_ids, dtype=object)
            self._columns["lengths"][rows] = lengths
            self._columns["embedded_lengths"][rows] = embedded_lengths
            self._columns["truncated"][rows] = embedded_lengths < lengths
            self._columns["status"][rows] = status
            self._columns["modified"][rows] = modified

    def write_embeddings(self, layer: int, start: int, rows: npt.NDArray[np.floating[Any]]) -> None:
        """Fill (n, hidden_size) `rows` of a layer from `start` on, where the last ones ended."""
        layer_output = self._embeddings[layer]
        if start != layer_output.num_rows:
            raise ValueError(f"rows from {start} on, not {layer_output.num_rows}")
        with self._hdf5():
            layer_output.append(rows)

    def embeddings(self, layer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating[Any]]:
        """Embeddings written before, of ascending distinct `rows`."""
        with self._hdf5():
            return self._embeddings[layer].read(rows)

    def status(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Status written before, of ascending distinct `rows`."""
        with self._hdf5():
            values: npt.NDArray[np.uint8] = self._columns["status"][rows]
        return values

    def write_problems(self, problems: Sequence[StoredProblem]) -> None:
        """Append records that are left out or failed."""
        self._append(
            "problems",
            PROBLEM,
            [(_utf8(each.sequence_id), _utf8(each.file), each.line, _utf8(each.reason)) for each in problems],
        )

    def write_comparisons(self, comparisons: Sequence[StoredComparison]) -> None:
        """Append sampled sequences and how they compare with FP32."""
        if comparisons:
            records = [(_utf8(each.sequence_id), *each.comparison) for each in comparisons]
            self._append("fp32_compare", COMPARISON, records)

    def _append(self, name: str, dtype: np.dtype[Any], records: Sequence[tuple[Any, ...]]) -> None:
        with self._hdf5():
            if name not in self._file:
                self._file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(RECORDS_IN_CHUNK,))
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
            self._file.create_dataset("plan", data=plan, dtype=TEXT)

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


def _utf8(text: str) -> str:
    """`text` without surrogates, which stand for what is not UTF-8 in a file's name, as HDF5 needs it."""
    return text.encode("utf-8", "replace").decode()
