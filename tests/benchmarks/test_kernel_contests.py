"""Operations are held against FP64 before they are timed; their rates are of the median launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_baselines import KERNELS, MODEL_SIZES

from esm_packed.kernels.cases import FLOAT16, FLOAT32, Workload, relative_errors

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

contests = importlib.import_module("kernel_contests")
RATES = {"copy": 1e9, "fp16": 2e9, "tf32": 4e9, "fp32": 8e9}


def test_relative_errors_are_relative_to_the_truth() -> None:
    e = torch.tensor([3.0, -4.0], dtype=torch.float64)
    flags = torch.tensor([True, False])
    truth = {"out0": e, "out1": e, "out2": flags}
    assert relative_errors({"out0": 2 * e, "out1": e, "out2": flags}, truth) == {"out0": 1.0, "out1": 0.0}
    for name, wrong in (("out0", e / 0.0), ("out1", e * float("nan")), ("out2", ~flags)):
        with pytest.raises(AssertionError, match=name):
            relative_errors(truth | {name: wrong}, truth)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out * 1.001,
        lambda out: out.index_fill(0, torch.tensor([0]), float("nan")),
        lambda out: out.index_fill(0, torch.tensor([len(out) - 1]), 0.0),
    ],
    ids=["scaled", "nan", "last"],
)
def test_wrong_numbers_are_not_timed(
    spoil: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = KERNELS["layer_norm"].reference
    contest = contests.KernelEntry("layer_norm", "torch", "8M", FLOAT32)
    assert 0 < contests.Bench().prepare(contest).max_relative_error <= 1e-5

    def spoiled(**arguments: Any) -> torch.Tensor:
        return spoil(reference(**arguments))

    monkeypatch.setattr(contests, "baseline", lambda case, workload: spoiled)
    monkeypatch.setattr(contests, "Rounds", lambda *_, **__: pytest.fail("warmed up before it was checked"))
    with pytest.raises(AssertionError, match=r"relative errors .* above|not finite"):
        contests.Bench().prepare(contest)


class ThreeRounds:
    """Stands for `timing.Rounds`: launches of 9, 1 and 2 seconds."""

    launches, captured = 4, False

    def __init__(self) -> None:
        self.seconds: list[float] = [7.0]  # of the block before

    median = property(lambda self: sorted(self.seconds)[1])

    def prepare(self) -> None: ...

    def run(self) -> None:
        self.seconds.append([9.0, 1.0, 2.0][len(self.seconds)])


class Benchmark:
    """Stands for pytest-benchmark's fixture, whose own times are of whole rounds."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[100.0] * 3))

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(3):
            setup()
            target()


@pytest.mark.parametrize(
    ("operation", "dtype", "mode", "ceiling"),
    [
        ("layer_norm", FLOAT16, "fp16", "copy"),
        ("packed_attention", FLOAT16, "fp16", "fp16"),
        ("packed_attention", FLOAT32, "fp32", "fp32"),
        ("packed_attention_tf32", FLOAT32, "tf32", "tf32"),
    ],
)
def test_rates_are_of_the_median_launch_under_their_own_ceiling(
    operation: str, dtype: torch.dtype, mode: str, ceiling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (contests, importlib.import_module("measuring")):
        monkeypatch.setattr(module, "measured_rate", RATES.__getitem__)
    contest = contests.KernelEntry(operation, "ours", "8M", dtype, total_tokens=300)
    bench = contests.Bench()
    monkeypatch.setitem(bench._prepared, contest, contests.Prepared(ThreeRounds(), 2e-4))
    info = bench.time(contest, "kernels", 1, Benchmark())
    workload = bench.buffers(contest).workload
    flops = 4 * 320 * sum(length**2 for length in workload.lengths)
    num_bytes = (2 if operation == "layer_norm" else 4) * 300 * 320 * dtype.itemsize
    assert (info["suite"], info["block"], info["dtype"], info["backend"]) == ("kernels", 1, mode, "pytorch")
    assert info["seconds"] == 2.0
    assert info["round_seconds"] == [9.0, 1.0, 2.0]
    assert info["bytes"] == num_bytes
    assert info["flops"] == (None if ceiling == "copy" else flops)
    assert info["per_second"] == (num_bytes if ceiling == "copy" else flops) / 2.0
    assert info["ceiling_per_second"] == RATES[ceiling]
    assert info["share_of_ceiling"] == info["per_second"] / RATES[ceiling]
    assert info["bandwidth_ceiling"] == RATES["copy"]
    assert info["relative_error"] == 2e-4
    assert info["mfu_measured"] == (None if ceiling == "copy" else flops / 2.0 / RATES[mode])


def test_operations_move_what_they_must() -> None:
    """2 sequences, 7 tokens, hidden size 320, head_dim 16, FP16: worked by hand from the shapes."""
    workload = Workload(MODEL_SIZES["8M"], [3, 4], torch.device("cpu"))
    hidden = 7 * 320
    wanted = {
        "embed_tokens": 4 * hidden + 8 * 7,  # FP32 out, an id and a position of 4 bytes each
        "rotary_qk_": 2 * 2 * 2 * hidden + 4 * 7 + 2 * 4 * 4 * 8,  # q and k in and out, positions, tables
        "layer_norm": 2 * 2 * hidden,
        "add_layer_norm_": 2 * 2 * hidden + 2 * 4 * hidden,
        "add_layer_norm_half_residual_": 4 * 2 * hidden,
        "bias_gelu_": 2 * 2 * 4 * hidden,
        "segment_mean": 2 * hidden + 2 * 4 * 320,
    }
    wanted["segment_max"] = wanted["segment_mean"]
    wanted["rotary_qk_packed_"] = wanted["rotary_qk_"]
    moved = {name: case.bytes(workload, FLOAT16) for name, case in KERNELS.items() if case.num_flops is None}
    assert moved == wanted
    arithmetic = {
        name: case.num_flops(workload) for name, case in KERNELS.items() if case.num_flops is not None
    }
    attention = 4 * 320 * (3**2 + 4**2)
    assert arithmetic == {
        "gemm_bias_gelu": 2 * 7 * 320 * 1280,
        "gemm_bias_rotary": 2 * 7 * 320 * 960,
        "add_attention_maps_": attention // 2,
        "packed_attention": attention,
        "packed_attention_tf32": attention,
        "packed_attention_tf32x3": attention,
    }
