"""Which checkpoint tensors each parameter of the model is made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_CHECKPOINT_NAMES = {
    "embedding.": ("embed_tokens.",),
    ".attention_norm.": (".self_attn_layer_norm.",),
    ".qkv.": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
    ".attention_out.": (".self_attn.out_proj.",),
    ".ffn_norm.": (".final_layer_norm.",),
    "lm_head.norm.": ("lm_head.layer_norm.",),
    "final_norm.": ("emb_layer_norm_after.",),
    "contact_head.": ("contact_head.regression.",),
}
"""Part of a parameter's name here to what fair-esm calls it; several are laid one below the other."""


def fill_parameter(parameter: torch.Tensor, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy into `parameter` the checkpoint tensors it is made of.

    Args:
        parameter: of the model, modified.
        name: what `ESM2.named_parameters` calls it.
        tensors: fair-esm's names to tensors, as `weights.Checkpoint` holds them.

    Raises:
        KeyError: the checkpoint lacks a tensor.
    """
    sources = [name]
    for ours, theirs in _CHECKPOINT_NAMES.items():
        if ours in name:
            sources = [name.replace(ours, their) for their in theirs]
            break
    for part, source in zip(parameter.chunk(len(sources)), sources, strict=True):
        part.copy_(tensors[source])
