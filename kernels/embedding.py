"""Token embedding, ESM-2's token dropout and positions per sequence, in one pass over the packed tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esm_packed.kernels.launch import Settings, check_contiguous, grid, launch_settings
from esm_packed.kernels.reference import TRAINED_KEEP_RATIO
from esm_packed.kernels.segments import segment_bounds


@triton.jit(do_not_specialize=["total_tokens", "num_sequences"])
def _embed_tokens_kernel(
    input_ids_ptr,  # (total_tokens,)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    weight_ptr,  # (vocab_size, HIDDEN_SIZE)
    embeddings_ptr,  # (total_tokens, HIDDEN_SIZE)
    position_ids_ptr,  # (total_tokens,)
    total_tokens,
    num_sequences,
    MASK_ID: tl.constexpr,  # -1: no token dropout
    KEEP_RATIO: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)
    in_range = token < total_tokens
    starts, ends = segment_bounds(cu_seqlens_ptr, num_sequences, token, BLOCK_S)
    # Tokens after the last sequence, as in a captured graph, have no end and get position 0.
    in_sequence = ends < 2147483647
    tl.store(position_ids_ptr + token, tl.where(in_sequence, token - starts, 0), mask=in_range)

    ids = tl.load(input_ids_ptr + token, mask=in_range, other=0)
    if MASK_ID >= 0:
        num_masked = token * 0
        last_end = tl.max(tl.where(in_sequence, ends, 0), axis=0)
        for chunk in range(tl.min(starts, axis=0), last_end, BLOCK_C):
            other = chunk + tl.arange(0, BLOCK_C)
            is_mask = tl.load(input_ids_ptr + other, mask=other < last_end, other=-1) == MASK_ID
            same = (other[None, :] >= starts[:, None]) & (other[None, :] < ends[:, None])
            num_masked += tl.sum((same & is_mask[None, :]).to(tl.int32), axis=1)
        share_masked = tl.div_rn(num_masked.to(tl.float32), (ends - starts).to(tl.float32))
        scale = tl.div_rn(tl.full([BLOCK_T], KEEP_RATIO, tl.float32), 1 - share_masked)
        scale = tl.where(ids == MASK_ID, 0.0, scale)

    row = token.to(tl.int64)[:, None] * HIDDEN_SIZE
    weight_row = ids.to(tl.int64)[:, None] * HIDDEN_SIZE
    for column in tl.range(0, HIDDEN_SIZE, BLOCK_N):
        dim = column + tl.arange(0, BLOCK_N)[None, :]
        mask = in_range[:, None] & (dim < HIDDEN_SIZE)
        value = tl.load(weight_ptr + weight_row + dim, mask=mask, other=0.0).to(tl.float32)
        if MASK_ID >= 0:
            value *= scale[:, None]
        tl.store(embeddings_ptr + row + dim, value.to(embeddings_ptr.dtype.element_ty), mask=mask)


def embed_tokens(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    weight: torch.Tensor,
    mask_id: int | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.embed_tokens`; all tensors contiguous, else ValueError.

    Each program counts the masked tokens of the sequences that its tokens belong to, so nothing is read back
    and no second launch is needed. FP32 scale, one rounding to `out_dtype`.
    """
    check_contiguous(input_ids=input_ids, cu_seqlens=cu_seqlens, weight=weight)
    total_tokens, hidden_size = input_ids.numel(), weight.shape[1]
    embeddings = torch.empty(total_tokens, hidden_size, dtype=out_dtype, device=weight.device)
    position_ids = torch.empty(total_tokens, dtype=torch.int32, device=weight.device)
    settings = launch_settings("embed_tokens", hidden_size, weight, _HEURISTIC)
    _embed_tokens_kernel[(triton.cdiv(total_tokens, settings["BLOCK_T"]),)](
        input_ids,
        cu_seqlens,
        weight,
        embeddings,
        position_ids,
        total_tokens,
        cu_seqlens.numel() - 1,
        MASK_ID=-1 if mask_id is None else mask_id,
        KEEP_RATIO=TRAINED_KEEP_RATIO,
        HIDDEN_SIZE=hidden_size,
        **settings,
    )
    return embeddings, position_ids


_HEURISTIC: Settings = {"BLOCK_T": 8, "BLOCK_N": 256, "BLOCK_S": 128, "BLOCK_C": 128, "num_warps": 4}
CANDIDATES = grid(
    "BLOCK_S BLOCK_C", [(128, 128)], BLOCK_T=(4, 8, 16), BLOCK_N=(128, 256, 512), num_warps=(4, 8)
)
