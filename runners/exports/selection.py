"""The part of an output that is exported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.errors import UsageError
from esm_packed.runners.output.names import PER_LAYER, POOLED, RAGGED
from esm_packed.runners.output.reader import MISSING, EmbeddingReader

Values = npt.NDArray[np.floating[Any]]

_ROWS_AT_ONCE = 1 << 10


class Block(NamedTuple):
    """Consecutive sequences.

    Args:
        ids: (n,) IDs.
        columns: (n,) arrays, as returned by `EmbeddingReader.columns`.
        values: (n, D), or an iterator of n (L, columns) or (L, L) arrays if the kind is ragged.
    """

    ids: list[str]
    columns: dict[str, npt.NDArray[Any]]
    values: Any


class Selection:
    """The sequences that are exported, in input order, each with the values of one kind and layer.

    Args:
        reader: reader of the output.
        kind: mean, max, bos or a ragged kind; None for the first of these in the output.
        layer: a layer of the output; None for the last one.
        keep_missing: include sequences that failed or were not computed; their values are NaN.

    Attributes:
        reader, kind, layer: as above, resolved; `layer` is None only for a kind without layers.
        num_missing: sequences that failed or were not computed.
        dtype: dtype of the values.
        width: D.

    Raises:
        NotInFileError: there is no such kind or layer.
        UsageError: the kind cannot be exported.
    """

    def __init__(
        self, reader: EmbeddingReader, kind: str | None, layer: int | None, *, keep_missing: bool
    ) -> None:
        self.reader = reader
        self.kind = kind or next((each for each in POOLED if each in reader.kinds), reader.kinds[0])
        empty = reader.values(self.kind, layer, 0, 0)
        if empty.ndim != 2 and not self.is_ragged:
            raise UsageError(
                f"--kind {self.kind}: has a single number per sequence and cannot be exported; choose from "
                f"{', '.join(POOLED + RAGGED)}"
            )
        self.layer = reader.layers[-1] if layer is None and self.kind in PER_LAYER else layer
        self.dtype, self.width = empty.dtype, empty.shape[-1]
        self._keep_missing = keep_missing
        status = reader.column("status")
        self.num_missing = int(np.isin(status, MISSING).sum())
        self._num_sequences = len(status) - (0 if keep_missing else self.num_missing)

    def __len__(self) -> int:
        return self._num_sequences

    @property
    def is_ragged(self) -> bool:
        """Whether each sequence has a matrix, not a row."""
        return self.kind in RAGGED

    @property
    def provenance(self) -> dict[str, str | int]:
        """What the values are and which model computed them."""
        attributes = self.reader.attributes
        names = ("model_name", "model_sha256", "dtype", "attention_backend")
        found: dict[str, str | int] = {name: str(attributes[name]) for name in names if name in attributes}
        found["kind"] = self.kind
        return found if self.layer is None else found | {"layer": self.layer}

    def ids(self) -> Iterator[str]:
        """Only the IDs."""
        for start, is_kept in self._kept():
            yield from self._ids(start, is_kept)

    def blocks(self) -> Iterator[Block]:
        """Everything to export, in blocks, with bounded memory."""
        for start, is_kept in self._kept():
            stop = start + len(is_kept)
            columns = self.reader.columns(start, stop)
            values: Any
            if self.is_ragged:
                rows = (start + np.flatnonzero(is_kept)).tolist()
                values = (self.reader.value(row, self.kind, self.layer) for row in rows)
            else:
                values = self.reader.values(self.kind, self.layer, start, stop)[is_kept]
            kept_columns = {name: each[is_kept] for name, each in columns.items()}
            yield Block(self._ids(start, is_kept), kept_columns, values)

    def _kept(self) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """First row of each block, and a mask of its exported rows."""
        for start in range(0, self.reader.num_sequences, _ROWS_AT_ONCE):
            status = self.reader.column("status", start, start + _ROWS_AT_ONCE)
            yield start, ~np.isin(status, MISSING) | self._keep_missing

    def _ids(self, start: int, is_kept: npt.NDArray[np.bool_]) -> list[str]:
        ids = self.reader.sequence_ids(start, start + len(is_kept))
        return [each for each, kept in zip(ids, is_kept, strict=True) if kept]
