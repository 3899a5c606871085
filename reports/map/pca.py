"""Principal components of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.errors import UsageError

MOST_FITTED = 10_000
"""Rows that components are fitted to; more rows hardly change them."""
_LEAST_FITTED = 3
_NUM_COMPONENTS = 2


@dataclass(frozen=True)
class Components:
    """The first two principal components.

    Args:
        mean: (D,) float64.
        axes: (D, 2) float64; the entry of largest magnitude in each column is positive.
        explained: (2,) float64, the share of the variance along each axis.
        num_fitted: rows that the components were fitted to.
    """

    mean: npt.NDArray[np.float64]
    axes: npt.NDArray[np.float64]
    explained: npt.NDArray[np.float64]
    num_fitted: int

    def project(self, rows: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """(n, 2) coordinates of (n, D) rows."""
        return (rows.astype(np.float64) - self.mean) @ self.axes


def fit(rows: npt.NDArray[np.floating[Any]]) -> Components:
    """The first two principal components of (n, D) rows.

    Raises:
        UsageError: there are fewer than three rows, or all are alike.
    """
    if len(rows) < _LEAST_FITTED:
        raise UsageError(
            f"a map needs at least {_LEAST_FITTED} proteins that were computed; there are {len(rows)}"
        )
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    _, scales, axes = np.linalg.svd(rows - mean, full_matrices=False)
    variances = scales**2
    if variances.sum() <= np.finfo(np.float32).eps ** 2 * (rows**2).sum():
        raise UsageError("all embeddings are alike; there is nothing to map")
    axes = axes[:_NUM_COMPONENTS].T
    largest = axes[np.abs(axes).argmax(axis=0), range(_NUM_COMPONENTS)]
    return Components(mean, axes * np.sign(largest), variances[:_NUM_COMPONENTS] / variances.sum(), len(rows))
