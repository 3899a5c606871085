"""Every attention backend on its own, for every distribution of lengths, in the shape of one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_contests import Bench, KernelEntry
from measuring import ON_GPU
from workloads import WORKLOADS

from esm_packed.attention import BACKENDS
from esm_packed.kernels.cases import BFLOAT16, FLOAT16, FLOAT32

DTYPES = {"fp32": FLOAT32, "tf32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
DEFAULT_DTYPES = ("fp16", "fp32") if ON_GPU else ("fp32",)
MODEL_SIZE = "650M" if ON_GPU else "8M"
TOTAL_TOKENS = 65_536 if ON_GPU else 2048


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    return {
        "workload": config.getoption("--workload") or list(WORKLOADS),
        "dtype": config.getoption("--dtype") or list(DEFAULT_DTYPES),
        "backend": list(BACKENDS),
    }


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with torch.no_grad():
        yield Bench()


def test_attention(
    block: int,
    workload: str,
    dtype: str,
    backend: str,
    bench: Bench,
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    benchmark.group = f"attention {workload}"
    operation = "packed_attention_tf32" if dtype == "tf32" else "packed_attention"
    if backend == "reference" and ON_GPU:
        pytest.skip("reference is a loop over sequences, for tests")
    if backend == "triton" and not ON_GPU:
        pytest.skip("attention 'triton' runs on CUDA devices")
    if dtype == "tf32" and backend != "triton":
        pytest.skip(f"attention {backend!r} has no TF32")
    provider = "ours" if backend == "triton" else backend
    total_tokens = pytestconfig.getoption("--tokens") or TOTAL_TOKENS
    contest = KernelEntry(operation, provider, MODEL_SIZE, DTYPES[dtype], workload, total_tokens)
    bench.time(contest, "attention", block, benchmark)
    benchmark.extra_info["backend"] = backend
