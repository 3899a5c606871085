"""esm-packed beside fair-esm, transformers, faesm, esm-efficient and esm-cpp, and beside its own floor.

Same weights, same proteins; each is held against FP64 before it is timed, and what cannot run is listed with
the reason under `not_run` in the result file: README.md.
"""

from __future__ import annotations

from typing import Any

import pytest
from contenders.contest import Contest, Entry, OtherModelError
from measuring import DEVICE, ON_GPU

from esm_packed.config import DEFAULT_TOKEN_BUDGETS

TOTAL_TOKENS = 131_072 if ON_GPU else 6000
MAX_TOKENS_ON_CPU = 8000
WORKLOADS = ("uniref",)
PROVIDERS = (
    ("esm_packed", "fp32"),
    ("esm_packed", "fp16"),
    ("fair_esm", "fp32"),
    ("fair_esm", "fp16"),
    ("transformers", "fp32"),
    ("transformers", "fp16"),
    ("transformers_unsorted", "fp32"),
    ("esm_packed_transformers", "fp32"),
    ("esm_packed_transformers_unsorted", "fp32"),
    ("transformers_compiled", "fp32"),
    ("transformers_compiled", "fp16"),
    ("faesm", "fp32"),
    ("faesm", "fp16"),
    ("esm_efficient", "fp16"),
)
PACKED = ("esm_packed", "esm_efficient")
ON_CPU_ONLY = (
    ("esm_cpp", "fp32"),
    ("floor_matmul_mm", "fp32"),
    ("floor_matmul_best", "fp32"),
    ("floor_attention", "fp32"),
)


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    dtypes = config.getoption("--dtype")
    providers = PROVIDERS if ON_GPU else PROVIDERS + ON_CPU_ONLY
    return {
        "model": config.getoption("--model"),
        "workload": config.getoption("--workload") or list(WORKLOADS),
        "provider, dtype": [(name, dtype) for name, dtype in providers if not dtypes or dtype in dtypes],
    }


def test_peer(
    block: int,
    model: str,
    workload: str,
    provider: str,
    dtype: str,
    contest: Contest,
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    benchmark.group = f"peers {workload}"
    is_slow = dtype != "fp32" or provider == "transformers_compiled"
    if is_slow and not ON_GPU and not pytestconfig.getoption("--full"):
        pytest.skip(f"{provider} in {dtype}: takes minutes on a CPU; --full includes it")
    total_tokens = pytestconfig.getoption("--tokens") or TOTAL_TOKENS
    if not ON_GPU:
        total_tokens = min(total_tokens, MAX_TOKENS_ON_CPU)
    budget = pytestconfig.getoption("--token-budget") or DEFAULT_TOKEN_BUDGETS[DEVICE.type]
    layout = "packed" if provider in PACKED or provider.startswith("floor") else "padded"
    if provider.endswith("_unsorted"):
        layout = "padded_unsorted"
    is_unknown = provider == "esm_cpp"
    entry = Entry(
        provider,
        model,
        workload,
        total_tokens,
        dtype,
        None if is_unknown else layout,
        None if is_unknown else budget,
    )
    try:
        ready = contest.ready(entry)
    except (ImportError, OtherModelError) as error:
        pytest.skip(f"{provider} in {dtype}: {error}")
    benchmark.pedantic(ready.run, rounds=3 if ON_GPU and dtype != "fp32" else 1)
    inside = {"seconds_inside": getattr(ready.provider, "seconds_inside", None)}  # of esm-cpp's own process
    ready.record(benchmark, "peers", block, **inside)
