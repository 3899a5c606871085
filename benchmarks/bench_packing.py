"""The packer, and the padding of batches without it, sorted by length or in input order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from measuring import DEVICE, ON_GPU, record
from padding_shares import PLANNERS, Packs, batch_sizes
from workloads import WORKLOADS, sample_residues

from esm_packed.config import DEFAULT_TOKEN_BUDGETS
from esm_packed.packing import SPECIAL_TOKENS

NUM_SEQUENCES = (1000, 1_000_000 if ON_GPU else 50_000)
"""Sorting a whole database leaves little padding; a small file, or a shard of a large one, leaves more."""

TOKEN_BUDGETS = tuple(DEFAULT_TOKEN_BUDGETS.values())


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    budget = config.getoption("--token-budget")
    return {
        "workload": config.getoption("--workload") or list(WORKLOADS),
        "token_budget": [budget] if budget else list(TOKEN_BUDGETS),
        "sequences": list(NUM_SEQUENCES),
        "planner": list(PLANNERS),
    }


def test_packing(
    block: int, workload: str, token_budget: int, sequences: int, planner: str, benchmark: Any
) -> None:
    benchmark.group = f"packing {workload}"
    rng = np.random.default_rng(0)
    lengths = sample_residues(workload, sequences, rng) + SPECIAL_TOKENS
    packs: Packs = benchmark.pedantic(PLANNERS[planner], (lengths, token_budget), rounds=1)

    assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(sequences))
    useful = int(lengths.sum())
    sizes = batch_sizes(planner, lengths, packs)
    assert max(sizes) <= token_budget
    record(
        benchmark,
        suite="packing",
        block=block,
        provider=planner,
        workload=workload,
        layout="packed" if planner == "first_fit_decreasing" else "padded",
        token_budget=token_budget,
        backend=DEVICE.type,
        sequences=sequences,
        useful_tokens=useful,
        padded_tokens=sum(sizes),
        num_packs=len(packs),
        efficiency=useful / (len(packs) * token_budget),
        padding_share=1 - useful / sum(sizes),
    )
