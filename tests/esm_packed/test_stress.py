"""The stress checkpoint has the outliers of trained ESM-2, and overflows FP16 where it is asked to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import model_of

from esm_packed.checkpoints import RandomTensors, load_checkpoint, save_fair_esm, tensor_shapes
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.packing import pack
from esm_packed.stress import seeded_kind, stress_checkpoint

CONFIG = ESM2Config(6, 96, 4)
CPU = torch.device("cpu")


def proteins(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 24, length).astype(np.uint8) for length in lengths]


def test_seeded_and_complete() -> None:
    first, same, other = (
        stress_checkpoint(CONFIG, 1),
        stress_checkpoint(CONFIG, 1),
        stress_checkpoint(CONFIG, 2),
    )
    assert {name: tuple(tensor.shape) for name, tensor in first.tensors.items()} == tensor_shapes(CONFIG)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, same.tensors[name])
        assert torch.equal(tensor.half().float(), tensor), f"{name} loses bits in FP16"
    assert not torch.equal(first.tensors["layers.0.fc2.weight"], other.tensors["layers.0.fc2.weight"])
    assert first.sha256 == same.sha256
    assert len({first.sha256, other.sha256, stress_checkpoint(CONFIG, 1, peak=1e5).sha256}) == 3


@pytest.mark.parametrize("config", [ESM2_MODELS["esm2_t6_8M_UR50D"], ESM2Config(12, 480, 20)])
def test_activations_are_those_of_trained_models(config: ESM2Config) -> None:
    """Against what was measured on the real 8M to 650M: residual |max| 468, then 141 and 140, in three
    channels; last layer rms 0.30 to 0.37, |max| 5.3 to 8.1, one or two channels over 10 rms."""
    esm2 = pytest.importorskip("esm.model.esm2", reason="fair-esm 2.0.0 is not installed")
    fair_esm = esm2.ESM2(config.num_layers, config.hidden_size, config.num_heads).eval()
    state = dict(stress_checkpoint(config).tensors)
    fair_esm.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"]})
    tokens = torch.from_numpy(proteins(300)[0]).long()[None]
    tokens[0, 0], tokens[0, -1] = 0, 2
    last = config.num_layers
    with torch.no_grad():
        representations = fair_esm(tokens, repr_layers=[last - 1, last])["representations"]
    residual, normalized = (representations[layer][0] for layer in (last - 1, last))
    largest = residual.abs().amax(0).sort(descending=True).values
    assert 400 < largest[0] < 600
    assert 90 < largest[2] <= largest[1] < 250
    assert largest[3] < 90
    constant = residual[:, residual.abs().amax(0).argmax()]
    assert constant.max() < -400, "every token has it"
    rms = normalized.square().mean().sqrt()
    assert 0.27 < rms < 0.42
    assert 4 < normalized.abs().max() < 9
    assert 1 <= int((normalized.abs().amax(0) > 10 * rms).sum()) <= 2


def test_harder_on_half_precision_than_random_weights() -> None:
    batch = pack(proteins(40, 120, 200))
    config = ESM2Config(24, 96, 4)
    errors = {}
    for name, tensors in (("stress", stress_checkpoint(config).tensors), ("random", RandomTensors(config))):
        rows = {}
        for mode in ("fp64", "fp16"):
            checkpoint = stress_checkpoint(config)
            model = model_of(type(checkpoint)("", config, tensors, "", ""), mode)
            output = model.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, [24])
            rows[mode] = output.representations[24].double()
        errors[name] = float((rows["fp16"] - rows["fp64"]).norm() / rows["fp64"].norm())
    assert errors["stress"] > 1.5 * errors["random"]


def test_a_higher_peak_overflows_in_fp16_alone() -> None:
    batch = pack(proteins(*[8] * 6, 250, 250))
    checkpoint = stress_checkpoint(ESM2Config(4, 96, 4), peak=70_000)
    assert all(tensor.abs().max() < 65_504 for tensor in checkpoint.tensors.values())
    finite = {
        mode: model_of(checkpoint, mode).embed_packed(batch, ["mean/4"])["mean/4"].isfinite().all(1).tolist()
        for mode in ("fp16", "bf16", "fp32")
    }
    assert finite["bf16"] == finite["fp32"] == [True] * 8
    assert finite["fp16"][-2:] == [False, False] and True in finite["fp16"]


def test_seeded_weights_are_recognised_in_files(tmp_path: Path) -> None:
    assert seeded_kind(load_checkpoint("demo")) is None
    assert seeded_kind(load_checkpoint("random:esm2_t6_8M_UR50D@3")) == "random"
    for name, checkpoint in (
        ("stress", stress_checkpoint(CONFIG, 4, peak=1e5)),
        ("random", (CONFIG, RandomTensors(CONFIG, 5))),
    ):
        for dtype in (None, torch.bfloat16):
            path = tmp_path / "esm2_file.pt"
            save_fair_esm(checkpoint, path, dtype)
            assert seeded_kind(load_checkpoint(path)) == name
