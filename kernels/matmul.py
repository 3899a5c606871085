"""Matrix multiplication with bias, and with exact GELU in its epilogue where a library offers that."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

_ONEDNN_MAX_ADDENDS = 384
"""oneDNN adds all addends in one chain, which for long sums ends further from FP64 than MKL does."""

_ONEDNN_MIN_ROWS = 64
"""With fewer tokens, copying the weight into parts would cost more than oneDNN saves."""


def _onednn_serves(hidden_states: torch.Tensor) -> bool:
    # F.linear sends FP32 on a CPU to MKL, which on AMD processors runs at half the speed of oneDNN.
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype == torch.float32
        and len(hidden_states) >= _ONEDNN_MIN_ROWS
        and _HAS_ONEDNN
        and not torch.compiler.is_compiling()  # it cannot be traced, and Inductor calls oneDNN by itself
    )


def _onednn_linear(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool
) -> torch.Tensor:
    multiply = torch.ops.mkldnn._linear_pointwise
    num_parts = -(-weight.shape[1] // _ONEDNN_MAX_ADDENDS)
    # oneDNN takes strided operands, but falls back to its slowest code for them.
    (states, columns), *others = (
        (states.contiguous(), columns.contiguous())
        for states, columns in zip(hidden_states.chunk(num_parts, 1), weight.chunk(num_parts, 1), strict=True)
    )
    total: torch.Tensor
    if gelu and not others:
        total = multiply(states, columns, bias, "gelu", [], "none")
        return total
    total = multiply(states, columns, bias, "none", [], "")
    for states, columns in others:
        total = multiply.binary(states, total, columns, None, "add")
    return F.gelu(total) if gelu else total


def linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T + bias`.

    Args:
        hidden_states: (total_tokens, in_features).
        weight: (out_features, in_features).
        bias: (out_features,).

    Returns:
        (total_tokens, out_features).
    """
    if _onednn_serves(hidden_states):
        return _onednn_linear(hidden_states, weight, bias, gelu=False)
    return F.linear(hidden_states, weight, bias)


def linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of `hidden_states @ weight.T + bias` in its exact form, x/2 * (1 + erf(x / sqrt 2)).

    Arguments and result as for `linear`.
    """
    if _onednn_serves(hidden_states):
        return _onednn_linear(hidden_states, weight, bias, gelu=True)
    return F.gelu(F.linear(hidden_states, weight, bias))
