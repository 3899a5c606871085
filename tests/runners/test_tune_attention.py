"""Attention backends are ranked by their times, and `auto` follows the ranking of its GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from esm_packed import attention
from esm_packed.config import ESM2Config
from esm_packed.kernels import dispatch, launch
from esm_packed.kernels.reference import packed_attention
from esm_packed.numerics import PRECISIONS, Precision
from esm_packed.runners import tune
from esm_packed.runners.tune import Outcome
from esm_packed.runners.tuning_attention import LENGTH_CLASSES, BackendOrder, contests, order_backends
from esm_packed.runners.tuning_trials import Trial

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = ESM2Config(num_layers=1, hidden_size=64, num_heads=2)
FP16 = PRECISIONS["fp16"]
Times = dict[str, tuple[float, float, float]]


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """`varlen` and `triton` serve a CPU, and compute the reference."""
    for name in ("varlen", "triton"):
        serving = replace(
            attention.BACKENDS[name],
            obstacle=lambda device, dtype, head_dim: None,
            load=lambda precision: packed_attention,
        )
        monkeypatch.setitem(attention.BACKENDS, name, serving)


def order_by(times: Times) -> BackendOrder | None:
    """The order where backends take these microseconds on the three length classes."""
    calls = iter(range(len(LENGTH_CLASSES)))

    def timer(trials: Sequence[Trial], rounds: int, /) -> list[float]:
        number = next(calls)
        for trial in trials:
            trial.launch()
        return [times[str(trial.settings)][number] for trial in trials]

    return order_backends(CONFIG, FP16, 120, CPU, timer, lambda num_bytes: 2)


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize(
    ("times", "fastest"),
    [
        ({"varlen": (9.0, 9.0, 9.0), "triton": (3.0, 6.0, 10.0)}, "triton"),
        ({"varlen": (9.0, 9.0, 9.0), "triton": (20.0, 6.0, 8.0)}, "varlen"),
        ({"varlen": (9.0, 9.0, 9.0), "triton": (8.9, 8.9, 8.9)}, "varlen"),  # as good as equal
    ],
)
def test_backends_are_ranked_over_short_and_long_proteins_alike(times: Times, fastest: str) -> None:
    order = order_by(times)
    assert order is not None
    assert (order.key, order.order[0], order.dropped) == ("32/float16", fastest, [])
    assert sorted(order.order) == ["triton", "varlen"]
    assert order.microseconds == {
        name: {backend: taken[index] for backend, taken in times.items()}
        for index, name in enumerate(LENGTH_CLASSES)
    }


@pytest.mark.usefixtures("backends")
def test_a_backend_with_wrong_numbers_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return packed_attention(query, *others) * 1.01

    for name in ("flash3", "varlen"):
        spoiled = replace(attention.BACKENDS["varlen"], load=lambda precision: wrong)
        monkeypatch.setitem(attention.BACKENDS, name, spoiled)
    assert order_by({"triton": (1.0, 1.0, 1.0)}) is None
    monkeypatch.setitem(attention.BACKENDS, "flash3", attention.BACKENDS["triton"])
    order = order_by({"triton": (2.0, 2.0, 2.0), "flash3": (3.0, 3.0, 3.0)})
    assert order is not None
    assert (order.order, order.dropped) == (["triton", "flash3"], ["varlen"])


def test_without_a_rival_nothing_is_ranked() -> None:
    assert order_by({}) is None


def test_each_shape_of_head_competes_once_in_half_types() -> None:
    wide = ESM2Config(num_layers=1, hidden_size=128, num_heads=4)
    found = contests([CONFIG, wide], [PRECISIONS[name] for name in ("fp16", "fp32", "tf32", "bf16")])
    assert found == {
        "packed_attention/32/float16": (CONFIG, FP16),
        "packed_attention/32/bfloat16": (CONFIG, PRECISIONS["bf16"]),
    }


@pytest.fixture
def tuned_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a tuned GPU, on which `triton` beats `varlen` with heads of 64 in FP16."""
    monkeypatch.setattr(launch, "CONFIG_DIRECTORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cuda"})
    monkeypatch.setattr(launch, "tuned_attention", launch.tuned_attention.__wrapped__)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.6.0")
    path = launch.config_path("a GPU")
    facts = {"gpu": "a GPU", "triton": "3.6.0"}
    order = BackendOrder(
        "64/float16", ["triton", "varlen"], {"short50": {"triton": 3.0, "varlen": 4.00001}}, []
    )
    tune.save_outcome(path, facts, Outcome("layer_norm/64/float32", {"BLOCK_T": 4}, 10.0, 8.0, 1, 0))
    tune.save_order(path, facts, order)
    tune.save_outcome(path, facts, Outcome("bias_gelu_/256/float16", {"BLOCK_T": 2}, 10.0, 8.0, 1, 0))
    return path


@pytest.mark.parametrize(
    ("precision", "head_dim", "expected"),
    [(FP16, 64, "triton"), (FP16, 32, "varlen"), (PRECISIONS["bf16"], 64, "varlen")],
)
def test_auto_follows_what_was_timed_on_this_gpu(
    tuned_gpu: Path, precision: Precision, head_dim: int, expected: str
) -> None:
    select = partial(attention.select_backend, "auto", GPU, precision, head_dim)
    assert select()[0] == expected
    content = json.loads(tuned_gpu.read_text())
    assert content["attention"]["64/float16"]["microseconds"] == {"short50": {"triton": 3.0, "varlen": 4.0}}
    assert len(content["settings"]) == 2
    tuned_gpu.unlink()
    assert select()[0] == "varlen"


def test_a_timed_backend_that_no_longer_serves_gives_way(
    tuned_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", set())
    assert attention.select_backend("auto", GPU, FP16, 64)[0] == "varlen"
