"""Matrix multiplication with bias, and with exact GELU in its epilogue where a library offers that.

On a CPU a weight may be packed: brought into the layout that oneDNN multiplies with, once and not at each
call. A packed weight is a tensor like any other, in torch's opaque layout for oneDNN.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from esm_packed.kernels.dispatch import uses_triton

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

_MKL_MIN_ADDENDS = 641
"""For FP32 sums as long as this MKL is as fast on Intel, and nearer to FP64, as it adds partial sums."""

_PACKING_ROWS = 1024
"""Rows that oneDNN is told to expect; any number is served."""


@cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def _onednn_serves(weight: torch.Tensor) -> bool:
    # F.linear sends FP32 to MKL, which on AMD processors runs at half the speed of oneDNN. The choice depends
    # on the kind of processor alone, so that the same command gives the same bits.
    if weight.device.type != "cpu" or not _HAS_ONEDNN or weight.dtype == torch.float64:
        return False
    return weight.dtype != torch.float32 or weight.shape[1] < _MKL_MIN_ADDENDS or not _is_intel()


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as `linear` and `linear_gelu` multiply fastest with it: packed, or as it is.

    Args:
        weight: (out_features, in_features).

    Returns:
        The packed weight, of the same shape, dtype and device, or `weight`; `to_dense()` undoes it.
    """
    if weight.is_mkldnn or uses_triton(weight) or not _onednn_serves(weight):
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKING_ROWS)
    return packed


def linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T + bias`.

    Args:
        hidden_states: (total_tokens, in_features).
        weight: (out_features, in_features), packed or not.
        bias: (out_features,).

    Returns:
        (total_tokens, out_features).
    """
    if weight.is_mkldnn:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden_states, weight, bias, "none", [], ""
        )
        return product
    return F.linear(hidden_states, weight, bias)


def linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of `hidden_states @ weight.T + bias` in its exact form, x/2 * (1 + erf(x / sqrt 2)).

    Arguments and result as for `linear`. A packed weight saves one rounding in half types.
    """
    if weight.is_mkldnn:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden_states, weight, bias, "gelu", [], "none"
        )
        return product
    return F.gelu(F.linear(hidden_states, weight, bias))
