"""Write the HDF5 file of embeddings by ranges of rows; it appears under its name only when complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from esm_packed.outputs import Per, kind_of
from esm_packed.runners.input.fasta import Modified
from esm_packed.runners.output.layout import (
    CHUNK_BYTES,
    COLUMN_KINDS,
    COMPARISON,
    FORMAT,
    FORMAT_VERSION,
    HASH,
    PROBLEM,
    RECORDS_IN_CHUNK,
    TEXT,
    StoredComparison,
    StoredProblem,
)
from esm_packed.runners.output.names import PARTS, TOKENS_OF, row_shape
from esm_packed.runners.output.parts import PART, Part
from esm_packed.runners.state.plan import plan_hash
from esm_packed.runners.state.shard import Array
from esm_packed.runners.system.hdf5 import NewFile

_GZIP_LEVEL = 1


class ArrayWriter(NewFile):
    """Writes the datasets of arrays; rows can be written in any order.

    Args:
        path: the file to create; it must not exist.
        compression: compression of the arrays, none or gzip.

    Raises:
        OSError: raised by any method if the disk is full or has failed; the file is then unusable.
    """

    def __init__(self, path: Path, compression: str = "none") -> None:
        super().__init__(path)
        self._compression = compression
        self._arrays: dict[str, Any] = {}

    def create(self, array: Array, dataset: str, rows: int) -> None:
        """Create the dataset of an array.

        Args:
            array: the array.
            dataset: name of the dataset in the file.
            rows: number of rows.
        """
        shape = (rows, *row_shape(kind_of(array.name), array.columns))
        options: dict[str, Any] = {}
        if self._compression == "gzip" and rows:
            chunk = min(rows, max(1, CHUNK_BYTES // array.row_bytes))
            options = {"chunks": (chunk, *shape[1:]), "compression": "gzip", "shuffle": True}
            options["compression_opts"] = _GZIP_LEVEL
        with self.writing():
            self._arrays[array.name] = self.file.create_dataset(dataset, shape, array.dtype, **options)
        self._describe(array)

    def create_virtual(
        self, array: Array, dataset: str, rows: int, directory: str, parts: Iterable[Part]
    ) -> None:
        """Create a virtual dataset, whose rows are in other files.

        Args:
            array: the array.
            dataset: name of the dataset, both here and in the other files.
            rows: number of rows.
            directory: where the parts are, relative to this file.
            parts: the parts that hold the rows.
        """
        shape = row_shape(kind_of(array.name), array.columns)
        layout = h5py.VirtualLayout((rows, *shape), array.dtype)
        directory = directory.replace("%", "%%")  # HDF5 replaces %b by a block number
        for file, _, first, count in parts:
            if count:
                source = h5py.VirtualSource(f"{directory}/{file}", dataset, (count, *shape), array.dtype)
                layout[first : first + count] = source
        with self.writing():
            self._arrays[array.name] = self.file.create_virtual_dataset(dataset, layout, fillvalue=np.nan)
        self._describe(array)

    def _describe(self, array: Array) -> None:
        if (kind := kind_of(array.name)) in TOKENS_OF:
            with self.writing():
                self._arrays[array.name].attrs["tokens"] = list(TOKENS_OF[kind])

    def write(self, name: str, start: int, rows: npt.NDArray[np.floating[Any]]) -> None:
        """Write the (n, columns) `rows` of an array, beginning at row `start`."""
        dataset = self._arrays[name]
        if len(rows):
            with self.writing():
                dataset[start : start + len(rows)] = rows.reshape(len(rows), *dataset.shape[1:])

    def write_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set root attributes."""
        with self.writing():
            for name, value in attributes.items():
                self.file.attrs[name] = value


class EmbeddingWriter(ArrayWriter):
    """Writes an output file; the dataset of each array must be created before it is written.

    Args:
        path: the file to create; it must not exist.
        num_sequences: number of sequences in the input.
        starts: columns, from `names.STARTS`, with the first rows in ragged arrays.
        compression: compression of the arrays, none or gzip.

    Raises:
        OSError: raised by any method if the disk is full or has failed; the file is then unusable.
    """

    def __init__(
        self, path: Path, *, num_sequences: int, starts: Sequence[str] = (), compression: str = "none"
    ) -> None:
        super().__init__(path, compression)
        try:
            with self.writing():
                dtypes = {"sequence_ids": TEXT, "sequence_hash": HASH, **COLUMN_KINDS}
                dtypes |= dict.fromkeys(starts, "i8")
                self._columns = {
                    name: self.file.create_dataset(name, (num_sequences,), dtype)
                    for name, dtype in dtypes.items()
                }
                self.file.attrs["format"] = FORMAT
                self.file.attrs["format_version"] = FORMAT_VERSION
                self._columns["modified"].attrs["flags"] = ", ".join(
                    f"{flag.value} {flag.label}" for flag in Modified
                )
            self._append("problems", PROBLEM, ())
        except BaseException:
            self.abandon()
            raise

    def write_rows(
        self, start: int, sequence_ids: Sequence[str], columns: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Write the rows from `start` on, except for the arrays.

        Args:
            start: first row.
            sequence_ids: (n,) IDs.
            columns: (n,) arrays: those in `COLUMN_KINDS`, `sequence_hash`, and `starts`.
        """
        rows = slice(start, start + len(sequence_ids))
        with self.writing():
            self._columns["sequence_ids"][rows] = np.array(sequence_ids, dtype=object)
            for name, values in columns.items():
                self._columns[name][rows] = values

    def read(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Read back ascending, distinct `rows` of an array or a column that were written before."""
        dataset = self._arrays[name] if name in self._arrays else self._columns[name]
        with self.writing():
            values: npt.NDArray[Any] = dataset[rows]
        return values.reshape(len(rows), -1) if name in self._arrays else values

    def write_parts(self, parts: Mapping[Per, Sequence[Part]]) -> None:
        """List the files that hold the rows of virtual datasets, by what a row stands for."""
        with self.writing():
            for per, files in parts.items():
                self.file.create_dataset(PARTS[per], data=np.array([tuple(part) for part in files], PART))

    def write_problems(self, problems: Sequence[StoredProblem]) -> None:
        """Append records that were left out or failed."""
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
        with self.writing():
            if name not in self.file:
                self.file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(RECORDS_IN_CHUNK,))
            if records:
                dataset = self.file[name]
                written = len(dataset)
                dataset.resize(written + len(records), axis=0)
                dataset[written:] = np.array(records, dtype=dtype)

    def write_plan(self, identity: Mapping[str, Any], input_names: Sequence[str]) -> None:
        """Store what defines a run: its hash as an attribute, all of it as JSON (attributes end at 64 KB)."""
        plan = json.dumps({"identity": identity, "input_names": list(input_names)}, sort_keys=True)
        with self.writing():
            self.file.attrs["plan_hash"] = plan_hash(identity)
            self.file.create_dataset("plan", data=plan, dtype=TEXT)


def _utf8(text: str) -> str:
    """Replace surrogates, which represent non-UTF-8 bytes in file names, as HDF5 requires valid UTF-8."""
    return text.encode("utf-8", "replace").decode()
