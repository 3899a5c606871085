"""OpenVINO and ONNX Runtime compute transformers' model as they are told, or say why they do not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contenders.packages import padded_inputs
from safetensors.torch import load_file, save_file

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")
pytest.importorskip("transformers")

contest = importlib.import_module("contenders.contest")


class StandIn:
    """OpenVINO's interface, computed by the model that is given to it in the precision that is asked for."""

    def __init__(self, served: str | None = None) -> None:
        self.served = served
        self.settings: dict[str, Any] = {}

    def convert_model(self, model: torch.nn.Module, example_input: dict[str, torch.Tensor]) -> Any:
        assert not bool(example_input["attention_mask"].all()), "the mask must be part of what is traced"
        self.converted = model
        return model

    def Core(self) -> Any:
        return self

    def compile_model(self, model: torch.nn.Module, device: str, settings: dict[str, Any]) -> Any:
        assert (model, device) == (self.converted, "CPU")
        self.settings = settings
        return self

    def get_property(self, name: str) -> Any:
        return SimpleNamespace(to_string=lambda: self.served or self.settings[name])

    def create_infer_request(self) -> Any:
        return self

    def infer(self, inputs: dict[str, Any], *, share_inputs: bool, share_outputs: bool) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return {"last_hidden_state": self.converted(**tensors).numpy()}


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    def install(served: str | None = None) -> StandIn:
        stand_in = StandIn(served)
        monkeypatch.setitem(sys.modules, "openvino", stand_in)
        return stand_in

    yield install


def entry(provider: str, dtype: str = "fp32") -> Any:
    return contest.Entry(provider, "demo", "short50", 600, dtype, "padded", 256)


def test_openvino_gets_the_batches_and_the_threads(openvino: Callable[..., StandIn]) -> None:
    stand_in = openvino()
    ready = contest.Contest().ready(entry("openvino"))
    assert ready.errors["relative_error"] < 1e-6
    assert ready.provider.padded_tokens > 600
    assert stand_in.settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert stand_in.settings["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    assert stand_in.settings["NUM_STREAMS"] == 1


def test_openvino_in_another_precision_than_asked_is_refused(openvino: Callable[..., StandIn]) -> None:
    stand_in = openvino(served="f32")
    with pytest.raises(ImportError, match="OpenVINO computes in f32 on this processor"):
        contest.Contest().ready(entry("openvino", "bf16"))
    assert stand_in.settings["INFERENCE_PRECISION_HINT"] == "bf16"


@pytest.mark.parametrize("provider", ["openvino", "onnxruntime"])
def test_a_runtime_that_is_missing_is_named(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, provider, None)
    with pytest.raises(ImportError, match=provider):
        contest.Contest().ready(entry(provider))


@pytest.mark.slow  # 30 s: conversion, of which half is importing the converters
@pytest.mark.parametrize(
    ("provider", "dtype", "allowed"),
    [("openvino", "fp32", 1e-6), ("openvino", "bf16", 0.02), ("onnxruntime", "fp32", 1e-6)],
)
def test_the_runtimes_compute_the_checkpoint(provider: str, dtype: str, allowed: float) -> None:
    pytest.importorskip(provider)
    try:
        ready = contest.Contest().ready(entry(provider, dtype))
    except ImportError as missing:  # BF16 needs a processor that has it
        pytest.skip(str(missing))
    assert ready.errors["relative_error"] < allowed


def test_transformers_computes_frequencies_that_a_file_lacks(tmp_path: Path) -> None:
    """Given the checkpoint's it computes the same model: nothing else makes the difference."""
    sequences = contest.proteins("uniref", 2000)[:3]
    checkpoint = contest.load_checkpoint("demo")
    truth = contest.compute_truth(checkpoint, sequences, rounded_frequencies=True).embeddings
    contest.Transformers("demo", "fp32", 256).model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    errors = []
    for kept in (tensors, without):
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        model = importlib.import_module("transformers").EsmModel.from_pretrained(
            tmp_path, add_pooling_layer=False
        )
        errors.append(error(model.eval(), sequences, truth))
    model.rotary_embeddings.inv_freq.copy_(checkpoint.tensors["layers.0.self_attn.rot_emb.inv_freq"])
    errors.append(error(model, sequences, truth))
    kept_error, lost_error, given_error = errors
    assert max(kept_error, given_error) < 1e-6 < 1e-5 < lost_error


@torch.no_grad()
def error(model: Any, sequences: list[str], truth: torch.Tensor) -> float:
    """Of mean embeddings to FP64, protein by protein."""
    rows = []
    for sequence in sequences:
        input_ids, mask = padded_inputs([sequence])
        states = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        rows.append(states[0, 1:-1].mean(0))
    return float(contest.worst_relative_error(rows, truth))
