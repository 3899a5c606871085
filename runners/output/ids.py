"""The IDs of an output, read as they are asked for, and found by hash."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.duplicates import ROW, HashRows, hash_rows, hashes_of, records_with
from esm_packed.runners.input.fasta import shorten
from esm_packed.runners.output.reader import EmbeddingReader, NotInFileError
from esm_packed.runners.state.shard import StoreError

_IDS_AT_ONCE = 1 << 14
_SHOWN_IDS = 3


class SequenceIds(Sequence[str]):
    """The IDs of an output in input order, read as they are asked for.

    The first look-up of an ID reads all of them and keeps 24 bytes of each, a hash and its row.

    Args:
        reader: of the output.
        path: for messages.
    """

    def __init__(self, reader: EmbeddingReader, path: str) -> None:
        self._reader = reader
        self._path = path
        self._hashes: HashRows | None = None

    def __len__(self) -> int:
        return self._reader.num_sequences

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        if isinstance(key, slice):
            rows = range(len(self))[key]
            first = min(rows, default=0)
            ids = self._reader.sequence_ids(first, max(rows, default=-1) + 1)
            return [ids[row - first] for row in rows]
        row = checked_index(key, len(self))
        return self._reader.sequence_ids(row, row + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _IDS_AT_ONCE):
            yield from self._reader.sequence_ids(start, start + _IDS_AT_ONCE)

    def __contains__(self, sequence_id: object) -> bool:
        return isinstance(sequence_id, str) and self._find(sequence_id) is not None

    def row(self, sequence_id: str) -> int:
        """Number of the row of an ID.

        Raises:
            NotInFileError: there is no such ID.
        """
        row = self._find(sequence_id)
        if row is None:
            shown = ", ".join(map(shorten, self[:_SHOWN_IDS]))
            raise NotInFileError(
                f"{self._path}: no sequence {shorten(sequence_id)}; it has {len(self):,}, such as {shown}"
            )
        return row

    def _find(self, sequence_id: str) -> int | None:
        if self._hashes is None:
            self._hashes = self._sorted_hashes()
        (high, low), *_ = _hashes_of_ids([sequence_id]).tolist()
        for row in records_with(self._hashes, high, low).tolist():
            if self[row] == sequence_id:
                return int(row)
        return None

    def _sorted_hashes(self) -> HashRows:
        """Hash and row of every ID, in the order of the hashes.

        Raises:
            StoreError: an ID is there twice.
        """
        rows = np.empty(len(self), ROW)
        for start in range(0, len(self), _IDS_AT_ONCE):
            ids = self._reader.sequence_ids(start, start + _IDS_AT_ONCE)
            rows[start : start + len(ids)] = hash_rows(_hashes_of_ids(ids), start)
        rows = rows[np.lexsort((rows["low"], rows["high"]))]
        is_same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        for place in np.flatnonzero(is_same).tolist():
            first, second = rows["record"][place : place + 2].tolist()
            if self[first] == self[second]:
                raise StoreError(f"{self._path}: damaged: ID {shorten(self[first])} is there twice")
        return rows


def _hashes_of_ids(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    names = [sequence_id.encode("utf-8", "surrogatepass") for sequence_id in ids]
    sizes = np.array([len(name) for name in names], np.int64)
    ends = np.cumsum(sizes)
    return hashes_of(b"".join(names), ends - sizes, ends)


def checked_index(index: int | np.integer[Any], size: int) -> int:
    """A row number, counted from the end if negative.

    Raises:
        IndexError: there is no such row.
        TypeError: it is no number.
    """
    row = operator.index(index)
    if not -size <= row < size:
        raise IndexError(f"row {row} of {size:,}")
    return row % size
