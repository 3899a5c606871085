"""Whether a sequence's activations are finite, and how large they grew."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esm_packed.kernels.launch import check_contiguous, launch_settings


@triton.jit
def _check_numerics_kernel(
    hidden_states_ptr,  # (total_tokens, HIDDEN_SIZE)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    max_abs_ptr,  # (num_sequences,)
    nonfinite_ptr,  # (num_sequences,)
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64) * HIDDEN_SIZE
    last = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64) * HIDDEN_SIZE
    largest = tl.zeros([BLOCK], tl.float32)
    nonfinite = tl.zeros([BLOCK], tl.int32)
    for block in range(first, last, BLOCK):
        offset = block + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(hidden_states_ptr + offset, mask=offset < last, other=0.0).to(tl.float32))
        is_finite = value < float("inf")  # false for NaN, too
        largest = tl.maximum(largest, tl.where(is_finite, value, 0.0))
        nonfinite |= (~is_finite).to(tl.int32)
    tl.store(max_abs_ptr + sequence, tl.max(largest, axis=0))
    tl.store(nonfinite_ptr + sequence, tl.max(nonfinite, axis=0) > 0)


def check_numerics(
    hidden_states: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.check_numerics`; contiguous, else ValueError."""
    num_sequences = cu_seqlens.numel() - 1
    check_contiguous(hidden_states=hidden_states, cu_seqlens=cu_seqlens)
    max_abs = torch.empty(num_sequences, dtype=torch.float32, device=hidden_states.device)
    nonfinite = torch.empty(num_sequences, dtype=torch.bool, device=hidden_states.device)
    hidden_size = hidden_states.shape[1]
    settings = launch_settings(
        "check_numerics", hidden_size, hidden_states, {"BLOCK": 16384, "num_warps": 16}
    )
    _check_numerics_kernel[(num_sequences,)](
        hidden_states, cu_seqlens, max_abs, nonfinite, HIDDEN_SIZE=hidden_size, **settings
    )
    return max_abs, nonfinite
