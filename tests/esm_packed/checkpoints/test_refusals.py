"""Files that are damaged or not an ESM-2 are refused by name, without running code or filling the memory."""

from __future__ import annotations

import os
import pickle
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Tensors, fair_file, hub_config, hub_names, without, write_bin_shards
from loading_memory import measured
from safetensors.torch import save_file

from esm_packed.checkpoints import (
    CheckpointError,
    load_checkpoint,
)

pytestmark = pytest.mark.usefixtures("no_unexpected_warning")


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
        ({"quantization_config": {"load_in_8bit": True}}, "quantized"),
        ({"num_attention_heads": "absent"}, "num_attention_heads must be a positive integer"),
        ({"num_attention_heads": 7}, "must be a multiple"),
        ({"num_attention_heads": 1}, r"inv_freq has shape \(8,\).* is \(24,\)"),
        ({"num_hidden_layers": 3}, "lacks tensors.*layers.2.self_attn.q_proj.weight.* and 12 more"),
        ({"num_hidden_layers": 1}, r"has tensors that no .*: esm\.encoder\.layer\.1\..* and 12 more"),
        ({"num_hidden_layers": 10**9}, "has 42 tensors, too few for the 1000000000 layers"),
        ({"num_hidden_layers": 10**18}, "has 42 tensors, too few"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
        ({"hidden_size": 48.0}, r"hidden_size must be a positive integer, got 48\.0"),
        ({"token_dropout": "false"}, "token_dropout must be true or false, got 'false'"),
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
    with pytest.raises(CheckpointError, match=r"config\.json .*is not a file"):
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
            r"layers\.1\.fc1\.weight is stored as torch\.int8.*quantized",
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
        ({"cfg": {"model": 3}, "model": {}}, "must be a Namespace, got int"),
        (
            {"cfg": {"model": Namespace(encoder_layers="six")}, "model": {}},
            "encoder_layers must be a positive",
        ),
        ({"state": torch.ones(1), "epoch": 3}, "'epoch' is int, not a tensor"),
        ([torch.ones(1)], "contains list"),
        ({}, "contains dict"),
        ({"weight": torch.ones(1)}, "not an ESM-2.* has weight"),
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
    message, grown = measured("of_refusal", path)
    assert "bomb.pt is a compressed archive" in message
    assert int(grown) < 64 << 20, f"{grown} bytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.zeros(1).expand(t.shape), r"has shape \(192, 48\) and only 4 bytes"),
        (lambda t: t.to("meta"), "not a plain tensor .*on meta"),
        (lambda t: t.to_sparse(), r"not a plain tensor \(torch\.sparse_coo"),
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


def test_an_adapter_is_to_be_merged_first(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*merge_and_unload\(\)\.save_pretrained"):
        load_checkpoint(tmp_path)
    # Beside a complete model it would be left out without a word.
    save_file(hub_names(tensors), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(hub_config())
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        load_checkpoint(tmp_path)


def test_incomplete_directories(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match="contains no weights"):
        load_checkpoint(tmp_path)
    write_bin_shards(tmp_path, hub_names(tensors))
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
