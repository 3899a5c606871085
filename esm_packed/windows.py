"""Long proteins in overlapping windows, and blending of the windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.outputs import is_ragged, layer_of

Rows = npt.NDArray[np.floating[Any]]


class Windows(NamedTuple):
    """How proteins longer than a window are split.

    Windows begin every `size - overlap` residues, and the last one ends with the protein, so that all are of
    one size. A residue in several windows is their weighted mean: the weight of a window is 1 and falls
    linearly, over `overlap` residues, toward an end that is not the protein's.

    Args:
        size: residues in a window.
        overlap: residues that a window shares with the next one, at least; at most half of `size`.
    """

    size: int
    overlap: int

    def starts(self, length: int) -> list[int]:
        """First residues of the windows of a protein of `length` residues."""
        if length <= self.size:
            return [0]
        return [*range(0, length - self.size, self.size - self.overlap), length - self.size]

    def num_residues(self, lengths: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Residues computed for proteins of `lengths`, counting overlaps once per window."""
        num_windows = 1 - (self.size - lengths) // (self.size - self.overlap)
        return np.where(lengths <= self.size, lengths, num_windows * self.size).astype(np.int64)

    def weights(self, start: int, length: int) -> npt.NDArray[np.float32]:
        """(size,) weight of each residue of the window from `start` on of a protein of `length` residues."""
        rising = np.arange(1, self.size + 1, dtype=np.float32) / (self.overlap + 1)
        from_start = rising if start > 0 else 1.0
        to_end = rising[::-1] if start + self.size < length else 1.0
        return np.minimum(np.minimum(from_start, to_end), np.ones(self.size, np.float32))


class Blend:
    """Blends the windows of one protein, added in any order.

    Args:
        windows: how it was split.
        length: residues of the protein.
    """

    def __init__(self, windows: Windows, length: int) -> None:
        self._windows = windows
        self._length = length
        self._left = len(windows.starts(length))
        self._weight = np.zeros((length, 1), np.float32)
        self._sums: dict[str, Rows] = {}

    def add(self, start: int, rows: Mapping[str, Rows]) -> bool:
        """Add a window.

        Args:
            start: its first residue.
            rows: by name, (size, columns) of its residues.

        Returns:
            Whether it was the last one.
        """
        weights = self._windows.weights(start, self._length)[:, None]
        here = slice(start, start + self._windows.size)
        self._weight[here] += weights
        for name, values in rows.items():
            if name not in self._sums:
                dtype = np.result_type(values, np.float32)
                self._sums[name] = np.zeros((self._length, values.shape[1]), dtype)
            self._sums[name][here] += weights * values
        self._left -= 1
        return self._left == 0

    def outputs(self, names: Iterable[str]) -> dict[str, Rows]:
        """Outputs by name, (columns,) means or (length, columns); all windows have been added."""
        residues = {name: sums / self._weight for name, sums in self._sums.items()}
        return {
            name: residues[name] if is_ragged(name) else residues[_residues_of(name)].mean(0, np.float64)
            for name in names
        }


def names_in_windows(names: Iterable[str]) -> list[str]:
    """Outputs of each window from which `Blend` forms the outputs `names` of the protein."""
    return list(dict.fromkeys(map(_residues_of, names)))


def _residues_of(name: str) -> str:
    """The output that has a row for each residue from which the output `name` is formed."""
    return f"per_residue/{layer_of(name)}"
