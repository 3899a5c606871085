"""Sequences distributed over packs at random, as no planner would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_packing(
    lengths: Sequence[int], budget: int, rng: np.random.Generator, early: float
) -> list[list[int]]:
    """Random order; a pack ends where the next sequence does not fit, and before that with chance `early`."""
    packs: list[list[int]] = [[]]
    for index in rng.permutation(len(lengths)).tolist():
        if sum(lengths[i] for i in packs[-1]) + lengths[index] > budget or rng.random() < early:
            packs.append([])
        packs[-1].append(index)
    return [members for members in packs if members]
