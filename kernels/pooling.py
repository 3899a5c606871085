"""Mean and maximum over the residues of every packed sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esm_packed.kernels.launch import Settings, check_contiguous, grid, launch_settings, tiles


@triton.jit
def _segment_pool_kernel(
    hidden_states_ptr,  # (total_tokens, HIDDEN_SIZE)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    pooled_ptr,  # (num_sequences, HIDDEN_SIZE)
    HIDDEN_SIZE: tl.constexpr,
    REDUCTION: tl.constexpr,  # "mean" or "max"
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens_ptr + sequence) + 1
    last = tl.load(cu_seqlens_ptr + sequence + 1) - 1
    dim = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    neutral: tl.constexpr = float("-inf") if REDUCTION == "max" else 0.0
    pooled = tl.full([BLOCK_T, BLOCK_N], neutral, tl.float32)
    for block in range(first, last, BLOCK_T):
        token = block + tl.arange(0, BLOCK_T)
        mask = (token < last)[:, None] & (dim < HIDDEN_SIZE)
        offset = token.to(tl.int64)[:, None] * HIDDEN_SIZE + dim
        values = tl.load(hidden_states_ptr + offset, mask=mask, other=neutral).to(tl.float32)
        if REDUCTION == "max":
            pooled = tl.maximum(pooled, values, propagate_nan=tl.PropagateNan.ALL)
        else:
            pooled += values
    if REDUCTION == "max":
        # `tl.max` ignores NaN.
        is_nan = tl.max((pooled != pooled).to(tl.int32), axis=0) > 0
        result = tl.where(is_nan, float("nan"), tl.max(pooled, axis=0))[None, :]
    else:
        result = tl.sum(pooled, axis=0)[None, :] / tl.maximum(last - first, 0).to(tl.float32)
    tl.store(pooled_ptr + sequence.to(tl.int64) * HIDDEN_SIZE + dim, result, mask=dim < HIDDEN_SIZE)


def segment_mean(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """See `reference.segment_mean`; contiguous, else ValueError; FP32 accumulation in a fixed order."""
    return _segment_pool("mean", hidden_states, cu_seqlens)


def segment_max(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """See `reference.segment_max`; contiguous, else ValueError."""
    return _segment_pool("max", hidden_states, cu_seqlens)


def _segment_pool(reduction: str, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    hidden_size = hidden_states.shape[1]
    num_sequences = cu_seqlens.numel() - 1
    check_contiguous(hidden_states=hidden_states, cu_seqlens=cu_seqlens)
    pooled = torch.empty(num_sequences, hidden_size, dtype=torch.float32, device=hidden_states.device)
    settings = launch_settings(f"segment_{reduction}", hidden_size, hidden_states, _HEURISTIC)
    _segment_pool_kernel[(num_sequences, triton.cdiv(hidden_size, settings["BLOCK_N"]))](
        hidden_states, cu_seqlens, pooled, HIDDEN_SIZE=hidden_size, REDUCTION=reduction, **settings
    )
    return pooled


_HEURISTIC: Settings = {"BLOCK_T": 64, "BLOCK_N": 64, "num_warps": 4}
CANDIDATES = grid(
    "BLOCK_T BLOCK_N num_warps", tiles((16, 32, 64, 128), (64, 128, 256), (4, 8), least=8, most=64)
)
