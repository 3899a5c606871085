"""The layouts of the package, and padded batches in input order, which nobody should use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from esm_packed.layouts import LAYOUTS as OWN_LAYOUTS
from esm_packed.packing import PackedBatch


def plan_unsorted(lengths: npt.ArrayLike, token_budget: int) -> list[npt.NDArray[np.int64]]:
    """Padded batches in input order, each as large as the budget allows."""
    tokens = np.asarray(lengths).tolist()
    batches, start, longest = [], 0, 0
    for index, length in enumerate(tokens):
        longest = max(longest, length)
        if index > start and (index + 1 - start) * longest > token_budget:
            batches.append(np.arange(start, index))
            start, longest = index, length
    return [*batches, np.arange(start, len(tokens))]


LAYOUTS = OWN_LAYOUTS | {
    "padded_unsorted": replace(
        OWN_LAYOUTS["padded"],
        name="padded_unsorted",
        algorithm="padded, in input order",
        plan=plan_unsorted,
    )
}


def computed_lengths(batch: PackedBatch, layout: str) -> npt.NDArray[np.int64]:
    """Tokens of every sequence that attention computes; rows of a padded batch all have one length."""
    if layout.startswith("padded"):
        return np.full(batch.num_sequences, batch.max_seqlen)
    return batch.cu_seqlens.diff().cpu().numpy().astype(np.int64)
