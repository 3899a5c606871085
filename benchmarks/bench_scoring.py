"""Masked marginals of one protein: a copy for each residue, by this package, fair-esm and transformers.

Each is checked against FP64 before it is timed. `esm_packed_every_row` computes the logits of all tokens as
others do: its extra time over `esm_packed` is what computing only the masked rows saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from contenders.contest import Contest, OtherModelError
from contenders.marginals import Marginals, MarginalsContest
from measuring import DEVICE, ON_GPU, flops_of, record, synchronize

from esm_packed.packing import SPECIAL_TOKENS, default_token_budget

RESIDUES = 300 if ON_GPU else 60
FULL_RESIDUES = 300
FULL_MODELS_ON_CPU = 2
BATCHES = (8, 32, 128) if ON_GPU else (1, 4, 16)
"""Copies per batch for transformers, the best of which counts; fair-esm's example takes one at a time."""

PROVIDERS = (
    ("esm_packed", 0),
    ("esm_packed_every_row", 0),
    ("fair_esm", 1),
    *(("transformers", copies) for copies in BATCHES),
)
"""Providers and the number of copies of the protein that each computes together; 0: as many as fit a pack."""


@pytest.fixture(scope="module")
def marginals(contest: Contest) -> Iterator[MarginalsContest]:
    yield MarginalsContest(contest)


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    models = config.getoption("--model")
    if config.getoption("--full") and not ON_GPU:
        models = models[:FULL_MODELS_ON_CPU]
    return {
        "model": models,
        "dtype": config.getoption("--dtype") or (["fp32", "fp16"] if ON_GPU else ["fp32"]),
        "provider, copies": list(PROVIDERS),
    }


def test_masked_marginals(
    block: int,
    model: str,
    dtype: str,
    provider: str,
    copies: int,
    marginals: MarginalsContest,
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    residues = FULL_RESIDUES if pytestconfig.getoption("--full") else RESIDUES
    if tokens := pytestconfig.getoption("--tokens"):
        residues = tokens - SPECIAL_TOKENS
    benchmark.group = f"masked marginals of {residues} residues"
    budget = pytestconfig.getoption("--token-budget") or default_token_budget(DEVICE)
    together = copies or max(1, budget // (residues + SPECIAL_TOKENS))
    variant = Marginals(provider, model, dtype, residues, together)
    try:
        ready = marginals.ready(variant)
    except (ImportError, OtherModelError) as error:
        pytest.skip(f"{provider} in {dtype}: {error}")

    def run() -> None:
        ready.run()
        synchronize()

    benchmark.pedantic(run, rounds=3 if ON_GPU else 1)
    record(
        benchmark,
        suite="scoring",
        block=block,
        provider=provider,
        model=model,
        workload=f"masked{residues}",
        dtype=dtype,
        token_budget=together * (residues + SPECIAL_TOKENS),
        backend=ready.backend,
        sequences=residues,
        useful_tokens=residues * (residues + SPECIAL_TOKENS),
        padded_tokens=residues * (residues + SPECIAL_TOKENS),
        flops=flops_of(marginals.config(model), [residues] * residues),
        max_error=marginals.max_errors[variant],
    )
