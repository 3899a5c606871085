"""The operations of ESM-2 on packed tensors; independent of proteins and models.

On a GPU they are Triton kernels, elsewhere plain PyTorch, which `reference` holds and documents.

`kernels/x.py` is imported as `esm_packed.kernels.x`.
"""

from __future__ import annotations

from typing import Any

import torch

from esm_packed.kernels import matmul, reference
from esm_packed.kernels.dispatch import operation
from esm_packed.kernels.matmul import linear

__all__ = [
    "add_attention_maps_",
    "add_layer_norm_",
    "bias_gelu_",
    "embed_tokens",
    "layer_norm",
    "linear",
    "linear_gelu",
    "linear_rotary",
    "packed_attention",
    "rotary_qk_",
    "rotary_qk_packed_",
    "segment_max",
    "segment_mean",
]


def _pooled(a: Any) -> torch.Tensor:
    hidden_states: torch.Tensor = a.hidden_states
    dtype = reference.statistics_dtype(hidden_states.dtype)
    return hidden_states.new_empty(a.cu_seqlens.shape[0] - 1, hidden_states.shape[1], dtype=dtype)


embed_tokens = operation(
    reference.embed_tokens,
    "embedding",
    lambda a: (
        a.weight.new_empty(a.input_ids.shape[0], a.weight.shape[1], dtype=a.out_dtype),
        a.weight.new_empty(a.input_ids.shape[0], dtype=torch.int32),
    ),
    decides="weight",
)
rotary_qk_ = operation(reference.rotary_qk_, "rotary", mutates=["qkv"])
rotary_qk_packed_ = operation(reference.rotary_qk_packed_, "rotary", mutates=["qkv"])
packed_attention = operation(
    reference.packed_attention, "attention", lambda a: a.query.new_empty(a.query.shape)
)
layer_norm = operation(
    reference.layer_norm,
    "layernorm",
    lambda a: a.hidden_states.new_empty(a.hidden_states.shape, dtype=a.weight.dtype),
)
add_layer_norm_ = operation(
    reference.add_layer_norm_,
    "layernorm",
    lambda a: a.delta.new_empty(a.delta.shape, dtype=a.weight.dtype),
    mutates=["residual"],
)
linear_gelu = operation(
    matmul.linear_gelu,
    "gemm",
    lambda a: a.hidden_states.new_empty(a.hidden_states.shape[0], a.weight.shape[0]),
)
linear_rotary = operation(
    matmul.linear_rotary,
    "qkv",
    lambda a: a.hidden_states.new_empty(a.hidden_states.shape[0], a.weight.shape[0]),
)
bias_gelu_ = operation(reference.bias_gelu_, "gelu", mutates=["hidden_states"])
segment_mean = operation(reference.segment_mean, "pooling", _pooled)
segment_max = operation(reference.segment_max, "pooling", _pooled)
add_attention_maps_ = operation(
    reference.add_attention_maps_,
    "contacts",
    lambda a: a.scores.new_empty(a.query.shape[:2]),
    mutates=["scores"],
)
