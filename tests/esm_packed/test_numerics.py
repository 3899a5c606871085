from __future__ import annotations

import pytest
import torch

from esm_packed.numerics import PRECISIONS, matmul_precision, resolve_precision

CUDA_MATMUL, CPU_MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def switches() -> tuple[object, ...]:
    return (
        CUDA_MATMUL.fp32_precision,
        CPU_MATMUL.fp32_precision,
        CUDA_MATMUL.allow_fp16_reduced_precision_reduction,
        CUDA_MATMUL.allow_bf16_reduced_precision_reduction,
        CUDA_MATMUL.allow_fp16_accumulation,
    )


@pytest.mark.parametrize("name", PRECISIONS)
def test_switches_are_held_and_restored(name: str) -> None:
    before = switches()
    with pytest.raises(KeyError), matmul_precision(PRECISIONS[name]):
        assert switches() == ("tf32" if name == "tf32" else "ieee", "ieee", False, False, False)
        raise KeyError
    assert switches() == before


def test_fp32_is_ieee_whatever_the_process_asked_for() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 512), torch.randn(512, 64)
    exact = left.double() @ right.double()
    before = CPU_MATMUL.fp32_precision
    CPU_MATMUL.fp32_precision = "bf16"
    try:
        with matmul_precision(PRECISIONS["fp32"]):
            assert float((left @ right - exact).abs().max()) < 1e-4
        assert CPU_MATMUL.fp32_precision == "bf16"
    finally:
        CPU_MATMUL.fp32_precision = before


def test_defaults_and_refusals() -> None:
    assert resolve_precision(None, torch.device("cpu")).name == "fp32"
    assert resolve_precision(None, torch.device("cuda")).name == "fp16"
    with pytest.raises(ValueError, match="'fp8' is not known; choose from fp64"):
        resolve_precision("fp8", torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        resolve_precision("tf32", torch.device("cpu"))


@pytest.mark.parametrize(
    "mode, spellings",
    [
        ("fp64", ["fp64", "float64", "double", torch.float64]),
        ("fp32", ["fp32", "float32", "float", torch.float32, "torch.float32"]),
        ("fp16", ["fp16", "float16", "half", torch.float16]),
        ("bf16", ["bf16", "bfloat16", torch.bfloat16]),
    ],
)
def test_torchs_names_of_dtypes_are_taken(mode: str, spellings: list[str | torch.dtype]) -> None:
    for spelling in spellings:
        assert resolve_precision(spelling, torch.device("cpu")) is PRECISIONS[mode], spelling


@pytest.mark.parametrize("dtype", [torch.int8, "torch.int8", 16])
def test_dtypes_without_a_mode_are_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match="is not known; choose from fp64, fp32, tf32, fp16, bf16"):
        resolve_precision(dtype, torch.device("cpu"))  # type: ignore[arg-type]
