"""Colors of points: categories or numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_CATEGORIES = 9
"""Categories up to which each has its own color."""
NO_VALUE = -1
_BLANKS = frozenset({"", "na", "nan", "n/a", "none", "null"})


@dataclass(frozen=True)
class Categories:
    """Points in categories.

    Args:
        name: title of the legend.
        labels: categories, the most frequent first; the last one combines the rare ones if there are more
            than `MOST_CATEGORIES`.
        codes: (n,) indices into `labels`, or `NO_VALUE`.
        has_others: whether the last label combines the rare categories.
    """

    name: str
    labels: Sequence[str]
    codes: npt.NDArray[np.int64]
    has_others: bool


@dataclass(frozen=True)
class Numbers:
    """Points with one number each.

    Args:
        name: label of the color bar.
        values: (n,) float64, NaN where there is no number.
    """

    name: str
    values: npt.NDArray[np.float64]


def coloring(name: str, texts: Sequence[str]) -> Categories | Numbers:
    """Numbers if all texts are numbers and more than `MOST_CATEGORIES` differ, else categories.

    Args:
        name: what the texts describe.
        texts: one per point; an empty text, NA, NaN, None and null mean no value.
    """
    filled = ["" if text.strip().lower() in _BLANKS else text.strip() for text in texts]
    counts = Counter(text for text in filled if text)
    numbers = {text: number for text in counts if math.isfinite(number := _number(text))}
    if len(numbers) == len(counts) > MOST_CATEGORIES:
        return Numbers(name, np.array([numbers.get(text, math.nan) for text in filled]))
    order = sorted(counts, key=lambda text: (-counts[text], text))
    has_others = len(order) > MOST_CATEGORIES
    shown = order[:MOST_CATEGORIES]
    places = {text: min(place, MOST_CATEGORIES) for place, text in enumerate(order)} | {"": NO_VALUE}
    labels = [*shown, f"{len(order) - MOST_CATEGORIES:,} others"] if has_others else shown
    return Categories(name, labels, np.array([places[text] for text in filled], np.int64), has_others)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
