"""Rotary position embedding of queries and keys, in place on the packed QKV projection, in one launch."""

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
from esm_packed.kernels.segments import segment_bounds


@triton.jit(do_not_specialize=["total_tokens", "num_sequences"])
def _rotary_qk_kernel(
    qkv_ptr,  # (total_tokens, 3, NUM_HEADS / 2, HEAD_DIM), inner three dimensions contiguous
    cos_ptr,  # (max_positions, HEAD_DIM / 2)
    sin_ptr,
    position_ids_ptr,  # (total_tokens,), or None: found from cu_seqlens
    cu_seqlens_ptr,  # (num_sequences + 1,), or None
    stride_token,
    total_tokens,
    num_sequences,
    NUM_HEADS: tl.constexpr,  # queries and keys together, as they are adjacent in memory
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = token < total_tokens
    if position_ids_ptr is not None:
        position = tl.load(position_ids_ptr + token, mask=in_range, other=0)
    else:
        starts, ends = segment_bounds(cu_seqlens_ptr, num_sequences, token, BLOCK_S)
        position = tl.where(ends < 2147483647, token - starts, 0)

    dim = tl.arange(0, BLOCK_D)
    angle = position.to(tl.int64)[:, None] * HALF + dim[None, :]
    mask = in_range[:, None] & (dim < HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)[:, None, :]  # (BLOCK_T, 1, BLOCK_D)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)[:, None, :]

    row = token.to(tl.int64)[:, None, None] * stride_token
    for first_head in tl.range(0, NUM_HEADS, BLOCK_H):
        head = first_head + tl.arange(0, BLOCK_H)[None, :, None]
        pointer = qkv_ptr + row + head * HEAD_DIM + dim[None, None, :]
        tile_mask = mask[:, None, :] & (head < NUM_HEADS)
        first = tl.load(pointer, mask=tile_mask, other=0.0).to(tl.float32)
        second = tl.load(pointer + HALF, mask=tile_mask, other=0.0).to(tl.float32)
        dtype = qkv_ptr.dtype.element_ty
        tl.store(pointer, (first * cos - second * sin).to(dtype), mask=tile_mask)
        tl.store(pointer + HALF, (second * cos + first * sin).to(dtype), mask=tile_mask)


def rotary_qk_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor) -> None:
    """See `reference.rotary_qk_`. FP32 arithmetic; tokens may be strided, the rest of `qkv` is contiguous.

    Raises:
        ValueError: a row of `qkv` is not contiguous, or the tables are not FP32.
    """
    _launch(qkv, cos, sin, position_ids, None)


def rotary_qk_packed_(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    """See `reference.rotary_qk_packed_`. Like `rotary_qk_`, but each program finds its tokens' positions."""
    _launch(qkv, cos, sin, None, cu_seqlens)


def _launch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    total_tokens, _, num_heads, head_dim = qkv.shape
    if qkv.stride()[1:] != (num_heads * head_dim, head_dim, 1):
        raise ValueError(
            f"qkv must be contiguous within a token, got strides {qkv.stride()} for {tuple(qkv.shape)}"
        )
    check_contiguous(position_ids=position_ids, cu_seqlens=cu_seqlens)
    if position_ids is not None:
        check_positions(position_ids, total_tokens)
    check_tables(cos, sin, head_dim)
    settings = launch_settings("rotary_qk_", head_dim, qkv, _heuristic(head_dim))
    _rotary_qk_kernel[(triton.cdiv(total_tokens, settings["BLOCK_T"]),)](
        qkv,
        cos,
        sin,
        position_ids,
        cu_seqlens,
        qkv.stride(0),
        total_tokens,
        0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        NUM_HEADS=2 * num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=next_power_of_2(head_dim // 2),
        BLOCK_S=128,
        **settings,
    )


def check_positions(position_ids: torch.Tensor, total_tokens: int) -> None:
    """Check that there is a position for each token.

    Raises:
        ValueError: there are more or fewer.
    """
    if position_ids.shape != (total_tokens,):
        raise ValueError(f"position_ids must be ({total_tokens},), got {tuple(position_ids.shape)}")


def check_tables(cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> None:
    """Check that tables of cosines and sines are as the kernels read them.

    Raises:
        ValueError: a table is not FP32, not contiguous, or not for heads of `head_dim`.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.shape[1] != head_dim // 2 or not table.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 (max_positions, {head_dim // 2}), "
                f"got {table.dtype} {tuple(table.shape)}"
            )


def _heuristic(head_dim: int) -> Settings:
    # 8 elements per thread
    return {"BLOCK_T": 4, "BLOCK_H": max(1, 256 // next_power_of_2(head_dim // 2)), "num_warps": 4}


def candidates(head_dim: int) -> list[Settings]:
    """Settings to try on a GPU."""
    width = next_power_of_2(head_dim // 2)
    rows = tiles((1, 2, 4, 8), (4, 8, 16, 32), (2, 4, 8), width=width, least=4, most=16)
    return grid("BLOCK_T BLOCK_H num_warps", rows)
