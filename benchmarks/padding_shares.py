"""What padded batches compute in vain, by lengths, number of proteins and tokens in a batch.

    python benchmarks/padding_shares.py

prints the table of docs/packing.md. It counts tokens: nothing is timed, and the machine does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from contenders.batching import plan_unsorted
from workloads import sample_residues

from esm_packed.packing import SPECIAL_TOKENS, plan_packs
from esm_packed.padding import plan_padded

Lengths = npt.NDArray[np.int64]
Packs = Sequence[npt.NDArray[np.int64]]

PLANNERS: dict[str, Callable[[Lengths, int], Packs]] = {
    "first_fit_decreasing": plan_packs,
    "padded_sorted": plan_padded,
    "padded_unsorted": plan_unsorted,
}

LENGTHS = {"uniref": "UniRef50", "proteome": "a proteome", "short50": "about 50 residues"}
NUM_PROTEINS = (20, 200, 1000, 10_000)
TOKEN_BUDGETS = (1024, 4096, 16_384, 32_768)

MIN_DRAWN = 10_000
"""Proteins behind each number: small sets are drawn so often that they make this many together."""


def batch_sizes(planner: str, lengths: Lengths, packs: Packs) -> list[int]:
    """Tokens that each batch computes, padding included.

    Args:
        planner: key of `PLANNERS`.
        lengths: (num_sequences,) tokens, BOS and EOS included.
        packs: indices of the sequences of each batch.
    """
    if planner == "first_fit_decreasing":
        return [int(lengths[pack].sum()) for pack in packs]
    return [len(pack) * int(lengths[pack].max()) for pack in packs]


def padding_share(planner: str, workload: str, num_proteins: int, token_budget: int) -> float:
    """Padding among the tokens that are computed, over seeded draws of `num_proteins` each."""
    useful = computed = 0
    for seed in range(max(1, MIN_DRAWN // num_proteins)):
        lengths = sample_residues(workload, num_proteins, np.random.default_rng(seed)) + SPECIAL_TOKENS
        useful += int(lengths.sum())
        computed += sum(batch_sizes(planner, lengths, PLANNERS[planner](lengths, token_budget)))
    return 1 - useful / computed


def table() -> Iterator[str]:
    """Lines of Markdown: input order / sorted by length."""
    yield "| lengths | proteins | " + " | ".join(f"{budget:,} tokens" for budget in TOKEN_BUDGETS) + " |"
    yield "|---|" + "---|" * (1 + len(TOKEN_BUDGETS))
    for workload, lengths in LENGTHS.items():
        for count in NUM_PROTEINS:
            cells = [
                " / ".join(
                    f"{padding_share(planner, workload, count, budget):.1%}"
                    for planner in ("padded_unsorted", "padded_sorted")
                )
                for budget in TOKEN_BUDGETS
            ]
            yield f"| {lengths} | {count:,} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("\n".join(table()))
