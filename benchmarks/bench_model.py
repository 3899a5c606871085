"""One forward pass of esm-packed, by precision, layout (packed or padded), model and lengths.

The batches are on the device before timing starts; copying them there is timed separately.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contenders.contest import Contest, Entry
from contenders.packages import lay_out
from measuring import DEVICE, ON_GPU, record, synchronize
from workloads import proteins

from esm_packed.packing import SPECIAL_TOKENS, default_token_budget

TOTAL_TOKENS = 131_072 if ON_GPU else 2048
WORKLOADS = ("short50", "medium150", "long300", "uniref", "viral", "constant1024")
REPRODUCIBLE_TOKENS = (63 * 4 * default_token_budget(DEVICE)) // 64 if ON_GPU else 8000
"""On a GPU four packs that are full except for 1/64, unlike the last pack of a shard."""

REPRODUCIBLE = (
    ("esm_packed", "packed"),
    ("esm_packed", "fixed"),
    *([("esm_packed_graphs", "fixed")] if ON_GPU else []),
)
DTYPES = ("fp32", "tf32", "fp16", "bf16") if ON_GPU else ("fp32", "fp16", "bf16")
DEFAULT_DTYPE = "fp16" if ON_GPU else "fp32"
LARGER_BUDGET_DTYPES = ("fp16",) if ON_GPU else ()
"""For these, packs of twice the budget are also measured, as they take as much memory as FP32's."""


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    budget = config.getoption("--token-budget") or default_token_budget(DEVICE)
    every = ON_GPU or config.getoption(
        "--full"
    )  # half types are slow on CPUs that have no instructions for them
    variants = [
        (dtype, layout, budget)
        for dtype in config.getoption("--dtype") or DTYPES
        for layout in ("packed", "padded", "padded_unsorted")
        if layout == "packed" or dtype == DEFAULT_DTYPE or (every and layout == "padded")
    ]
    variants += [
        (dtype, "packed", 2 * budget)
        for dtype in LARGER_BUDGET_DTYPES
        if (dtype, "packed", budget) in variants
    ]
    return {
        "model": config.getoption("--model"),
        "workload": config.getoption("--workload") or list(WORKLOADS),
        "dtype, layout, token_budget": variants,
    }


def test_model(
    block: int,
    model: str,
    workload: str,
    dtype: str,
    layout: str,
    token_budget: int,
    contest: Contest,
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    benchmark.group = f"model {workload}"
    total_tokens = pytestconfig.getoption("--tokens") or TOTAL_TOKENS
    entry = Entry("esm_packed", model, workload, total_tokens, dtype, layout, token_budget)
    ready = contest.ready(entry)
    benchmark.pedantic(ready.run, rounds=3 if ON_GPU and dtype != "fp32" else 1)
    ready.record(benchmark, "model", block)
    contest.check_memory(ready)


@pytest.mark.parametrize("provider, layout", REPRODUCIBLE)
def test_reproducible(
    block: int,
    model: str,
    provider: str,
    layout: str,
    contest: Contest,
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    """Cost of packs of fixed size, and gain from replaying them as CUDA graphs, in the default precision."""
    benchmark.group = "reproducible"
    # on a GPU, other amounts would leave a last pack that is mostly padding
    total_tokens = (None if ON_GPU else pytestconfig.getoption("--tokens")) or REPRODUCIBLE_TOKENS
    budget = pytestconfig.getoption("--token-budget") or default_token_budget(DEVICE)
    ready = contest.ready(Entry(provider, model, "uniref", total_tokens, DEFAULT_DTYPE, layout, budget))
    benchmark.pedantic(ready.run, rounds=3 if ON_GPU else 1)
    ready.record(benchmark, "reproducible", block)


def test_transfer(block: int, workload: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    """Copying packs from pinned memory to the GPU, which `test_model` leaves out."""
    if not ON_GPU:
        pytest.skip("needs a CUDA device: on a CPU there is nothing to copy")
    benchmark.group = "transfer"
    sequences = proteins(workload, pytestconfig.getoption("--tokens") or TOTAL_TOKENS)
    packs = lay_out(sequences, default_token_budget(DEVICE))
    tensors = [tensor for _, pack in packs for tensor in (pack.input_ids, pack.cu_seqlens)]
    pinned = [tensor.cpu().pin_memory() for tensor in tensors]

    def copy() -> list[torch.Tensor]:
        copied = [tensor.to(DEVICE, non_blocking=True) for tensor in pinned]
        synchronize()
        return copied

    copied = copy()
    assert all(torch.equal(one, other) for one, other in zip(copied, tensors, strict=True))
    benchmark.pedantic(copy, rounds=20)
    record(
        benchmark,
        suite="transfer",
        block=block,
        workload=workload,
        provider="esm_packed",
        sequences=len(sequences),
        useful_tokens=sum(map(len, sequences)) + SPECIAL_TOKENS * len(sequences),
        bytes=sum(tensor.nbytes for tensor in pinned),
    )
