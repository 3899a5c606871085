"""Memory for rows of embeddings, which come by the ten megabytes and go again."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.floating[Any]]


def page_rows(shape: tuple[int, int], dtype: npt.DTypeLike) -> Rows:
    """Zeros in pages of their own, which the system gets back when the array is dropped.

    The C library would keep freed arrays of this size, several of them, never quite where the next fits.
    """
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


class RowBuffers:
    """Rows of one shard after another, in memory that is taken once: what was there is overwritten."""

    def __init__(self) -> None:
        self._rows: dict[int, Rows] = {}

    def rows(self, layer: int, shape: tuple[int, int], dtype: npt.DTypeLike) -> Rows:
        """Room for the rows of a layer, with what the last shard left in it."""
        held = self._rows.get(layer)
        if held is None or len(held) < shape[0] or held.shape[1] != shape[1] or held.dtype != dtype:
            held = self._rows[layer] = page_rows(shape, dtype)
        return held[: shape[0]]
