"""The summary of a GPU run: medians over blocks, ratios within a block; rates of each precision's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu import steps
from gpu.summary import summary_lines
from workloads import token_lengths

from esm_packed.config import ESM2_MODELS
from esm_packed.runners.state.cut import sequence_flops

RATES = {"fp16": 4e12, "tf32": 2e12, "fp32": 1e12}


def kernel(operation: str, provider: str, block: int, seconds: float) -> dict[str, Any]:
    return {
        "operation": operation,
        "provider": provider,
        "model_size": "650M",
        "dtype": "float16",
        "lengths": "uniref",
        "block": block,
        "seconds": seconds,
        "share_of_ceiling": 0.1 * seconds,
        "ceiling_name": "fp16",
        "ceiling_per_second": 7e14,
    }


def test_ratios_are_formed_within_a_block() -> None:
    """Times of 8, 2 and 9 over 2, 1 and 3: ratios of 4, 2 and 3, whose median is 3."""
    results = [
        kernel("packed_attention", provider, block, seconds)
        for provider, times in (("varlen", (8.0, 2.0, 9.0)), ("ours", (2.0, 1.0, 3.0)))
        for block, seconds in enumerate(times)
    ]
    step = {"status": "passed", "seconds": 1.0, "results": results}
    lines = list(summary_lines({"machine": {}, "steps": {"kernel_benchmarks": step}}))
    (ratio,) = [line for line in lines if line.startswith("attention: varlen time / ours")]
    assert ratio.split()[-4:] == ["3.00", "(2.00", "to", "4.00)"]
    (own,) = [line for line in lines if line.startswith("packed_attention")]
    assert own.endswith("2000000.0   20.0% | varlen 80%")
    assert "ceilings: fp16 700 TFLOP/s" in lines


def test_shares_are_of_the_rates_of_their_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "matmul_rate", lambda device, mode: RATES[mode])
    saved: list[dict[str, Any]] = []
    with torch.no_grad():
        steps.model_speed(torch.device("cpu"), saved.append, 600.0)
    found = saved[-1]
    variants = {name: values for name, values in found["variants"].items() if "error" not in values}
    assert {name.split()[0] for name in variants} == {"tf32", "fp32"}
    lengths = token_lengths("uniref", 300)
    flops = sequence_flops(np.array(lengths) - 2, ESM2_MODELS["esm2_t6_8M_UR50D"]).sum()
    for name, values in variants.items():
        assert values["seconds"] == np.median(values["all_seconds"])
        assert values["flops"] == flops
        assert values["tokens_per_second"] == pytest.approx(300 / values["seconds"])
        share = flops / values["seconds"] / RATES[name.split()[0]]
        assert values["share_of_matmul_rate"] == pytest.approx(share)
