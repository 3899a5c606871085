"""Outputs read back, and seen to be ones."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.fasta import Modified
from esm_packed.runners.output.layout import (
    COLUMN_KINDS,
    COMPARISON,
    FORMAT,
    FORMAT_VERSION,
    PROBLEM,
    StoredComparison,
    StoredProblem,
)
from esm_packed.runners.output.names import dataset_of
from esm_packed.runners.state.plan import plan_hash
from esm_packed.runners.state.shard import Comparison, StoreError

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
        for name, kind in COLUMN_KINDS.items():
            self._expect(name, kind, (self._num_sequences,), is_read_whole=True)
        self._expect("sequence_ids", "text", (self._num_sequences,))
        self._hidden_size = self._dataset("embeddings").shape[1]
        for layer in layers:
            self._expect(dataset_of("mean", layer, layers), "f2 f4", (self._num_sequences, self._hidden_size))
        for name, record in (("problems", PROBLEM), ("fp32_compare", COMPARISON)):
            if name in self._file or record is PROBLEM:
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
        dataset = self._file[dataset_of("mean", layer, self.layers)]
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
