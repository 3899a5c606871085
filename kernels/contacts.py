"""Sums over attention maps without materializing them: each program owns its output, no sum is atomic."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from esm_packed.kernels.launch import Settings, check_contiguous, grid, launch_settings, next_power_of_2
from esm_packed.kernels.segments import sequence_of_tile


@triton.jit
def _load_tile(
    pointer,  # first token of the sequence, at the head
    stride,  # from token to token
    first,  # token of the tile, in the sequence
    length,  # of the sequence
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK, BLOCK_D) queries or keys, zero beyond the sequence and beyond the head."""
    row = tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    return tl.load(
        pointer + tl.cast(first, tl.int64) * stride + row[:, None] * stride + dim[None, :],
        mask=(first + row < length)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _load_row(max_ptr, total_ptr, index, mask):
    """Maximum and sum that normalize rows. A single log-sum-exp would round the scores twice."""
    row_max = tl.load(max_ptr + index, mask=mask, other=float("inf"))
    return row_max, tl.load(total_ptr + index, mask=mask, other=1.0)


@triton.jit(do_not_specialize=["num_sequences"])
def _row_sums_kernel(
    query_ptr,  # (total_tokens, num_heads, HEAD_DIM), inner two dimensions contiguous
    key_ptr,
    cu_seqlens_ptr,  # (num_sequences + 1,)
    max_ptr,  # (total_tokens, num_heads) of a row's scores in units of log2, +inf for BOS and EOS
    total_ptr,  # (total_tokens, num_heads) of a row's 2^(score - max)
    sums_ptr,  # (total_tokens, num_heads), 0 for BOS and EOS
    stride_query,  # from token to token
    stride_key,
    num_heads,
    num_sequences,
    scale_log2,  # softmax_scale * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    start, length, first = sequence_of_tile(tl.program_id(0), cu_seqlens_ptr, num_sequences, BLOCK_M, BLOCK_S)
    if first >= length:
        return
    head = tl.program_id(1)
    start = start.to(tl.int64)
    query_start = query_ptr + start * stride_query + head * HEAD_DIM
    key_start = key_ptr + start * stride_key + head * HEAD_DIM
    query = _load_tile(query_start, stride_query, first, length, HEAD_DIM, BLOCK_M, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    residue_sum = tl.zeros([BLOCK_M], tl.float32)
    for first_key in range(0, length, BLOCK_N):
        key = _load_tile(key_start, stride_key, first_key, length, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        column = first_key + tl.arange(0, BLOCK_N)
        scores = tl.where((column < length)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        correction = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * correction + tl.sum(weights, axis=1)
        is_residue = (column > 0) & (column < length - 1)
        residues = tl.where(is_residue[None, :], weights, 0.0)
        residue_sum = residue_sum * correction + tl.sum(residues, axis=1)
        row_max = new_max

    row = first + tl.arange(0, BLOCK_M)
    is_residue = (row > 0) & (row < length - 1)
    index = (start + row) * num_heads + head
    tl.store(max_ptr + index, tl.where(is_residue, row_max, float("inf")), mask=row < length)
    tl.store(total_ptr + index, row_sum, mask=row < length)
    tl.store(sums_ptr + index, tl.where(is_residue, residue_sum / row_sum, 0.0), mask=row < length)


@triton.jit(do_not_specialize=["num_sequences"])
def _add_column_sums_kernel(
    query_ptr,
    key_ptr,
    cu_seqlens_ptr,
    max_ptr,
    total_ptr,
    sums_ptr,
    stride_query,
    stride_key,
    num_heads,
    num_sequences,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Arguments as for `_row_sums_kernel`; a tile holds keys and loops over all queries."""
    start, length, first = sequence_of_tile(tl.program_id(0), cu_seqlens_ptr, num_sequences, BLOCK_M, BLOCK_S)
    if first >= length:
        return
    head = tl.program_id(1)
    start = start.to(tl.int64)
    query_start = query_ptr + start * stride_query + head * HEAD_DIM
    key_start = key_ptr + start * stride_key + head * HEAD_DIM
    key = _load_tile(key_start, stride_key, first, length, HEAD_DIM, BLOCK_M, BLOCK_D)
    column_sum = tl.zeros([BLOCK_M], tl.float32)
    for first_query in range(0, length, BLOCK_N):
        query = _load_tile(query_start, stride_query, first_query, length, HEAD_DIM, BLOCK_N, BLOCK_D)
        row = first_query + tl.arange(0, BLOCK_N)
        row_max, row_sum = _load_row(max_ptr, total_ptr, (start + row) * num_heads + head, row < length)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
        column_sum += tl.sum(tl.exp2(scores - row_max[None, :]) / row_sum[None, :], axis=1)

    row = first + tl.arange(0, BLOCK_M)
    is_residue = (row > 0) & (row < length - 1)
    sums = sums_ptr + (start + row) * num_heads + head
    tl.store(sums, tl.load(sums, mask=is_residue, other=0.0) + column_sum, mask=is_residue)


@triton.jit(do_not_specialize=["num_sequences"])
def _add_maps_kernel(
    query_ptr,
    key_ptr,
    weight_ptr,  # (num_heads,)
    scores_ptr,  # (total_tokens, max_seqlen - 2)
    cu_seqlens_ptr,
    max_ptr,
    total_ptr,
    stride_query,
    stride_key,
    stride_scores,
    num_heads,
    num_sequences,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program owns a tile of the sum and loops over the heads."""
    start, length, first = sequence_of_tile(tl.program_id(0), cu_seqlens_ptr, num_sequences, BLOCK_M, BLOCK_S)
    first_key = tl.program_id(1) * BLOCK_N
    if (first >= length) | (first_key >= length):
        return
    start = start.to(tl.int64)
    query_start = query_ptr + start * stride_query
    key_start = key_ptr + start * stride_key
    row = first + tl.arange(0, BLOCK_M)
    column = first_key + tl.arange(0, BLOCK_N)
    index = (start + row) * num_heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(0, num_heads):
        query = _load_tile(
            query_start + head * HEAD_DIM, stride_query, first, length, HEAD_DIM, BLOCK_M, BLOCK_D
        )
        key = _load_tile(
            key_start + head * HEAD_DIM, stride_key, first_key, length, HEAD_DIM, BLOCK_N, BLOCK_D
        )
        row_max, row_sum = _load_row(max_ptr, total_ptr, index + head, row < length)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        factor = tl.load(weight_ptr + head) / row_sum
        total += tl.exp2(scores - row_max[:, None]) * factor[:, None]

    in_rows = (row > 0) & (row < length - 1)
    in_columns = (column > 0) & (column < length - 1)
    tile = scores_ptr + (start + row)[:, None] * stride_scores + (column - 1)[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(tile, tl.load(tile, mask=mask, other=0.0) + total, mask=mask)


def add_attention_maps_(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> torch.Tensor:
    """See `reference.add_attention_maps_`. FP32 products in IEEE arithmetic; three launches.

    Args:
        query, key: FP16, BF16 or FP32, contiguous within a token; tokens may be strided.

    Raises:
        ValueError: a tensor is not contiguous where it must be, or `scores` has the wrong shape.
    """
    total_tokens, num_heads, head_dim = query.shape
    for name, tensor in (("query", query), ("key", key)):
        if tensor.stride()[1:] != (head_dim, 1) or tensor.shape != query.shape:
            raise ValueError(
                f"{name} must be {tuple(query.shape)} and contiguous within a token, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    check_contiguous(weight=weight, scores=scores, cu_seqlens=cu_seqlens)
    if scores.shape != (total_tokens, max(max_seqlen - 2, 0)):
        raise ValueError(
            f"scores must be {(total_tokens, max(max_seqlen - 2, 0))}, got {tuple(scores.shape)}"
        )
    row_max, row_sum, sums = (
        torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) for _ in range(3)
    )
    settings = launch_settings("add_attention_maps_", head_dim, query, _heuristic(head_dim, query.dtype))
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": max(16, next_power_of_2(head_dim)), "BLOCK_S": 256, **settings}
    num_sequences = cu_seqlens.numel() - 1
    num_tiles = total_tokens // settings["BLOCK_M"] + num_sequences
    scale_log2 = softmax_scale * math.log2(math.e)
    strides = (query.stride(0), key.stride(0))
    numbers = (num_heads, num_sequences, scale_log2)
    for kernel in (_row_sums_kernel, _add_column_sums_kernel):
        kernel[num_tiles, num_heads](
            query, key, cu_seqlens, row_max, row_sum, sums, *strides, *numbers, **sizes
        )
    _add_maps_kernel[num_tiles, triton.cdiv(max_seqlen, settings["BLOCK_N"])](
        query,
        key,
        weight,
        scores,
        cu_seqlens,
        row_max,
        row_sum,
        *strides,
        scores.stride(0),
        *numbers,
        **sizes,
    )
    return sums


def _heuristic(head_dim: int, dtype: torch.dtype) -> Settings:
    """Tile sizes that do not spill on sm_80 to sm_100 (see the compile table in tests/kernels)."""
    block_m, block_n, num_warps = 64, 64 if head_dim <= 32 else 32, 4
    if dtype == torch.float32:
        block_m, block_n, num_warps = 32, 32 if head_dim <= 64 else 16, 8 if head_dim > 16 else 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 2}


_CANDIDATES = {
    "half": grid(
        "BLOCK_M BLOCK_N num_warps",
        [(32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 64, 8)],
        num_stages=(2, 3),
    ),
    "fp32": grid(
        "BLOCK_M BLOCK_N num_warps",
        [(16, 16, 4), (32, 16, 4), (32, 16, 8), (32, 32, 4), (32, 32, 8), (64, 16, 8), (64, 32, 8)],
        num_stages=(1, 2),
    ),
}


def candidates(dtype: torch.dtype) -> list[Settings]:
    """Settings to try on a GPU, the same in all three launches."""
    return _CANDIDATES["fp32" if dtype == torch.float32 else "half"]
