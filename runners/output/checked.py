"""HDF5 files of unknown origin, of which nothing is used before its type, shape and size are known."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esm_packed.errors import UserError
from esm_packed.runners.state.shard import StoreError

_MOST_COMPRESSED = 1032
"""Bytes that one byte of a compressed data set can stand for."""
_MOST_ATTRIBUTE_BYTES = 1 << 20
_ATTRIBUTE_CLASSES = (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM)


class CheckedFile:
    """An HDF5 file, open for reading.

    Whatever does not fit raises ValueError, which `reading` turns into a StoreError that names the file.

    Args:
        path: the file.
        kind: what it should be, as messages call it.

    Raises:
        StoreError: it is no HDF5 file.
        UserError: too many files are open.
        OSError: it is not there or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = os.fspath(path)
        self._kind = kind
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # HDF5 would wait for a pipe
            raise StoreError(f"{self.path}: not a file")
        self.num_bytes = found.st_size
        self._datasets: dict[str, Any] = {}  # HDF5 caches chunks of those that are open
        try:
            self._file = h5py.File(path, "r")
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "errno", None)
            if reason in (errno.ENOENT, errno.EACCES):
                raise
            if reason in (errno.EMFILE, errno.ENFILE):
                raise UserError(f"{self.path}: too many files are open; `ulimit -n` allows more") from error
            raise StoreError(f"{self.path}: not an HDF5 file, or cut short") from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise whatever h5py makes of a damaged file as what it is.

        Raises:
            StoreError: what is read is damaged.
            ValueError: the file was closed.
        """
        if not self._file:
            raise ValueError(f"{self.path}: closed; open it again")
        try:
            yield
        except StoreError:
            raise
        except (OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{self.path}: damaged, or not a whole {self._kind} ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def attributes(self, dataset: str | None = None) -> dict[str, Any]:
        """Those of the root or of a data set that are text and numbers, as Python values.

        HDF5 may crash on damaged ones of other types, and we write none.
        """
        attributes = {}
        found = (self._file if dataset is None else self._file[dataset]).attrs
        for name in found:
            attribute = found.get_id(name)
            if attribute.get_type().get_class() not in _ATTRIBUTE_CLASSES:
                continue
            if attribute.get_storage_size() > _MOST_ATTRIBUTE_BYTES:
                raise ValueError(f"attribute {name!r} is too large")
            value = found[name]
            attributes[os.fsdecode(name)] = value.tolist() if hasattr(value, "tolist") else value
        return attributes

    def dataset(self, name: str, *, is_virtual: bool = False) -> Any:
        """The data set `name`, which lies in this very file unless it should be virtual."""
        if name in self._datasets and not is_virtual:
            return self._datasets[name]
        found = self._file
        for part in name.split("/"):
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"no data set {name}")
            found = found[part]
        if not isinstance(found, h5py.Dataset) or found.is_virtual != is_virtual or found.external:
            raise ValueError(f"no data set {name}")
        if not is_virtual:  # HDF5 2.0 crashes when a process ends that has such a one open
            self._datasets[name] = found
        return found

    def expect(
        self, name: str, types: str, shape: tuple[int, ...], *, is_virtual: bool = False
    ) -> np.dtype[Any]:
        """See that data set `name` is of this shape and of one of these types, as `f2 f4`; which one."""
        dataset = self.dataset(name, is_virtual=is_virtual)
        if dataset.shape != shape or not _is_of_type(dataset.dtype, types):
            raise ValueError(f"{name} is {dataset.shape} of {dataset.dtype}, not {shape} of {types}")
        if not is_virtual:
            self._check_stored(dataset)
        dtype: np.dtype[Any] = dataset.dtype
        return dtype

    def expect_records(self, name: str, record: np.dtype[Any]) -> None:
        """See that data set `name` has one dimension and these fields."""
        dataset = self.dataset(name)
        found = dataset.dtype
        if (
            len(dataset.shape) != 1
            or found.names != record.names
            or not all(_is_of_type(found[each], _type_of(record[each])) for each in record.names or ())
        ):
            raise ValueError(f"{name} is {dataset.shape} of {found}")
        self._check_stored(dataset)

    def _check_stored(self, dataset: Any) -> None:
        """See that the values of a data set are in the file: one never written may declare any number."""
        stored = dataset.id.get_storage_size()
        declared = math.prod(dataset.shape) * dataset.dtype.itemsize
        is_filtered = dataset.id.get_create_plist().get_nfilters() > 0
        if declared > stored * (_MOST_COMPRESSED if is_filtered else 1) or stored > self.num_bytes:
            raise ValueError(f"{dataset.name} has more rows than are in the file")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _type_of(dtype: np.dtype[Any]) -> str:
    """As `i4`, or `text`."""
    return "text" if h5py.check_string_dtype(dtype) is not None else f"{dtype.kind}{dtype.itemsize}"


def _is_of_type(dtype: np.dtype[Any], types: str) -> bool:
    """Whether a type is one of `types`, whatever its byte order."""
    return dtype.shape == () and _type_of(dtype) in types.split()
