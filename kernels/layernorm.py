"""LayerNorm, alone or after an addition to the residual stream, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esm_packed.kernels.launch import (
    Settings,
    check_contiguous,
    grid,
    launch_settings,
    next_power_of_2,
    tiles,
)


@triton.jit(do_not_specialize=["total_tokens"])
def _layer_norm_kernel(
    input_ptr,  # (total_tokens, HIDDEN_SIZE)
    residual_ptr,  # (total_tokens, HIDDEN_SIZE), gets the sum; None if there is no residual stream
    weight_ptr,  # (HIDDEN_SIZE,)
    bias_ptr,
    out_ptr,  # (total_tokens, HIDDEN_SIZE)
    total_tokens,
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_N)[None, :]
    in_row = dim < HIDDEN_SIZE
    mask = (token < total_tokens)[:, None] & in_row
    offset = token.to(tl.int64)[:, None] * HIDDEN_SIZE + dim

    value = tl.load(input_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        value += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + offset, value.to(residual_ptr.dtype.element_ty), mask=mask)

    mean = tl.sum(value, axis=1) / HIDDEN_SIZE
    centered = tl.where(in_row, value - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / HIDDEN_SIZE
    weight = tl.load(weight_ptr + dim, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + dim, mask=in_row, other=0.0).to(tl.float32)
    normalized = centered * tl.rsqrt(variance + eps)[:, None] * weight + bias
    tl.store(out_ptr + offset, normalized.to(out_ptr.dtype.element_ty), mask=mask)


def layer_norm(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `reference.layer_norm`; all tensors contiguous, else ValueError."""
    return _launch("layer_norm", hidden_states, None, weight, bias, eps)


def add_layer_norm_(
    delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `reference.add_layer_norm_`; all tensors contiguous, else ValueError.

    The sum is normalized before it is rounded to the dtype of `residual`.
    """
    return _launch("add_layer_norm_", delta, residual, weight, bias, eps)


def _launch(
    name: str,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    total_tokens, hidden_size = hidden_states.shape
    check_contiguous(hidden_states=hidden_states, residual=residual, weight=weight, bias=bias)
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (hidden_size,):
            raise ValueError(f"{argument} must be ({hidden_size},), got {tuple(tensor.shape)}")
    if residual is not None and residual.shape != hidden_states.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, delta {tuple(hidden_states.shape)}")
    out = torch.empty_like(hidden_states, dtype=weight.dtype)
    settings = launch_settings(name, hidden_size, hidden_states, _heuristic(hidden_size))
    _layer_norm_kernel[(triton.cdiv(total_tokens, settings["BLOCK_T"]),)](
        hidden_states,
        residual,
        weight,
        bias,
        out,
        total_tokens,
        eps,
        HIDDEN_SIZE=hidden_size,
        BLOCK_N=next_power_of_2(hidden_size),
        **settings,
    )
    return out


def _heuristic(hidden_size: int) -> Settings:
    # About 16 elements per thread: two 128-bit loads of FP16. Short rows share a program and its weights.
    block = next_power_of_2(hidden_size)
    rows = max(1, 2048 // block)
    return {"BLOCK_T": rows, "num_warps": min(16, max(4, rows * block // 512))}


def candidates(hidden_size: int) -> list[Settings]:
    """Settings to try on a GPU."""
    width = next_power_of_2(hidden_size)
    rows = tiles((1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32), width=width, least=4, most=32)
    return grid("BLOCK_T num_warps", rows)
