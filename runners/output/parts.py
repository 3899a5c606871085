"""The files next to an output that hold its rows of residues, if these are too large to copy.

HDF5 can read such files through virtual datasets, but keeps all of them open, and silently substitutes fill
values for those that it cannot open. Here all of them are verified first, and only a few are open at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from esm_packed.runners.output.checked import CheckedFile
from esm_packed.runners.state.shard import StoreError

PART_FORMAT = "esm-packed part"
PART = np.dtype([("file", h5py.string_dtype()), ("bytes", "i8"), ("first_row", "i8"), ("num_rows", "i8")])
_MOST_OPEN = 16


class PartError(StoreError):
    """A part of an output is missing, or is not the expected one."""


class Part(NamedTuple):
    """A part file: its name and size, and the rows it holds."""

    file: str
    bytes: int
    first_row: int
    num_rows: int


class DataSetType(NamedTuple):
    """The dtype and shape of the rows of a dataset."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Parts:
    """The parts of an output.

    Args:
        output: the output file.
        directory: its root attribute `parts`.
        parts: its parts, in row order.
        plan_hash: the plan hash of the output.
        datasets: the expected type of each dataset that has rows there.

    Raises:
        PartError: a part is missing, or is not the expected one.
        ValueError: the list of parts is inconsistent.
        OSError: a part cannot be opened.
    """

    def __init__(
        self,
        output: Path,
        directory: str,
        parts: list[Part],
        plan_hash: str,
        datasets: Mapping[str, DataSetType],
    ) -> None:
        place = PurePosixPath(directory)
        if place.is_absolute() or ".." in place.parts or not place.parts or "\0" in directory:
            raise ValueError(f"parts are in {directory!r}")
        self.parts = parts
        self.num_rows = sum(part.num_rows for part in parts)
        self._output = output
        self._directory = output.resolve().parent / place
        self._plan_hash = plan_hash
        self._datasets = datasets
        self._firsts = [part.first_row for part in parts]
        self._open_files: dict[int, CheckedFile] = {}
        if not parts or self._firsts[0] != 0:
            raise ValueError("the parts do not begin with row 0")
        for part, following in pairwise(parts):
            if following.first_row != part.first_row + part.num_rows:
                raise ValueError(f"the rows of part {part.file!r} do not end where those of the next begin")
        for part in parts:
            if part.num_rows < 0 or PurePosixPath(part.file).name != part.file or "\0" in part.file:
                raise ValueError(f"part {part.file!r} with {part.num_rows} rows")
        try:
            self.stored_bytes = self._verify()
        except BaseException:
            self.close()
            raise

    def _verify(self) -> dict[str, int]:
        """Check that every part exists and is complete; return the bytes on disk of each dataset."""
        stored = dict.fromkeys(self._datasets, 0)
        for number in range(len(self.parts)):
            file = self._part(number)
            for name in stored:
                stored[name] += file.dataset(name).id.get_storage_size()
        return stored

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.floating[Any]]:
        """Return rows [start, stop) of dataset `name`, 0 <= start <= stop <= num_rows.

        Raises:
            StoreError: a part has since been removed, replaced or damaged.
            OSError: a part cannot be opened.
        """
        pieces = [self._read(name, number, *rows) for number, *rows in self._places(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        dtype, shape = self._datasets[name]
        return np.concatenate([np.empty((0, *shape), dtype), *pieces])

    def _places(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the parts that hold rows [start, stop), each with the range of rows within the part."""
        number = max(0, bisect_right(self._firsts, start) - 1)
        while start < stop:
            _, _, first, num_rows = self.parts[number]
            end = min(stop, first + num_rows)
            if end > start:
                yield number, start - first, end - first
                start = end
            number += 1

    def _read(self, name: str, number: int, start: int, stop: int) -> npt.NDArray[np.floating[Any]]:
        file = self._part(number)
        with file.reading():
            rows: npt.NDArray[np.floating[Any]] = file.dataset(name)[start:stop]
        return rows

    def _part(self, number: int) -> CheckedFile:
        """Return a part, opened and checked; if too many are open, close the least recently used one."""
        file = self._open_files.pop(number, None)
        if file is None:
            if len(self._open_files) == _MOST_OPEN:
                self._open_files.pop(next(iter(self._open_files))).close()
            file = self._open(self.parts[number])
        self._open_files[number] = file
        return file

    def _open(self, part: Part) -> CheckedFile:
        path = self._directory / part.file
        remedy = f"restore this part of {self._output}, or embed again with --overwrite"
        try:
            file = CheckedFile(path, f"part of {self._output}")
            try:
                self._check(file, part)
            except BaseException:
                file.close()
                raise
        except (FileNotFoundError, NotADirectoryError):
            raise PartError(f"{path}: missing; {remedy}") from None
        except StoreError as error:
            raise PartError(f"{error}; {remedy}") from error
        return file

    def _check(self, file: CheckedFile, part: Part) -> None:
        if file.num_bytes != part.bytes:
            raise StoreError(f"{file.path}: {file.num_bytes:,} bytes, not {part.bytes:,}")
        with file.reading():
            attributes = file.attributes()
            if (attributes.get("format"), attributes.get("plan_hash")) != (PART_FORMAT, self._plan_hash):
                raise StoreError(f"{file.path}: not a part, or one of another run")
            for name, (dtype, shape) in self._datasets.items():
                file.expect(name, f"{dtype.kind}{dtype.itemsize}", (part.num_rows, *shape))

    def close(self) -> None:
        """Close all open parts."""
        while self._open_files:
            self._open_files.popitem()[1].close()
