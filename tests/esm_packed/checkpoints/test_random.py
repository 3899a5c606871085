"""Random weights depend on their seed alone and make activations like a trained model's."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import CONFIG, Tensors

from esm_packed.checkpoints import (
    RandomTensors,
    load_checkpoint,
    tensor_shapes,
)
from esm_packed.config import ESM2_MODELS, ESM2Config

pytestmark = pytest.mark.usefixtures("no_unexpected_warning")


def test_random_checkpoints_are_named_by_their_recipe() -> None:
    first = load_checkpoint("random:esm2_t6_8M_UR50D")
    assert first.model_name == "random:esm2_t6_8M_UR50D"
    assert first.config == ESM2_MODELS["esm2_t6_8M_UR50D"]
    assert {name: tuple(first.tensors[name].shape) for name in first.tensors} == tensor_shapes(first.config)
    same = load_checkpoint("random:facebook/esm2_t6_8M_UR50D@0")
    assert (same.model_name, same.sha256) == (first.model_name, first.sha256)
    other = load_checkpoint("random:esm2_t6_8M_UR50D@1")
    assert other.model_name.endswith("@1") and other.sha256 != first.sha256
    assert not torch.equal(other.tensors["layers.0.fc1.weight"], first.tensors["layers.0.fc1.weight"])


def test_random_tensors_do_not_depend_on_order_or_threads_or_modes(tensors: Tensors) -> None:
    config = ESM2Config(1, 1600, 20)
    name = "layers.0.fc2.weight"  # larger than one block
    expected = RandomTensors(config, 3)[name]
    assert expected.std() > 0 and len(set(expected[0].tolist())) > 1000
    again = RandomTensors(config, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.device("meta"):
            assert again["layers.0.fc1.bias"].device.type == "cpu"
            assert torch.equal(again[name], expected)
    finally:
        torch.set_num_threads(threads)
    for key in reversed(list(tensors)):
        assert torch.equal(RandomTensors(CONFIG, 5)[key], tensors[key])


def test_asking_what_random_tensors_there_are_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomTensors, "__getitem__", None)
    random = RandomTensors(ESM2_MODELS["esm2_t48_15B_UR50D"])
    assert "lm_head.bias" in random and "lm_head.weight" not in random
    assert len(random) == len(list(random)) == 48 * 17 + 10


def test_random_tensors_lose_nothing_in_fp16(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        assert torch.equal(tensor.half().float(), tensor), name
    assert torch.equal(
        tensors["layers.0.self_attn.rot_emb.inv_freq"], tensors["layers.1.self_attn.rot_emb.inv_freq"]
    )


@pytest.mark.parametrize("config", [ESM2_MODELS["esm2_t6_8M_UR50D"], ESM2Config(48, 160, 10)])
def test_random_activations_are_like_a_trained_models(config: ESM2Config) -> None:
    from esm.model.esm2 import ESM2

    model = ESM2(config.num_layers, config.hidden_size, config.num_heads).eval()
    state = dict(RandomTensors(config))
    model.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"]})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 24, (1, 100), generator=generator)
    tokens[0, 0], tokens[0, -1] = 0, 2
    last = config.num_layers
    with torch.no_grad():
        output = model(tokens, repr_layers=[last - 1, last], return_contacts=True)

    residual = output["representations"][last - 1][0]
    per_channel = residual.abs().amax(0).sort(descending=True).values
    assert 10 < residual.square().mean().sqrt() < 40
    assert 150 < per_channel[0] < 600, "an outlier channel"
    assert per_channel[0] > 8 * per_channel.median()
    assert per_channel[2] > 1.3 * per_channel[3], "and two that vary from token to token"
    final = output["representations"][last][0]
    assert 0.2 < final.square().mean().sqrt() < 0.4
    assert final.std(0).median() > 0.04, "tokens differ"
    assert 0.5 < output["logits"].std() < 10
    attention = output["attentions"][0]
    entropy = -(attention * attention.clamp_min(1e-30).log()).sum(-1).mean()
    assert entropy < torch.tensor(100.0).log() - 0.5, "attention is not uniform"
    assert output["contacts"].min() > 0 and output["contacts"].max() < 1
