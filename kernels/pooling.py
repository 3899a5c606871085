"""Mean over the residues of every packed sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esm_packed.kernels.launch import Settings, check_contiguous, grid, launch_settings, tiles


@triton.jit
def _segment_mean_kernel(
    hidden_states_ptr,  # (total_tokens, HIDDEN_SIZE)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    means_ptr,  # (num_sequences, HIDDEN_SIZE)
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens_ptr + sequence) + 1
    last = tl.load(cu_seqlens_ptr + sequence + 1) - 1
    dim = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for block in range(first, last, BLOCK_T):
        token = block + tl.arange(0, BLOCK_T)
        mask = (token < last)[:, None] & (dim < HIDDEN_SIZE)
        offset = token.to(tl.int64)[:, None] * HIDDEN_SIZE + dim
        total += tl.load(hidden_states_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0)[None, :] / tl.maximum(last - first, 0).to(tl.float32)
    tl.store(means_ptr + sequence.to(tl.int64) * HIDDEN_SIZE + dim, mean, mask=dim < HIDDEN_SIZE)


def segment_mean(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """See `reference.segment_mean`; contiguous, else ValueError; FP32 accumulation in a fixed order."""
    hidden_size = hidden_states.shape[1]
    num_sequences = cu_seqlens.numel() - 1
    check_contiguous(hidden_states=hidden_states, cu_seqlens=cu_seqlens)
    means = torch.empty(num_sequences, hidden_size, dtype=torch.float32, device=hidden_states.device)
    settings = launch_settings("segment_mean", hidden_size, hidden_states, _HEURISTIC)
    _segment_mean_kernel[(num_sequences, triton.cdiv(hidden_size, settings["BLOCK_N"]))](
        hidden_states, cu_seqlens, means, HIDDEN_SIZE=hidden_size, **settings
    )
    return means


_HEURISTIC: Settings = {"BLOCK_T": 64, "BLOCK_N": 64, "num_warps": 4}
CANDIDATES = grid(
    "BLOCK_T BLOCK_N num_warps", tiles((16, 32, 64, 128), (64, 128, 256), (4, 8), least=8, most=64)
)
