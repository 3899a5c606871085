"""Rows of outputs: how many each sequence has, and matrices over pairs of residues as rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.outputs import Per

Values = npt.NDArray[np.floating[Any]]


def row_counts(
    lengths: npt.ArrayLike, sites: Sequence[npt.NDArray[np.int64]] | None = None
) -> dict[Per, npt.NDArray[np.int64]]:
    """(n,) rows that each of n sequences has, by what a row is for.

    Args:
        lengths: (n,) their residues.
        sites: of each the residues that are read, where only these are.
    """
    lengths = np.asarray(lengths, np.int64)
    counts: dict[Per, npt.NDArray[np.int64]] = {
        "sequence": np.ones_like(lengths),
        "residue": lengths,
        "pair": lengths * (lengths + 1) // 2,
    }
    if sites is not None:
        counts["site"] = np.fromiter(map(len, sites), np.int64, len(sites))
    return counts


def symmetric_matrix(rows: Values) -> Values:
    """(n, n) matrix of the (n (n + 1) / 2,) entries on its diagonal and above, row by row.

    They are in the order of `numpy.triu_indices(n)`.
    """
    n = (math.isqrt(8 * len(rows) + 1) - 1) // 2
    matrix = np.empty((n, n), rows.dtype)
    start = 0
    for i in range(n):  # indices would take four times the memory of the matrix
        matrix[i, i:] = matrix[i:, i] = rows[start : start + n - i]
        start += n - i
    return matrix
