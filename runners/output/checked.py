"""Untrusted HDF5 files: nothing in them is used before its type, shape and size have been checked."""

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
"""Maximum compression ratio of a compressed dataset."""
_MOST_ATTRIBUTE_BYTES = 1 << 20
_ATTRIBUTE_CLASSES = (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM)


class CheckedFile:
    """An HDF5 file, open for reading.

    Unexpected content raises ValueError, which `reading` turns into a StoreError that names the file.

    Args:
        path: the file.
        kind: what the file should be, for messages.

    Raises:
        StoreError: the file is not an HDF5 file.
        UserError: too many files are open.
        OSError: the file is missing or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = os.fspath(path)
        self._kind = kind
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # HDF5 would wait for a pipe
            raise StoreError(f"{self.path}: not a regular file")
        self.num_bytes = found.st_size
        self._datasets: dict[str, Any] = {}  # HDF5 caches chunks of open datasets
        try:
            self._file = h5py.File(path, "r")
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "errno", None)
            if reason in (errno.ENOENT, errno.EACCES):
                raise
            if reason in (errno.EMFILE, errno.ENFILE):
                raise UserError(f"{self.path}: too many open files; raise the limit: `ulimit -n`") from error
            raise StoreError(f"{self.path}: not an HDF5 file, or truncated") from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context manager that turns errors of h5py due to a damaged file into StoreError.

        Raises:
            StoreError: the data read are damaged.
            ValueError: the file is closed.
        """
        if not self._file:
            raise ValueError(f"{self.path}: closed; open it again")
        try:
            yield
        except StoreError:
            raise
        except (OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{self.path}: damaged, or not a complete {self._kind} ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def attributes(self, dataset: str | None = None) -> dict[str, Any]:
        """Return the text and numeric attributes of the root or a dataset, as Python values.

        HDF5 may crash on damaged attributes of other types, which esm-packed never writes.
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
        """Return the dataset `name`, which must be stored in this file unless it should be virtual."""
        if name in self._datasets and not is_virtual:
            return self._datasets[name]
        found = self._file
        for part in name.split("/"):
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"no dataset {name}")
            found = found[part]
        if not isinstance(found, h5py.Dataset) or found.is_virtual != is_virtual or found.external:
            raise ValueError(f"no dataset {name}")
        if not is_virtual:  # HDF5 2.0 crashes when a process exits with a virtual dataset open
            self._datasets[name] = found
        return found

    def expect(
        self, name: str, types: str, shape: tuple[int, ...], *, is_virtual: bool = False
    ) -> np.dtype[Any]:
        """Check that dataset `name` has this shape and one of `types`, such as `f2 f4`; return its dtype."""
        dataset = self.dataset(name, is_virtual=is_virtual)
        if dataset.shape != shape or not _is_of_type(dataset.dtype, types):
            raise ValueError(f"{name} is {dataset.shape} of {dataset.dtype}, not {shape} of {types}")
        if not is_virtual:
            self._check_stored(dataset)
        dtype: np.dtype[Any] = dataset.dtype
        return dtype

    def expect_records(self, name: str, record: np.dtype[Any]) -> None:
        """Check that dataset `name` is one-dimensional and has these fields."""
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
        """Check that a dataset's values are in the file: an unwritten dataset may declare any size."""
        stored = dataset.id.get_storage_size()
        declared = math.prod(dataset.shape) * dataset.dtype.itemsize
        is_filtered = dataset.id.get_create_plist().get_nfilters() > 0
        if declared > stored * (_MOST_COMPRESSED if is_filtered else 1) or stored > self.num_bytes:
            raise ValueError(f"{dataset.name} has more rows than are in the file")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _type_of(dtype: np.dtype[Any]) -> str:
    """Return the type as a string such as `i4`, or `text`."""
    return "text" if h5py.check_string_dtype(dtype) is not None else f"{dtype.kind}{dtype.itemsize}"


def _is_of_type(dtype: np.dtype[Any], types: str) -> bool:
    """Whether a type is one of `types`, ignoring byte order."""
    return dtype.shape == () and _type_of(dtype) in types.split()
