"""What a record says follows from the median time, and from the rates of its own precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import measuring
import pytest
from measuring import FIELDS, datasheet_rate, flops_of, record

from esm_packed.config import ESM2Config

MATMUL_RATES = {"fp32": 1e12, "tf32": 2e12, "fp16": 4e12, "bf16": 8e12}
H100 = {"fp32": 67e12, "tf32": 494e12, "fp16": 989e12, "bf16": 989e12}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measured_rate", MATMUL_RATES.__getitem__)
    monkeypatch.setattr(measuring, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 7.0, 8.0))


def timed(*seconds: float) -> Any:
    """Stands for pytest-benchmark's fixture after its timing."""
    return SimpleNamespace(extra_info={}, stats=SimpleNamespace(stats=SimpleNamespace(data=list(seconds))))


def test_a_record_is_of_the_median_round(on_a_gpu: None) -> None:
    benchmark = timed(9.0, 1.0, 2.0)
    info = record(
        benchmark,
        dtype="fp16",
        useful_tokens=10,
        sequences=4,
        flops=8e12,
        computed_flops=9e12,
        bytes=6,
        floor_seconds=0.5,
    )
    assert info == benchmark.extra_info
    assert info.keys() == set(FIELDS)
    assert info["seconds"] == 2.0
    assert info["load_average"] == 1.5
    rates = ("tokens_per_second", "sequences_per_second", "flops_per_second", "bytes_per_second")
    assert [info[rate] for rate in rates] == [5.0, 2.0, 4e12, 3.0]
    assert info["share_of_floor"] == 0.25
    assert record(timed(9.0, 1.0), seconds=3.0, sequences=6)["sequences_per_second"] == 2.0


@pytest.mark.parametrize("dtype", MATMUL_RATES)
def test_mfu_is_over_the_rates_of_its_own_precision(dtype: str, on_a_gpu: None) -> None:
    info = record(timed(2.0), dtype=dtype, flops=6e12)
    assert info["mfu_measured"] == 3e12 / MATMUL_RATES[dtype]
    assert info["mfu_datasheet"] == 3e12 / H100[dtype]


def test_what_is_unknown_is_none(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    info = record(timed(2.0), dtype="fp64", flops=6e12)
    assert {name for name, value in info.items() if value is not None} == {
        "dtype",
        "flops",
        "seconds",
        "flops_per_second",
        "load_average",
    }
    monkeypatch.setattr(measuring, "gpu_name", lambda: None)
    assert record(timed(2.0), dtype="fp16", flops=6e12)["mfu_datasheet"] is None
    benchmark = SimpleNamespace(extra_info={}, stats=None)
    assert record(benchmark, dtype="fp16", flops=6e12)["seconds"] is None
    assert benchmark.extra_info["mfu_measured"] is None


def test_datasheet_rates_are_those_of_the_gpu_or_unknown() -> None:
    assert datasheet_rate("NVIDIA H100 80GB HBM3", "fp16") == 989e12
    assert datasheet_rate("NVIDIA L40S", "fp32") == 91.6e12
    assert datasheet_rate("NVIDIA L4", "fp32") == 30.3e12
    assert datasheet_rate("NVIDIA L4", "fp64") is None
    assert datasheet_rate("Some GPU", "fp16") is None
    assert datasheet_rate(None, "fp16") is None


def test_flops_are_those_of_all_proteins() -> None:
    """3 layers, hidden size 8; 4 and 10 residues are 6 and 12 tokens."""
    assert flops_of(ESM2Config(3, 8, 2), [4, 10]) == 3 * (24 * 64 * 18 + 4 * 8 * (36 + 144))


def test_the_floor_counts_operations_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"fp16": 1e12, "copy": 1e9}
    monkeypatch.setattr(measuring, "measured_rate", rates.__getitem__)
    config = ESM2Config(num_layers=2, hidden_size=8, num_heads=2)
    moved, seconds = measuring.forward_floor(config, [8, 18], "fp16", token_budget=20)
    one_sum = 4 * 30 * 8 * 2  # two tensors read, two written
    assert moved == 2 * 2 * one_sum + 2 * (2 * 12 * 8 * 8 * 2)  # and the weights of both packs
    matmuls = 2 * (2 * 30 * 12 * 8 * 8)
    attention = 2 * (4 * 8 * (10**2 + 20**2))
    assert seconds == pytest.approx((matmuls + attention) / 1e12 + moved / 1e9)
