"""The operations of ESM-2 on packed tensors; they know tensors, not proteins."""

from esm_packed.kernels.matmul import linear, linear_gelu
from esm_packed.kernels.reference import (
    add_layer_norm_,
    embed_tokens,
    layer_norm,
    rotary_qk_,
    segment_mean,
)

__all__ = [
    "add_layer_norm_",
    "embed_tokens",
    "layer_norm",
    "linear",
    "linear_gelu",
    "rotary_qk_",
    "segment_mean",
]
