"""The IDs of an output, read on demand and looked up by hash."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.fasta import shorten
from esm_packed.runners.output.reader import EmbeddingReader, NotInFileError
from esm_packed.runners.state.shard import StoreError

_IDS_AT_ONCE = 1 << 14
_SHOWN_IDS = 3


class SequenceIds(Sequence[str]):
    """The IDs of an output in input order, read on demand.

    The first lookup of an ID reads all of them and keeps 16 bytes for each: a hash and its row.

    Args:
        reader: reader of the output.
        path: its path, for messages.
    """

    def __init__(self, reader: EmbeddingReader, path: str) -> None:
        self._reader = reader
        self._path = path
        self._index: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

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
        """Return the row number of an ID.

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
        if self._index is None:
            self._index = self._sorted_hashes()
        hashes, rows = self._index
        wanted = hash(sequence_id)
        place = int(np.searchsorted(hashes, wanted))
        while place < len(hashes) and hashes[place] == wanted:
            if self[row := int(rows[place])] == sequence_id:
                return row
            place += 1
        return None

    def _sorted_hashes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the hashes of all IDs, ascending, and their rows.

        Raises:
            StoreError: an ID appears twice.
        """
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        rows = np.argsort(hashes)
        hashes = hashes[rows]
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            first, second = self[int(rows[place])], self[int(rows[place + 1])]
            if first == second:
                raise StoreError(f"{self._path}: damaged: ID {shorten(first)} appears twice")
        return hashes, rows


def checked_index(index: int | np.integer[Any], size: int) -> int:
    """Return a non-negative row number; negative indices count from the end.

    Raises:
        IndexError: there is no such row.
        TypeError: the index is not an integer.
    """
    row = operator.index(index)
    if not -size <= row < size:
        raise IndexError(f"row {row} is out of range for {size:,} rows")
    return row % size
