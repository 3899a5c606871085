"""The summary of a GPU run: medians over blocks, ratios within a block; rates of each precision's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu import forward
from gpu.launches import FUSED, LAYER_LAUNCHES, by_position, layer_period
from gpu.summary import summary_lines
from workloads import token_lengths

from esm_packed.config import ESM2_MODELS
from esm_packed.kernels.cases import Workload
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
    monkeypatch.setattr(forward, "matmul_rate", lambda device, mode: RATES[mode])
    saved: list[dict[str, Any]] = []
    with torch.no_grad():
        forward.model_speed(torch.device("cpu"), saved.append, 600.0)
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


LAYER = ("gemm_a", "rotary", "attention", "gemm_b", "norm", "gemm_c", "gelu", "gemm_c", "norm")


def test_time_is_attributed_by_position_in_the_layer() -> None:
    """Also where one kernel serves two positions, and the one before the first layer ends every layer."""
    config = ESM2_MODELS["esm2_t6_8M_UR50D"]
    workload = Workload(config, [100, 28], torch.device("cpu"))
    kernels = [("embed", 5.0), ("norm", 7.0)]
    for layer in range(config.num_layers):
        kernels += [(name, 10.0 * (position + 1) + layer) for position, name in enumerate(LAYER)]
    kernels.append(("mean", 3.0))
    total = 15 + sum(10 * 45 + 9 * layer for layer in range(6))
    assert layer_period([name for name, _ in kernels], 6) == (2, 9)

    found = by_position(kernels, workload, config, torch.float16)
    assert [entry["name"] for entry in found["layer"]] == list(LAYER_LAUNCHES)
    assert [entry["microseconds"] for entry in found["layer"]] == [10 * p + 2.5 for p in range(1, 10)]
    assert found["gpu_microseconds"] == total
    assert found["outside_layers_share"] == pytest.approx(15 / total)
    assert sum(entry["share"] for entry in found["layer"]) == pytest.approx(1 - 15 / total)
    tokens, hidden = 128, 320
    assert found["layer"][5]["flops_per_second"] == pytest.approx(8 * hidden**2 * tokens / 62.5e-6)
    assert found["layer"][2]["flops_per_second"] == pytest.approx(4 * hidden * (100**2 + 28**2) / 32.5e-6)
    # FP16 delta and result, FP32 residual read and written.
    assert found["layer"][8]["bytes_per_second"] == pytest.approx(tokens * hidden * 12 / 92.5e-6)

    forward_step = {"model": "8M", "dtype": "fp16", "attention_backend": "varlen", "total_tokens": 128}
    forward_step |= {"seconds": 1e-3, "tokens_per_second": 128e3, "share_of_matmul_rate": 0.5}
    step = {"status": "passed", "seconds": 1.0, "found": forward_step | {"finite": True, "profile": found}}
    lines = list(summary_lines({"machine": {}, "steps": {"forward": step}}))
    assert any(line.split()[:3] == ["bias_gelu", "72.5", "us"] for line in lines)


@pytest.mark.parametrize("fused", [["rotary"], ["bias_gelu"], ["rotary", "bias_gelu"]])
def test_launches_keep_their_names_where_one_kernel_takes_two(fused: list[str]) -> None:
    config = ESM2_MODELS["esm2_t6_8M_UR50D"]
    before = {"rotary": "qkv", "bias_gelu": "fc1"}
    renamed = {before[name]: f"_{FUSED[name]}_kernel" for name in fused}
    names = [name for name in LAYER_LAUNCHES if name not in fused]
    kernels = [("embed", 1.0), *[(renamed.get(name, name), 1.0) for name in names] * config.num_layers]
    workload = Workload(config, [128], torch.device("cpu"))
    found = by_position(kernels, workload, config, torch.float16)
    assert [entry["name"] for entry in found["layer"]] == names


def test_kernels_that_do_not_repeat_are_summed_by_name() -> None:
    config = ESM2_MODELS["esm2_t6_8M_UR50D"]
    workload = Workload(config, [128], torch.device("cpu"))
    kernels = [(f"kernel {index % 5}{index // 7}", 1.0) for index in range(30)] + [("last", 9.0)]
    found = by_position(kernels, workload, config, torch.float16)
    assert "layer" not in found
    assert next(iter(found["kernels"].items())) == ("last", 9.0)
    assert sum(found["kernels"].values()) == found["gpu_microseconds"] == 39.0
