"""esm-packed compared with other packages and runtimes as their users run them, and with its own floor.

Same weights, same proteins, each rival with the batches that are fastest for it here. Each is checked against
FP64 before it is timed; those that cannot run are listed with the reason under `not_run` in the result file.
See README.md.
"""

from __future__ import annotations

from typing import Any

import pytest
from contenders.contest import RIVALS_TOKEN_BUDGETS, Contest, Entry, OtherModelError
from measuring import DEVICE, ON_GPU

from esm_packed.packing import default_token_budget

TOTAL_TOKENS = 131_072 if ON_GPU else 6000
WORKLOADS = ("uniref",)
PROVIDERS = (
    ("esm_packed", "fp32"),
    ("esm_packed", "fp16"),
    ("esm_packed", "bf16"),
    ("fair_esm", "fp32"),
    ("fair_esm", "fp16"),
    ("transformers", "fp32"),
    ("transformers", "fp16"),
    ("transformers", "bf16"),
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
KEEP_BUDGET = ("esm_packed", "esm_cpp", "floor_matmul_mm", "floor_matmul_best", "floor_attention")
"""These use the default budget or form batches themselves; the others are tried with several budgets."""

ON_CPU_ONLY = (
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("onnxruntime", "fp32"),
    ("esm_cpp", "fp32"),
    ("floor_matmul_mm", "fp32"),
    ("floor_matmul_best", "fp32"),
    ("floor_attention", "fp32"),
)


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    dtypes, names = config.getoption("--dtype"), config.getoption("--provider")
    known = PROVIDERS if ON_GPU else PROVIDERS + ON_CPU_ONLY
    if unknown := sorted(set(names or ()) - {name for name, _ in known}):
        choices = ", ".join(dict.fromkeys(name for name, _ in known))
        raise pytest.UsageError(f"--provider: {unknown[0]!r} is not one of {choices}")
    return {
        "model": config.getoption("--model"),
        "workload": config.getoption("--workload") or list(WORKLOADS),
        "provider, dtype": [
            (name, dtype)
            for name, dtype in known
            if (not dtypes or dtype in dtypes) and (not names or name in names)
        ],
    }


def takes_minutes(provider: str, dtype: str, config: pytest.Config) -> bool:
    """Whether it is slow on a CPU and neither it nor `--full` was requested."""
    if ON_GPU or config.getoption("--full"):
        return False
    dtypes, names = config.getoption("--dtype") or (), config.getoption("--provider") or ()
    is_compiled = provider == "transformers_compiled"
    return (dtype != "fp32" and dtype not in dtypes) or (is_compiled and provider not in names)


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
    if takes_minutes(provider, dtype, pytestconfig):
        pytest.skip(f"{provider} in {dtype}: takes minutes on a CPU; --full, or its name, includes it")
    total_tokens = pytestconfig.getoption("--tokens") or TOTAL_TOKENS
    budget = pytestconfig.getoption("--token-budget") or default_token_budget(DEVICE)
    layout = "packed" if provider in PACKED or provider.startswith("floor") else "padded"
    if provider.endswith("_unsorted"):
        layout = "padded_unsorted"
    is_unknown = provider == "esm_cpp"
    is_given = provider in KEEP_BUDGET or pytestconfig.getoption("--token-budget")
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
        ready = contest.ready(entry, () if is_given else RIVALS_TOKEN_BUDGETS)
    except (ImportError, OtherModelError) as error:
        pytest.skip(f"{provider} in {dtype}: {error}")
    benchmark.pedantic(ready.run, rounds=3 if ON_GPU and dtype != "fp32" else 1)
    inside = {"seconds_inside": getattr(ready.provider, "seconds_inside", None)}  # of esm-cpp's own process
    ready.record(benchmark, "peers", block, **inside)
