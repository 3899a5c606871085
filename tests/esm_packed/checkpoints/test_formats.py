"""Every checkpoint format gives the same tensors bit for bit, and reading copies nothing."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import CONFIG, Tensors, fair_file, hub_config, hub_names, without, write_bin_shards
from loading_memory import measured
from safetensors.torch import save_file

from esm_packed.checkpoints import (
    CheckpointError,
    RandomTensors,
    formats,
    load_checkpoint,
    rounded_inv_freq,
    save_fair_esm,
    tensor_shapes,
)
from esm_packed.config import ESM2Config

pytestmark = pytest.mark.usefixtures("no_unexpected_warning")

TOKENS = torch.tensor([[0, 20, 15, 32, 11, 5, 9, 7, 2], [0, 4, 23, 17, 2, 1, 1, 1, 1]])


def assert_same(read: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(read) == [name for name in tensor_shapes(CONFIG) if name in expected]
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


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
    bare: Any = EsmModel.from_pretrained(hub, add_pooling_layer=True)
    bare.save_pretrained(tmp_path / "trunk")
    checkpoint = load_checkpoint(tmp_path / "trunk")
    assert_same(checkpoint.tensors, trunk)
    assert sorted(checkpoint.unused) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert torch.equal(checkpoint.unused["pooler.dense.weight"], bare.pooler.dense.weight)
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


def _as_index(directory: Path, stored: Tensors) -> Path:
    return write_bin_shards(directory, stored) / "pytorch_model.bin.index.json"


@pytest.mark.parametrize(
    "write",
    [_as_safetensors, _as_safetensors_file, _as_bin, _as_old_bin, write_bin_shards, _as_index],
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
    checkpoint = load_checkpoint(write_bin_shards(tmp_path, hub_names(tensors)))
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
    with pytest.raises(CheckpointError, match=r"named esm2\*\.pt"):
        save_fair_esm((CONFIG, tensors), tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_fair_esm((CONFIG, tensors), tmp_path / "missing" / "esm2_tiny.pt")


def test_saving_over_the_file_it_reads_from(tmp_path: Path, tensors: Tensors) -> None:
    path = fair_file(tmp_path / "esm2_tiny.pt", tensors)
    save_fair_esm(load_checkpoint(path), path)
    assert_same(load_checkpoint(path).tensors, without(tensors, "contact_head"))


@pytest.mark.skipif(not formats.DEMO_FILE.exists(), reason="the demo model is not built yet")
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


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_no_memory_is_no_damage(tmp_path: Path) -> None:
    random = dict(RandomTensors(ESM2Config(6, 480, 10)))
    files = [tmp_path / name for name in ("x.pt", "old.pt", "x.safetensors")]
    torch.save(random, files[0])
    torch.save(random, files[1], _use_new_zipfile_serialization=False)
    save_file(random, files[2])
    assert measured("in_20_megabytes", *files) == [
        f"{file} does not fit into the memory that this process may use" for file in files
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_reading_copies_nothing(tmp_path: Path) -> None:
    config = ESM2Config(6, 520, 10)
    random = dict(RandomTensors(config))
    files = [tmp_path / "esm2_large.pt", tmp_path / "large.safetensors", tmp_path / "large.bin"]
    save_fair_esm((config, random), files[0])
    save_file(random, files[1])
    torch.save(random, files[2])
    totals = set()
    for path, line in zip(files, measured("of_reading", *files), strict=True):
        size = path.stat().st_size
        assert size > 70e6
        anonymous, file_backed, total = line.split()
        assert int(anonymous) < 0.1 * size, f"{path.name}: {anonymous} bytes of anonymous memory"
        assert int(file_backed) > 0.8 * size, "the whole file was read"
        totals.add(round(float(total), 2))
    assert len(totals) == 1
