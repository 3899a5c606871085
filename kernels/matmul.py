"""Matrix multiplication with bias, and with what follows it: exact GELU, or the rotation of queries and keys.

On a CPU a weight may be packed: brought into the layout that oneDNN multiplies with, once and not at each
call. A packed weight is a tensor like any other, in torch's opaque layout for oneDNN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from esm_packed.kernels import reference
from esm_packed.kernels.dispatch import uses_triton
from esm_packed.kernels.processor import is_intel

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

_MAX_ADDENDS = 640
"""Of the longest FP32 sums that oneDNN adds in one chain; longer ones end further from FP64 than MKL's."""

_PART_ADDENDS = 384
"""Addends of the parts in which longer sums are formed where MKL is slow."""

_MIN_ROWS_IN_PARTS = 64
"""With fewer rows, copying the weight into parts costs more than oneDNN saves."""

_PACKING_ROWS = 1024
"""Rows that oneDNN is told to expect; any number is served."""


def _mkl_is_fast() -> bool:
    """On AMD processors MKL runs at half the speed of oneDNN."""
    return is_intel()


# What computes depends on the kind of processor and on shapes alone: the same command gives the same bits.


def _is_packed(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not _HAS_ONEDNN or uses_triton(weight):
        return False
    return weight.dtype in (torch.float16, torch.bfloat16) or (
        weight.dtype == torch.float32 and weight.shape[1] <= _MAX_ADDENDS
    )


def _is_in_parts(hidden_states: torch.Tensor) -> bool:
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype == torch.float32
        and hidden_states.shape[1] > _MAX_ADDENDS
        and len(hidden_states) >= _MIN_ROWS_IN_PARTS
        and _HAS_ONEDNN
        and not torch.compiler.is_compiling()  # it cannot be traced, and Inductor calls oneDNN itself
        and not _mkl_is_fast()
    )


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Return which library multiplies matrices, and how, for the output file to record.

    Args:
        device: where the weights are.
        dtype: of the weights.

    Returns:
        Such as `oneDNN, MKL for K > 640`, where K is the number of products in a sum.
    """
    if device.type != "cpu":
        return "cuBLAS"
    if not _HAS_ONEDNN or dtype == torch.float64:
        return "torch"
    if dtype != torch.float32:
        return "oneDNN"
    longer = "MKL" if _mkl_is_fast() else f"in parts of {_PART_ADDENDS}"
    return f"oneDNN, {longer} for K > {_MAX_ADDENDS}"


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as `linear` and `linear_gelu` multiply fastest with it: packed, or as it is.

    Args:
        weight: (out_features, in_features).

    Returns:
        The packed weight, of the same shape, dtype and device, or `weight`; `to_dense()` undoes it.
    """
    if weight.is_mkldnn or not _is_packed(weight):
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKING_ROWS)
    return packed


def wants_interleaved_heads(weight: torch.Tensor) -> bool:
    """Whether this projection should be in the order of `interleave_heads_`: on a CPU; kernels refuse it."""
    return weight.device.type == "cpu" and not uses_triton(weight)


def interleave_heads_(projection: torch.Tensor, head_dim: int) -> None:
    """Reorder a projection to queries, keys and values for `reference.rotary_qk_interleaved_`.

    Attention does not see the difference: queries and keys have the same order.

    Args:
        projection: (3 * num_heads * head_dim, ...), a weight or bias, modified: in each head of queries and
            keys, row i is followed by row i + head_dim / 2.
    """
    _transpose_in_heads_(projection, head_dim, 2, head_dim // 2)


def separate_heads_(projection: torch.Tensor, head_dim: int) -> None:
    """Undo `interleave_heads_`."""
    _transpose_in_heads_(projection, head_dim, head_dim // 2, 2)


def _transpose_in_heads_(projection: torch.Tensor, head_dim: int, *shape: int) -> None:
    for part in projection.chunk(3)[:2]:  # one after the other: large models leave little memory
        heads = part.view(len(part) // head_dim, *shape, *part.shape[1:])
        part.copy_(heads.transpose(1, 2).reshape(part.shape))


def linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T + bias`.

    Args:
        hidden_states: (total_tokens, in_features).
        weight: (out_features, in_features), packed or not.
        bias: (out_features,).

    Returns:
        (total_tokens, out_features).
    """
    total: torch.Tensor
    multiply = torch.ops.mkldnn._linear_pointwise
    if weight.is_mkldnn:
        total = multiply(hidden_states, weight, bias, "none", [], "")
        return total
    if not _is_in_parts(hidden_states):
        return F.linear(hidden_states, weight, bias)
    num_parts = -(-weight.shape[1] // _PART_ADDENDS)
    # oneDNN takes strided operands, but falls back to its slowest code for them
    (states, columns), *others = (
        (states.contiguous(), columns.contiguous())
        for states, columns in zip(hidden_states.chunk(num_parts, 1), weight.chunk(num_parts, 1), strict=True)
    )
    total = multiply(states, columns, bias, "none", [], "")
    for states, columns in others:
        total = multiply.binary(states, total, columns, None, "add")
    return total


def linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of `hidden_states @ weight.T + bias` in its exact form, x/2 * (1 + erf(x / sqrt 2)).

    Arguments and result as for `linear`. A packed weight saves one rounding in half types.
    """
    if weight.is_mkldnn:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden_states, weight, bias, "gelu", [], "none"
        )
        return product
    return F.gelu(linear(hidden_states, weight, bias))


def linear_rotary(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    interleaved: bool = False,
) -> torch.Tensor:
    """`linear` to queries, keys and values, of which the first two are rotated by `reference.rotary_qk_`.

    Args:
        hidden_states: (total_tokens, in_features).
        weight: (3 * num_heads * head_dim, in_features), packed or not.
        bias: (3 * num_heads * head_dim,).
        cos, sin, position_ids: as for `rotary_qk_`.
        interleaved: whether weight and bias are in the order of `interleave_heads_`; on a CPU only.

    Returns:
        (total_tokens, 3 * num_heads * head_dim).
    """
    qkv = linear(hidden_states, weight, bias)
    head_dim = 2 * cos.shape[1]
    heads = qkv.view(len(qkv), 3, qkv.shape[1] // (3 * head_dim), head_dim)
    rotate = reference.rotary_qk_interleaved_ if interleaved else reference.rotary_qk_
    rotate(heads, cos, sin, position_ids)
    return qkv
