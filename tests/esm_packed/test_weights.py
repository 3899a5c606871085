"""Every checkpoint format gives the same tensors bit for bit, and what is no ESM-2 is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from esm_packed import weights
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.weights import (
    CheckpointError,
    RandomTensors,
    load_checkpoint,
    rounded_inv_freq,
    save_fair_esm,
    tensor_shapes,
)

CONFIG = ESM2Config(num_layers=2, hidden_size=48, num_heads=3)
TOKENS = torch.tensor([[0, 20, 15, 32, 11, 5, 9, 7, 2], [0, 4, 23, 17, 2, 1, 1, 1, 1]])

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _no_unexpected_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return dict(RandomTensors(CONFIG, seed=5))


def hub_names(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The names of the files on the Hugging Face hub, written out here a second time, by other means."""
    renamed = {"esm.embeddings.position_ids": torch.arange(1026)[None]}
    renamed["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, CONFIG.hidden_size)
    for name, tensor in tensors.items():
        for ours, theirs in (
            ("embed_tokens.", "esm.embeddings.word_embeddings."),
            ("emb_layer_norm_after.", "esm.encoder.emb_layer_norm_after."),
            ("contact_head.", "esm.contact_head."),
            ("layers.", "esm.encoder.layer."),
            ("self_attn.q_proj.", "attention.self.query."),
            ("self_attn.k_proj.", "attention.self.key."),
            ("self_attn.v_proj.", "attention.self.value."),
            ("self_attn.out_proj.", "attention.output.dense."),
            ("self_attn.rot_emb.", "attention.self.rotary_embeddings."),
            ("self_attn_layer_norm.", "attention.LayerNorm."),
            ("fc1.", "intermediate.dense."),
            ("fc2.", "output.dense."),
            ("final_layer_norm.", "LayerNorm."),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def hub_config(**changes: object) -> str:
    """config.json as on the hub."""
    config = {
        "architectures": ["EsmForMaskedLM"],
        "emb_layer_norm_before": False,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.ffn_size,
        "layer_norm_eps": 1e-05,
        "mask_token_id": 32,
        "max_position_embeddings": 1026,
        "model_type": "esm",
        "num_attention_heads": CONFIG.num_heads,
        "num_hidden_layers": CONFIG.num_layers,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "vocab_size": 33,
    }
    config |= changes
    return json.dumps({key: value for key, value in config.items() if value != "absent"})


def fair_file(path: Path, tensors: Mapping[str, torch.Tensor], **cfg: object) -> Path:
    """fair-esm's layout, written without the code under test."""
    settings = {
        "encoder_layers": CONFIG.num_layers,
        "encoder_embed_dim": CONFIG.hidden_size,
        "encoder_attention_heads": CONFIG.num_heads,
        "token_dropout": True,
    }
    trunk = {
        ("encoder." if name.startswith("lm_head") else "encoder.sentence_encoder.") + name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("contact_head")
    }
    if "embed_tokens.weight" in tensors:
        trunk.setdefault("encoder.lm_head.weight", tensors["embed_tokens.weight"])
    torch.save({"cfg": {"model": Namespace(**(settings | cfg))}, "model": trunk}, path)
    return path


def assert_same(read: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(read) == [name for name in tensor_shapes(CONFIG) if name in expected]
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


def without(tensors: Mapping[str, torch.Tensor], *parts: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def load_in_fair_esm(path: Path) -> Any:
    import esm

    with torch.serialization.safe_globals([Namespace]):
        model, _ = esm.pretrained.load_model_and_alphabet_local(path)
    return model.eval()


# Round trips


def test_our_fair_esm_file_gives_the_tensors_back(tmp_path: Path, tensors: Tensors) -> None:
    path = tmp_path / "esm2_tiny.pt"
    save_fair_esm((CONFIG, tensors), path)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint.tensors, tensors)
    assert (checkpoint.model_name, checkpoint.config) == ("esm2_tiny", CONFIG)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(path) in checkpoint.source
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "esm2_tiny-contact-regression.pt",
        "esm2_tiny.pt",
    ]

    again = tmp_path / "esm2_again.pt"
    save_fair_esm(checkpoint, again)
    assert again.read_bytes() == path.read_bytes()
    assert path.stat().st_size < 1.2 * 4 * sum(tensor.numel() for tensor in tensors.values())


def test_fair_esm_and_transformers_and_we_agree_on_the_weights(tmp_path: Path, tensors: Tensors) -> None:
    from transformers import EsmConfig, EsmForMaskedLM, EsmModel

    path = tmp_path / "esm2_tiny.pt"
    save_fair_esm((CONFIG, tensors), path)
    fair = load_in_fair_esm(path)
    fair_state = fair.state_dict()
    assert torch.equal(fair_state.pop("lm_head.weight"), tensors["embed_tokens.weight"])
    assert_same({name: fair_state[name] for name in tensors}, tensors)
    assert fair_state.keys() == tensors.keys()

    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(hub_config())
    save_file(hub_names(tensors), hub / "model.safetensors", metadata={"format": "pt"})
    peer: Any = EsmForMaskedLM.from_pretrained(hub)  # in evaluation mode
    with torch.no_grad():
        expected = fair(TOKENS)["logits"]
        logits = peer(TOKENS, attention_mask=TOKENS != 1).logits
    real = TOKENS != 1
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)

    # What transformers 5 itself saves, as it is, in shards, and from its bare trunk.
    peer.save_pretrained(tmp_path / "saved")
    assert_same(load_checkpoint(tmp_path / "saved").tensors, tensors)
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same(load_checkpoint(tmp_path / "sharded").tensors, tensors)
    trunk = without(tensors, "lm_head")
    EsmModel.from_pretrained(hub, add_pooling_layer=True).save_pretrained(tmp_path / "trunk")
    checkpoint = load_checkpoint(tmp_path / "trunk")
    assert_same(checkpoint.tensors, trunk)
    assert (checkpoint.model_name, checkpoint.config) == ("trunk", CONFIG)
    with pytest.raises(CheckpointError, match="language-model head"):
        save_fair_esm(checkpoint, tmp_path / "esm2_trunk.pt")

    # A model made by transformers has unrounded frequencies: they are its own, and stay.
    fresh: Any = EsmForMaskedLM(EsmConfig(**json.loads(hub_config())))
    fresh.save_pretrained(tmp_path / "fresh")
    inv_freq = load_checkpoint(tmp_path / "fresh").tensors["layers.1.self_attn.rot_emb.inv_freq"]
    assert torch.equal(inv_freq, fresh.esm.rotary_embeddings.inv_freq)
    assert not torch.equal(inv_freq, rounded_inv_freq(CONFIG.head_dim))


def _as_safetensors(directory: Path, stored: Tensors) -> Path:
    save_file(stored, directory / "model.safetensors")
    return directory


def _as_safetensors_file(directory: Path, stored: Tensors) -> Path:
    return _as_safetensors(directory, stored) / "model.safetensors"


def _as_bin(directory: Path, stored: Tensors) -> Path:
    torch.save(stored, directory / "pytorch_model.bin")
    return directory


def _as_old_bin(directory: Path, stored: Tensors) -> Path:
    torch.save(stored, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return directory


def _as_bin_shards(directory: Path, stored: Tensors) -> Path:
    weight_map: dict[str, str] = {}
    for number in range(3):
        shard = {name: stored[name] for name in list(stored)[number::3]}
        weight_map |= dict.fromkeys(shard, f"pytorch_model-{number}.bin")
        torch.save(shard, directory / f"pytorch_model-{number}.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _as_index(directory: Path, stored: Tensors) -> Path:
    return _as_bin_shards(directory, stored) / "pytorch_model.bin.index.json"


@pytest.mark.parametrize(
    "write",
    [_as_safetensors, _as_safetensors_file, _as_bin, _as_old_bin, _as_bin_shards, _as_index],
)
def test_hub_layouts(tmp_path: Path, tensors: Tensors, write: Callable[[Path, Tensors], Path]) -> None:
    stored = hub_names(tensors)
    stored["lm_head.decoder.weight"] = tensors["embed_tokens.weight"].clone()
    stored["lm_head.decoder.bias"] = tensors["lm_head.bias"].clone()
    stored["classifier.weight"] = torch.ones(2, CONFIG.hidden_size)
    (tmp_path / "config.json").write_text(hub_config(token_dropout=False))
    path = write(tmp_path, stored)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint.tensors, tensors)
    assert checkpoint.config == ESM2Config(2, 48, 3, token_dropout=False)


def test_hash_of_shards(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "config.json").write_text(hub_config())
    checkpoint = load_checkpoint(_as_bin_shards(tmp_path, hub_names(tensors)))
    hashes = [
        f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        for file in sorted(tmp_path.glob("*.bin"))
    ]
    assert checkpoint.sha256 == hashlib.sha256("".join(hashes).encode()).hexdigest()


@pytest.mark.parametrize("zipped", [True, False])
def test_fair_esm_file(tmp_path: Path, tensors: Tensors, zipped: bool) -> None:
    path = fair_file(tmp_path / "esm2_tiny.pt", tensors, token_dropout=False, unrelated=[1, "two"])
    if not zipped:
        data = torch.load(path, weights_only=False)
        torch.save(data, path, _use_new_zipfile_serialization=False)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint.tensors, without(tensors, "contact_head"))
    assert checkpoint.config == ESM2Config(2, 48, 3, token_dropout=False)

    regression = {name: tensor for name, tensor in tensors.items() if "contact_head" in name}
    torch.save({"model": regression}, tmp_path / "esm2_tiny-contact-regression.pt")
    assert_same(load_checkpoint(path).tensors, tensors)


def test_stored_dtypes_are_kept(tmp_path: Path, tensors: Tensors) -> None:
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    assert_same(
        load_checkpoint(fair_file(tmp_path / "h.pt", halves)).tensors, without(halves, "contact_head")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saving_in_another_dtype(tmp_path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    path = tmp_path / "esm2_tiny.pt"
    save_fair_esm((CONFIG, tensors), path, dtype)
    for name, tensor in load_checkpoint(path).tensors.items():
        if name.endswith("inv_freq"):
            assert torch.equal(tensor.float(), tensors[name])
        else:
            assert tensor.dtype == dtype and torch.equal(tensor, tensors[name].to(dtype))
    load_in_fair_esm(path)(TOKENS)


def test_saving_writes_no_more_than_the_tensor(tmp_path: Path, tensors: Tensors) -> None:
    whole = torch.cat([tensors["layers.0.fc1.weight"]] * 100)
    views = tensors | {"layers.0.fc1.weight": whole[: CONFIG.ffn_size]}
    save_fair_esm((CONFIG, views), tmp_path / "esm2_view.pt")
    save_fair_esm((CONFIG, tensors), tmp_path / "esm2_tiny.pt")
    assert (tmp_path / "esm2_view.pt").read_bytes() == (tmp_path / "esm2_tiny.pt").read_bytes()


def test_saving_where_fair_esm_or_the_disk_says_no(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match=r"named esm2\.\.\.\.pt"):
        save_fair_esm((CONFIG, tensors), tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_fair_esm((CONFIG, tensors), tmp_path / "missing" / "esm2_tiny.pt")


def test_saving_over_the_file_it_reads_from(tmp_path: Path, tensors: Tensors) -> None:
    path = fair_file(tmp_path / "esm2_tiny.pt", tensors)
    save_fair_esm(load_checkpoint(path), path)
    assert_same(load_checkpoint(path).tensors, without(tensors, "contact_head"))


@pytest.mark.skipif(not weights.DEMO_FILE.exists(), reason="the demo model is not built yet")
def test_demo() -> None:
    checkpoint = load_checkpoint("demo")
    assert checkpoint.model_name == "demo"
    assert checkpoint.tensors.keys() == tensor_shapes(checkpoint.config).keys()
    with pytest.raises(CheckpointError, match="neither a file nor a directory"):
        load_checkpoint("./demo")


# What a file does not say itself


def test_head_count_of_bare_tensors(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors, tmp_path / "bare.safetensors")
    assert load_checkpoint(tmp_path / "bare.safetensors").config == CONFIG
    torch.save(tensors, tmp_path / "bare.pt")
    assert load_checkpoint(tmp_path / "bare.pt").config == CONFIG

    save_file(without(tensors, "inv_freq"), tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="how many attention heads"):
        load_checkpoint(tmp_path / "bare.safetensors")

    known = without(RandomTensors(ESM2Config(1, 320, 20)), "inv_freq", "contact_head")
    save_file(known, tmp_path / "known.safetensors")
    with pytest.warns(UserWarning, match="no rotary frequencies"):
        assert load_checkpoint(tmp_path / "known.safetensors").config == ESM2Config(1, 320, 20)


def test_config_json_of_another_model_beside_a_single_file_is_not_its_own(
    tmp_path: Path, tensors: Tensors
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file(tensors, tmp_path / "bare.safetensors")
    assert load_checkpoint(tmp_path / "bare.safetensors").config == CONFIG


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
def test_rounded_inv_freq_is_fair_esms_formula_in_fp16(head_dim: int) -> None:
    from esm.rotary_embedding import RotaryEmbedding

    formula = RotaryEmbedding(head_dim).inv_freq
    rounded = rounded_inv_freq(head_dim)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, formula.half().float()) and not torch.equal(rounded, formula)


def test_lost_frequencies_are_replaced_with_a_warning(tmp_path: Path, tensors: Tensors) -> None:
    expected = without(tensors, "contact_head")
    with pytest.warns(UserWarning, match="has no rotary frequencies"):
        checkpoint = load_checkpoint(fair_file(tmp_path / "a.pt", without(tensors, "inv_freq")))
    assert_same(checkpoint.tensors, expected)

    in_bf16 = {name: tensor.bfloat16() if "inv_freq" in name else tensor for name, tensor in tensors.items()}
    with pytest.warns(UserWarning, match="BF16"):
        checkpoint = load_checkpoint(fair_file(tmp_path / "b.pt", in_bf16))
    assert_same(checkpoint.tensors, expected)


def test_own_frequencies_stay(tmp_path: Path, tensors: Tensors) -> None:
    own = {name: tensor * 1.5 if "inv_freq" in name else tensor for name, tensor in tensors.items()}
    assert_same(load_checkpoint(fair_file(tmp_path / "a.pt", own)).tensors, without(own, "contact_head"))

    own["layers.1.self_attn.rot_emb.inv_freq"] = tensors["layers.1.self_attn.rot_emb.inv_freq"]
    with pytest.raises(CheckpointError, match="different rotary frequencies"):
        load_checkpoint(fair_file(tmp_path / "a.pt", own))


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": "absent"}, "model_type is None"),
        ({"position_embedding_type": "absolute"}, "learned positions"),
        ({"position_embedding_type": "absent"}, "learned positions"),
        ({"emb_layer_norm_before": True}, "ESM-1b"),
        ({"vocab_size": 64}, "vocab_size is 64"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12"),
        ({"layer_norm_eps": "absent"}, "layer_norm_eps is 1e-12"),
        ({"is_decoder": True}, "causal"),
        ({"is_folding_model": True}, "ESMFold"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantised"),
        ({"num_attention_heads": "absent"}, "num_attention_heads should be a positive number"),
        ({"num_attention_heads": 7}, "must be a multiple"),
        ({"num_attention_heads": 1}, r"inv_freq has shape \(8,\).* is \(24,\)"),
        ({"num_hidden_layers": 3}, "lacks tensors.*layers.2.self_attn.q_proj.weight.* and 12 more"),
        ({"num_hidden_layers": 1}, r"has tensors that no .*: esm\.encoder\.layer\.1\..* and 12 more"),
        ({"num_hidden_layers": 10**9}, "has 42 tensors, too few for the 1000000000 layers"),
        ({"num_hidden_layers": 10**18}, "has 42 tensors, too few"),
        ({"num_hidden_layers": True}, "num_hidden_layers should be a positive number, it is True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers should be a positive number, it is '2'"),
        ({"hidden_size": 48.0}, r"hidden_size should be a positive number, it is 48\.0"),
        ({"token_dropout": "false"}, "token_dropout should be true or false, it is 'false'"),
        ({"hidden_size": 96}, r"esm.embeddings.word_embeddings.weight has shape \(33, 48\).* is \(33, 96\)"),
    ],
)
def test_config_json_that_is_not_esm2(
    tmp_path: Path, tensors: Tensors, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(hub_config(**changes))
    save_file(without(hub_names(tensors), "contact_head"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [10**9, 10**18])
def test_sizes_without_tensors_cost_no_time(tmp_path: Path, tensors: Tensors, size: int) -> None:
    """Frequencies are made, and layers gone through, only once the tensors bear their number out."""
    bare = without(hub_names(tensors), "contact_head", "inv_freq")
    save_file(bare, tmp_path / "model.safetensors")
    begin = time.process_time()
    for changes in ({"num_hidden_layers": size}, {"hidden_size": size, "num_attention_heads": 1}):
        (tmp_path / "config.json").write_text(hub_config(**changes))
        with pytest.raises(CheckpointError, match=rf"{size}(-wide| layers)"):
            load_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    save_file(tensors | {f"layers.{size - 1}.x": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"too few|has tensors that no"):
        load_checkpoint(tmp_path / "bare.safetensors")
    assert time.process_time() - begin < 1.0


def test_layer_numbers_beyond_all_bounds(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors | {f"layers.{'9' * 5000}.x": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"has tensors that no .*: layers\.9999"):
        load_checkpoint(tmp_path / "bare.safetensors")


def test_frequencies_shared_by_all_layers_must_fit(tmp_path: Path, tensors: Tensors) -> None:
    """As transformers 5 saves them: one tensor for all layers."""
    stored = without(hub_names(tensors), "contact_head", "inv_freq")
    stored["esm.rotary_embeddings.inv_freq"] = torch.ones(5)
    (tmp_path / "config.json").write_text(hub_config())
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"inv_freq has shape \(5,\), in .* it is \(8,\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
)
def test_json_nested_beyond_all_bounds(tmp_path: Path, tensors: Tensors, name: str) -> None:
    (tmp_path / "config.json").write_text(hub_config())
    if name == "config.json":
        save_file(hub_names(tensors), tmp_path / "model.safetensors")
    (tmp_path / name).write_text("[" * 100_000)
    paths = [tmp_path, tmp_path / name] if "index" in name else [tmp_path]
    for path in paths:
        with pytest.raises(CheckpointError, match=f"{name}.*nested too deeply"):
            load_checkpoint(path)
    if name == "config.json":  # beside a single file it may be another model's
        with pytest.raises(CheckpointError, match="how many attention heads"):
            save_file(without(tensors, "inv_freq"), tmp_path / "bare.safetensors")
            load_checkpoint(tmp_path / "bare.safetensors")


def test_a_pipe_is_no_checkpoint(tmp_path: Path, tensors: Tensors) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(tmp_path / "esm2_x.pt")
    with pytest.raises(CheckpointError, match="neither a file nor a directory"):
        load_checkpoint(tmp_path / "esm2_x.pt")
    save_file(hub_names(tensors), tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json .*is no file"):
        load_checkpoint(tmp_path)


def test_another_rope_base_needs_its_frequencies(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "config.json").write_text(hub_config(rope_theta=500.0))
    save_file(without(hub_names(tensors), "inv_freq"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="rope_theta"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.fc1.bias"), r"lacks tensors .*: layers\.1\.fc1\.bias$"),
        (lambda t: t.pop("lm_head.dense.bias"), r"lacks tensors .*: lm_head\.dense\.bias$"),
        (
            lambda t: t.pop("contact_head.regression.bias"),
            r"lacks tensors .*: contact_head\.regression\.bias$",
        ),
        (lambda t: t.pop("layers.1.self_attn.rot_emb.inv_freq"), r"lacks tensors .*inv_freq$"),
        (lambda t: t.pop("embed_tokens.weight"), "no embedding table"),
        (lambda t: t.update({"adapter.weight": torch.ones(2)}), "has tensors that no .*: adapter.weight"),
        (lambda t: t.update({"layers.0.extra": torch.ones(2)}), r"has tensors that no .*: layers\.0\.extra"),
        (
            lambda t: t.update({"layers.1.fc2.bias": torch.ones(47)}),
            r"layers\.1\.fc2\.bias has shape \(47,\)",
        ),
        (lambda t: t.update({"embed_tokens.weight": torch.ones(64, 48)}), "64 tokens"),
        (
            lambda t: t.update({"layers.1.fc1.weight": torch.ones(192, 48, dtype=torch.int8)}),
            r"layers\.1\.fc1\.weight is stored as torch\.int8.*quantised",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["embed_tokens.weight"] + 1}),
            "lm_head.weight is not the embedding table",
        ),
        (
            lambda t: t.update({"lm_head.decoder.bias": t["lm_head.bias"] + 1}),
            "lm_head.bias and lm_head.decoder.bias are the same tensor but differ",
        ),
        (
            lambda t: t.update({"emb_layer_norm_before.weight": torch.ones(48)}),
            "ESM-1b",
        ),
        (
            lambda t: (
                [t.update({"embed_positions.weight": torch.ones(1026, 48)})]
                + [t.pop(f"layers.{layer}.self_attn.rot_emb.inv_freq") for layer in (0, 1)]
            ),
            "ESM-1b or ESM-1v",
        ),
    ],
)
def test_tensors_that_are_not_esm2(
    tmp_path: Path, tensors: Tensors, change: Callable[[Tensors], object], message: str
) -> None:
    changed = dict(tensors)
    change(changed)
    save_file(changed, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "bare.safetensors")
    assert "bare.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": Namespace(arch="roberta_large"), "model": {}}, "ESM-1"),
        ({"cfg": {"model": 3}, "model": {}}, "should be a Namespace, it is int"),
        (
            {"cfg": {"model": Namespace(encoder_layers="six")}, "model": {}},
            "encoder_layers should be a positive",
        ),
        ({"state": torch.ones(1), "epoch": 3}, "'epoch' is int, not a tensor"),
        ([torch.ones(1)], "holds list"),
        ({}, "holds dict"),
        ({"weight": torch.ones(1)}, "no ESM-2.* has weight"),
    ],
)
def test_pickles_that_are_not_esm2(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "esm2_x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "esm2_x.pt")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("compressed", ["", "data.pkl", "data/0"])
def test_a_compressed_archive_is_no_garbage(
    tmp_path: Path, tensors: Tensors, compression: int, compressed: str
) -> None:
    """Its bytes are mapped as they are; the last tensor is longer than what compression saves."""
    stored = without(tensors, "lm_head", "contact_head") | {"classifier.weight": torch.rand(10_000)}
    stored["layers.0.fc1.weight"] = torch.zeros_like(tensors["layers.0.fc1.weight"])
    torch.save(stored, tmp_path / "plain.pt")
    path = tmp_path / "esm2_x.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w") as archive:
        for entry in plain.infolist():
            how = compression if entry.filename.endswith(compressed) else zipfile.ZIP_STORED
            archive.writestr(entry.filename, plain.read(entry), how)
    with pytest.raises(CheckpointError, match=r"esm2_x\.pt is a compressed archive.*torch\.save"):
        load_checkpoint(path)


def test_an_archive_that_expands_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/version", "3")
        with archive.open("bomb/data.pkl", "w") as entry:
            for _ in range(256):
                entry.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    run = subprocess.run(
        [sys.executable, "-c", _PEAK_SCRIPT, path], capture_output=True, text=True, check=True
    )
    message, grown = run.stdout.splitlines()
    assert "bomb.pt is a compressed archive" in message
    assert int(grown) < 64 << 10, f"{grown} KiB"


_PEAK_SCRIPT = """
import resource, sys
from esm_packed.weights import CheckpointError, load_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_checkpoint(sys.argv[1])
except CheckpointError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.zeros(1).expand(t.shape), r"has shape \(192, 48\) and only 4 bytes"),
        (lambda t: t.to("meta"), "no plain tensor .*on meta"),
        (lambda t: t.to_sparse(), r"no plain tensor \(torch\.sparse_coo"),
    ],
)
@pytest.mark.parametrize("name", ["layers.0.fc1.weight", "classifier.weight", "lm_head.weight"])
def test_tensors_whose_values_are_not_in_the_file(
    tmp_path: Path, tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor], message: str, name: str
) -> None:
    torch.save(tensors | {name: change(tensors["layers.0.fc1.weight"])}, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match=rf"bare\.pt: {name} .*{message}"):
        load_checkpoint(tmp_path / "bare.pt")


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["weights", "settings", "whole", "regression"])
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_no_code_from_a_pickle_runs(tmp_path: Path, tensors: Tensors, place: str, form: str) -> None:
    marker = tmp_path / "code was run"
    marker_name = tmp_path / "code_was_run"
    evil = _Malicious(marker_name)
    path = fair_file(tmp_path / "esm2_x.pt", tensors)
    content: Any = torch.load(path, weights_only=False)
    if place == "weights":
        content["model"]["encoder.sentence_encoder.layers.0.fc1.bias"] = evil
    elif place == "settings":
        content["cfg"]["model"].note = evil
    elif place == "whole":
        content = evil
    else:
        content, path = (
            {"model": {"contact_head.regression.bias": evil}},
            tmp_path / "esm2_x-contact-regression.pt",
        )
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(tmp_path / "esm2_x.pt")
    assert not marker.exists() and not marker_name.exists()

    # The trap does spring for a loader that lets it.
    if form != "plain":
        torch.load(path, weights_only=False)
        assert marker_name.exists()


@pytest.mark.parametrize("allowed_before", [[], [Namespace]])
def test_loading_leaves_torchs_allow_list_alone(
    tmp_path: Path, tensors: Tensors, allowed_before: list[Any]
) -> None:
    with torch.serialization.safe_globals(allowed_before):
        before = set(torch.serialization.get_safe_globals())
        load_checkpoint(fair_file(tmp_path / "esm2_x.pt", tensors))
        assert set(torch.serialization.get_safe_globals()) == before
        assert (Namespace in before) == bool(allowed_before)


def test_a_pickled_module_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        load_checkpoint(tmp_path / "module.pt")


@pytest.mark.parametrize("kind", ["fair", "old", "safetensors"])
def test_files_cut_short(tmp_path: Path, tensors: Tensors, kind: str) -> None:
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(tensors, path)
    else:
        path = fair_file(tmp_path / "x.pt", tensors)
        if kind == "old":
            torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in (0, 1, 4, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="x"):
            load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin", "x"])
def test_files_of_another_kind(tmp_path: Path, name: str) -> None:
    for content in (b"", b">protein\nMKV\n", b"<html>not found</html>", bytes(range(256)) * 20):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)


def test_incomplete_directories(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(tmp_path)
    _as_bin_shards(tmp_path, hub_names(tensors))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(hub_config())
    load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../outside.bin"}}')
    with pytest.raises(CheckpointError, match="outside"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        load_checkpoint(tmp_path)


def test_not_found_says_what_was_perhaps_meant(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean esm2_t33_650M_UR50D"):
        load_checkpoint("esm2_t33_650M")
    with pytest.raises(CheckpointError, match=r"did you mean .*esm2_t6_8M_UR50D"):
        load_checkpoint("facebook/esm2_t6_8M_UR50S")
    (tmp_path / "esm2_mine.pt").touch()
    with pytest.raises(CheckpointError, match=r"did you mean .*esm2_mine\.pt"):
        load_checkpoint(tmp_path / "esm2_mime.pt")
    with pytest.raises(CheckpointError, match="the models are esm2_t6_8M"):
        load_checkpoint("zzz")
    for name in ("~nouser/x", "x\0y"):
        with pytest.raises(CheckpointError, match="neither a file nor a directory"):
            load_checkpoint(name)
    for name in ("x" * 5000, "x/" * 2500):
        with pytest.raises(CheckpointError, match=r"^[x/]{200}\.\.\.: File name too long$"):
            load_checkpoint(name)
    for name in ("random:esm2", "random:", "random:esm2_t6_8M_UR50D@x", "random:esm2_t6_8M_UR50D@-1"):
        with pytest.raises(CheckpointError, match="random:NAME@SEED"):
            load_checkpoint(name)


# Random weights


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


# Memory

_MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
import torch
from esm_packed.weights import load_checkpoint

def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.ones(10).sum()
for path in sys.argv[1:]:
    anonymous, file_backed, peak = kilobytes("RssAnon"), kilobytes("RssFile"), 0
    checkpoint = load_checkpoint(path)
    total = 0.0
    for tensor in checkpoint.tensors.values():
        total += tensor.sum().item()
        peak = max(peak, kilobytes("RssAnon") - anonymous)
    print(peak, kilobytes("RssFile") - file_backed, total)
    del checkpoint, tensor
"""


_LIMITED_SCRIPT = """
import re, resource, sys
from pathlib import Path
from esm_packed.weights import CheckpointError, load_checkpoint

load_checkpoint("demo")
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 20_000_000, resource.RLIM_INFINITY))
for path in sys.argv[1:]:
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_no_memory_is_no_damage(tmp_path: Path) -> None:
    random = dict(RandomTensors(ESM2Config(6, 480, 10)))
    files = [tmp_path / name for name in ("x.pt", "old.pt", "x.safetensors")]
    torch.save(random, files[0])
    torch.save(random, files[1], _use_new_zipfile_serialization=False)
    save_file(random, files[2])
    run = subprocess.run(
        [sys.executable, "-c", _LIMITED_SCRIPT, *files], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [
        f"{file} does not fit into the memory that this process may use" for file in files
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_reading_copies_nothing(tmp_path: Path) -> None:
    config = ESM2Config(6, 820, 10)
    random = dict(RandomTensors(config))
    files = [tmp_path / "esm2_large.pt", tmp_path / "large.safetensors", tmp_path / "large.bin"]
    save_fair_esm((config, random), files[0])
    save_file(random, files[1])
    torch.save(random, files[2])
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY_SCRIPT, *files], capture_output=True, text=True, check=True
    )
    totals = set()
    for path, line in zip(files, run.stdout.splitlines(), strict=True):
        size = path.stat().st_size / 1024
        assert size > 180_000
        anonymous, file_backed, total = line.split()
        assert int(anonymous) < 0.1 * size, f"{path.name}: {anonymous} KiB of anonymous memory"
        assert int(file_backed) > 0.8 * size, "the whole file was read"
        totals.add(round(float(total), 2))
    assert len(totals) == 1
