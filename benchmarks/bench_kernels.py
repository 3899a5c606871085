"""Every kernel compared with PyTorch, on packed batches of UniRef lengths: README.md.

On a CPU the sizes are tiny and the operations are plain PyTorch, which only shows that the code runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_baselines import KERNELS
from kernel_contests import Bench, KernelEntry
from measuring import ON_GPU

from esm_packed.attention import BACKENDS
from esm_packed.kernels.cases import BFLOAT16, FLOAT16, FLOAT32

SHAPES = [("650M", FLOAT16), ("650M", BFLOAT16), ("650M", FLOAT32), ("8M", FLOAT16), ("3B", FLOAT16)]
COMPILED = [("650M", FLOAT16)]
FUSED_PRODUCTS = ("gemm_bias_gelu", "gemm_bias_rotary")
FUSED_PROVIDERS = ("fused", "separate", "torch", "matmul_alone")
HEAD_SIZES = ("8M", "150M", "650M")
"""Models with heads of 16, 32 and 64."""

BACKEND_NAMES = [name for name in BACKENDS if name != "triton"]


def memory_bound_contests() -> Iterator[KernelEntry]:
    """Our kernels and plain PyTorch for every shape; `torch.compile` and other packages for one shape."""
    for case in KERNELS.values():
        if case.num_flops is not None:
            continue
        for size, dtype in SHAPES:
            if dtype not in case.dtypes:
                continue
            yield KernelEntry(case.name, "ours", size, dtype)
            if case.name != "rotary_qk_packed_":
                yield KernelEntry(case.name, "torch", size, dtype)
                if ON_GPU and (size, dtype) in COMPILED:
                    yield KernelEntry(case.name, "torch_compile", size, dtype)
                    if case.name == "layer_norm":
                        yield KernelEntry(case.name, "liger", size, dtype)
                        yield KernelEntry(case.name, "flash_attn", size, dtype)


def attention_contests() -> Iterator[KernelEntry]:
    """All backends in the main shape; those that a model would use in the others and on short proteins."""
    name = "packed_attention"
    for lengths in ("uniref", "constant1024"):
        for provider in ("ours", *BACKEND_NAMES):
            yield KernelEntry(name, provider, "650M", FLOAT16, lengths)
    for size, dtype in (*SHAPES[1:], ("150M", FLOAT16)):
        for provider in ("ours", "sdpa") if dtype == FLOAT32 else ("ours", "varlen"):
            yield KernelEntry(name, provider, size, dtype)
    for size in HEAD_SIZES:
        for provider in ("ours", "varlen"):
            yield KernelEntry(name, provider, size, FLOAT16, "short50")
    for precision in ("tf32", "tf32x3"):
        yield KernelEntry(f"{name}_{precision}", "ours", "650M", FLOAT32)


def attention_map_contests() -> Iterator[KernelEntry]:
    """Sums over attention maps, and a version that materializes the maps."""
    for size, dtype in SHAPES:
        for provider in ("ours", "torch"):
            yield KernelEntry("add_attention_maps_", provider, size, dtype)


def fused_product_contests() -> Iterator[KernelEntry]:
    """Our matrix multiplications with an epilogue; a library's, then our kernel or PyTorch; it alone."""
    for name, (size, dtype) in itertools.product(FUSED_PRODUCTS, SHAPES):
        if dtype != FLOAT32:
            for provider in FUSED_PROVIDERS:
                if ON_GPU or provider != "fused":  # the fused kernels have no reference path
                    yield KernelEntry(name, provider, size, dtype)


def contests() -> list[KernelEntry]:
    """All contests, in the order of execution."""
    found = [
        *memory_bound_contests(),
        *attention_contests(),
        *attention_map_contests(),
        *fused_product_contests(),
    ]
    return found if ON_GPU else [contest for contest in found if contest.model_size != "3B"]


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    names = "operation, provider, model_size, dtype, lengths"
    return {names: [contest.parameters for contest in contests()]}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with torch.no_grad():
        yield Bench()


def test_kernel(
    block: int,
    operation: str,
    provider: str,
    model_size: str,
    dtype: str,
    lengths: str,
    bench: Bench,
    benchmark: Any,
    record_property: Callable[[str, Any], None],
) -> None:
    contest = KernelEntry(operation, provider, model_size, getattr(torch, dtype), lengths)
    benchmark.group = f"kernels {contest.group}"
    for name, value in bench.time(contest, "kernels", block, benchmark).items():
        record_property(name, value)
