"""Checkpoint files of a small model, written without the code under test."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch

from esm_packed.config import ESM2Config

CONFIG = ESM2Config(num_layers=2, hidden_size=48, num_heads=3)

Tensors = dict[str, torch.Tensor]


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


def without(tensors: Mapping[str, torch.Tensor], *parts: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def write_bin_shards(directory: Path, stored: Tensors) -> Path:
    weight_map: dict[str, str] = {}
    for number in range(3):
        shard = {name: stored[name] for name in list(stored)[number::3]}
        weight_map |= dict.fromkeys(shard, f"pytorch_model-{number}.bin")
        torch.save(shard, directory / f"pytorch_model-{number}.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
