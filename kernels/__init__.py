"""The operations of ESM-2 on packed tensors; they know tensors, not proteins.

On a GPU they are Triton kernels, elsewhere plain PyTorch, which `reference` holds and documents.
"""

from __future__ import annotations

import torch

from esm_packed.kernels import matmul, reference
from esm_packed.kernels.dispatch import operation
from esm_packed.kernels.matmul import linear

__all__ = [
    "add_layer_norm_",
    "bias_gelu_",
    "check_numerics",
    "embed_tokens",
    "layer_norm",
    "linear",
    "linear_gelu",
    "packed_attention",
    "rotary_qk_",
    "rotary_qk_packed_",
    "segment_mean",
]

embed_tokens = operation(
    reference.embed_tokens,
    "embedding",
    lambda input_ids, cu_seqlens, weight, mask_id, out_dtype: (
        weight.new_empty(input_ids.shape[0], weight.shape[1], dtype=out_dtype),
        weight.new_empty(input_ids.shape[0], dtype=torch.int32),
    ),
    decides="weight",
)
rotary_qk_ = operation(
    reference.rotary_qk_, "rotary", lambda qkv, cos, sin, position_ids: None, mutates=["qkv"]
)
rotary_qk_packed_ = operation(
    reference.rotary_qk_packed_, "rotary", lambda qkv, cos, sin, cu_seqlens: None, mutates=["qkv"]
)
packed_attention = operation(
    reference.packed_attention,
    "attention",
    lambda query, key, value, cu_seqlens, max_seqlen, softmax_scale, input_precision="ieee": query.new_empty(
        query.shape
    ),
)
layer_norm = operation(
    reference.layer_norm,
    "layernorm",
    lambda hidden_states, weight, bias, eps: hidden_states.new_empty(hidden_states.shape, dtype=weight.dtype),
)
add_layer_norm_ = operation(
    reference.add_layer_norm_,
    "layernorm",
    lambda delta, residual, weight, bias, eps: delta.new_empty(delta.shape, dtype=weight.dtype),
    mutates=["residual"],
)
linear_gelu = operation(
    matmul.linear_gelu,
    "gemm",
    lambda hidden_states, weight, bias: hidden_states.new_empty(hidden_states.shape[0], weight.shape[0]),
)
bias_gelu_ = operation(
    reference.bias_gelu_, "gelu", lambda hidden_states, bias: None, mutates=["hidden_states"]
)
segment_mean = operation(
    reference.segment_mean,
    "pooling",
    lambda hidden_states, cu_seqlens: hidden_states.new_empty(
        cu_seqlens.shape[0] - 1, hidden_states.shape[1], dtype=reference.statistics_dtype(hidden_states.dtype)
    ),
)
check_numerics = operation(
    reference.check_numerics,
    "numerics_check",
    lambda hidden_states, cu_seqlens: (
        hidden_states.new_empty(
            cu_seqlens.shape[0] - 1, dtype=reference.statistics_dtype(hidden_states.dtype)
        ),
        hidden_states.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.bool),
    ),
)
