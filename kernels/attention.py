"""Bidirectional attention of every packed sequence with itself (Dao 2023, FlashAttention-2), forward only."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from esm_packed.kernels import launch
from esm_packed.kernels.intrinsics import copied
from esm_packed.kernels.launch import Settings, check_contiguous, grid, launch_settings, next_power_of_2
from esm_packed.kernels.segments import sequence_of_tile


@triton.jit
def _scores_of_block(
    query,  # (BLOCK_M, BLOCK_D)
    key_ptr,  # first key of the sequence
    stride_key,
    block,  # of BLOCK_N keys
    length,  # of the sequence
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,  # the sequence may end in this block
    INPUT_PRECISION: tl.constexpr,
):
    key_ptr += tl.cast(block, tl.int64) * BLOCK_N * stride_key
    num_keys = length - block * BLOCK_N if MASKED else BLOCK_N
    key_index = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    in_sequence = key_index < num_keys
    key = tl.load(
        key_ptr + key_index[None, :] * stride_key + dim[:, None],
        mask=in_sequence[None, :] & (dim < HEAD_DIM)[:, None],
        other=0.0,
    )
    scores = tl.dot(query, key, input_precision=INPUT_PRECISION)
    if MASKED:
        scores = tl.where(in_sequence[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _softmax_of_block(
    scores,  # (BLOCK_M, BLOCK_N)
    row_max,  # (BLOCK_M,) FP32, of unscaled scores
    row_sum,
    scale_log2,
):
    """Weights of a block, not yet divided by `row_sum`, and the factor on what was summed before."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    correction = tl.exp2((row_max - new_max) * scale_log2)
    # Scaling after the maximum makes scaling and subtraction one multiply-add.
    weights = tl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
    return weights, correction, new_max, row_sum * correction + tl.sum(weights, axis=1)


@triton.jit
def _values_of_block(
    value_ptr,  # first value of the sequence
    stride_value,
    block,
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    value_ptr += tl.cast(block, tl.int64) * BLOCK_N * stride_value
    num_keys = length - block * BLOCK_N if MASKED else BLOCK_N
    key_index = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    # Values beyond the sequence belong to another protein, or are undefined: 0 * NaN would be NaN.
    return tl.load(
        value_ptr + key_index[:, None] * stride_value + dim[None, :],
        mask=(key_index < num_keys)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _attend_to_block(
    out,  # (BLOCK_M, BLOCK_D) FP32, not yet divided by row_sum
    row_max,
    row_sum,
    query,
    key_ptr,
    value_ptr,
    stride_key,
    stride_value,
    block,
    length,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    scores = _scores_of_block(
        query, key_ptr, stride_key, block, length, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED, INPUT_PRECISION
    )
    weights, correction, row_max, row_sum = _softmax_of_block(scores, row_max, row_sum, scale_log2)
    value = _values_of_block(value_ptr, stride_value, block, length, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    out = tl.dot(weights.to(value.dtype), value, out * correction[:, None], input_precision=INPUT_PRECISION)
    return out, row_max, row_sum


@triton.jit
def _attend_overlapped(
    out,
    row_max,
    row_sum,
    query,
    key_ptr,
    value_ptr,
    stride_key,
    stride_value,
    num_blocks,  # at least 2, of which none ends the sequence
    length,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """`_attend_to_block` for several: scores of a block are formed during the exponentials of that before."""
    dtype: tl.constexpr = value_ptr.dtype.element_ty
    scores = _scores_of_block(
        query, key_ptr, stride_key, 0, length, HEAD_DIM, BLOCK_N, BLOCK_D, False, INPUT_PRECISION
    )
    weights, correction, row_max, row_sum = _softmax_of_block(scores, row_max, row_sum, scale_log2)
    weights = weights.to(dtype)
    scores = _scores_of_block(
        query, key_ptr, stride_key, 1, length, HEAD_DIM, BLOCK_N, BLOCK_D, False, INPUT_PRECISION
    )
    for block in range(0, num_blocks - 2):
        value = _values_of_block(value_ptr, stride_value, block, length, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        out = tl.dot(weights, value, out, input_precision=INPUT_PRECISION)
        scores = copied(scores)
        next_scores = _scores_of_block(
            query, key_ptr, stride_key, block + 2, length, HEAD_DIM, BLOCK_N, BLOCK_D, False, INPUT_PRECISION
        )
        exponentials, correction, row_max, row_sum = _softmax_of_block(scores, row_max, row_sum, scale_log2)
        out = out * correction[:, None]
        weights = exponentials.to(dtype)
        scores = next_scores

    value = _values_of_block(
        value_ptr, stride_value, num_blocks - 2, length, HEAD_DIM, BLOCK_N, BLOCK_D, False
    )
    out = tl.dot(weights, value, out, input_precision=INPUT_PRECISION)
    exponentials, correction, row_max, row_sum = _softmax_of_block(scores, row_max, row_sum, scale_log2)
    value = _values_of_block(
        value_ptr, stride_value, num_blocks - 1, length, HEAD_DIM, BLOCK_N, BLOCK_D, False
    )
    out = tl.dot(exponentials.to(dtype), value, out * correction[:, None], input_precision=INPUT_PRECISION)
    return out, row_max, row_sum


@triton.jit(do_not_specialize=["num_sequences"])
def _packed_attention_kernel(
    query_ptr,  # (total_tokens, num_heads, HEAD_DIM), inner two dimensions contiguous
    key_ptr,
    value_ptr,
    out_ptr,  # (total_tokens, num_heads, HEAD_DIM)
    cu_seqlens_ptr,  # (num_sequences + 1,)
    stride_query,  # stride between tokens
    stride_key,
    stride_value,
    stride_out,
    num_sequences,
    scale_log2,  # softmax_scale * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASK_ALL: tl.constexpr,  # one loop instead of two: two copies of the FP32 products spill registers
    OVERLAP: tl.constexpr,  # scores of the next block are formed during the exponentials of this one
    INPUT_PRECISION: tl.constexpr,
):
    start, length, first_query = sequence_of_tile(
        tl.program_id(0), cu_seqlens_ptr, num_sequences, BLOCK_M, BLOCK_S
    )
    if first_query >= length:
        return

    head = tl.program_id(1) * HEAD_DIM
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    query_token = (start + first_query).to(tl.int64)
    row_mask = (first_query + row < length)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + query_token * stride_query + head + row[:, None] * stride_query + dim[None, :],
        mask=row_mask,
        other=0.0,
    )
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    key_start = key_ptr + tl.cast(start, tl.int64) * stride_key + head
    value_start = value_ptr + tl.cast(start, tl.int64) * stride_value + head
    num_full = 0 if MASK_ALL else length // BLOCK_N
    if OVERLAP:
        num_full = tl.where(num_full < 2, 0, num_full)
        if num_full > 0:
            out, row_max, row_sum = _attend_overlapped(
                out, row_max, row_sum, query, key_start, value_start, stride_key, stride_value, num_full,
                length, scale_log2, HEAD_DIM, BLOCK_N, BLOCK_D, INPUT_PRECISION,
            )  # fmt: skip
    else:
        for block in range(0, num_full):
            out, row_max, row_sum = _attend_to_block(
                out, row_max, row_sum, query, key_start, value_start, stride_key, stride_value, block, length,
                scale_log2, HEAD_DIM, BLOCK_N, BLOCK_D, False, INPUT_PRECISION,
            )  # fmt: skip
    # Were this loop pipelined behind the overlapped one, ptxas would let every product there wait.
    for block in tl.range(num_full, tl.cdiv(length, BLOCK_N), num_stages=1 if OVERLAP else None):
        out, row_max, row_sum = _attend_to_block(
            out, row_max, row_sum, query, key_start, value_start, stride_key, stride_value, block, length,
            scale_log2, HEAD_DIM, BLOCK_N, BLOCK_D, True, INPUT_PRECISION,
        )  # fmt: skip

    out = out / row_sum[:, None]
    out_start = out_ptr + query_token * stride_out + head
    tl.store(
        out_start + row[:, None] * stride_out + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=row_mask
    )


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    input_precision: str = "ieee",
) -> torch.Tensor:
    """See `reference.packed_attention`. Softmax and sums in FP32; the grid depends only on shapes.

    Args:
        query, key, value: FP16, BF16 or FP32, contiguous within a token; tokens may be strided.
        softmax_scale: positive, as maxima are taken of unscaled scores.
        input_precision: precision of products of FP32 operands: `ieee`, `tf32`, or `tf32x3` (three TF32
            products, nearly IEEE accuracy).

    Raises:
        ValueError: a tensor is not contiguous within a token, `softmax_scale` is not positive, or
            `input_precision` is unknown.
    """
    total_tokens, num_heads, head_dim = query.shape
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride()[1:] != (head_dim, 1) or tensor.shape != query.shape:
            raise ValueError(
                f"{name} must be {tuple(query.shape)} and contiguous within a token, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    check_contiguous(cu_seqlens=cu_seqlens)
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be above 0, got {softmax_scale}")
    if input_precision not in ("ieee", "tf32", "tf32x3"):
        raise ValueError(f"input_precision {input_precision!r} is not one of 'ieee', 'tf32', 'tf32x3'")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    kernel = "packed_attention"
    if query.dtype == torch.float32 and input_precision != "ieee":
        kernel += f"_{input_precision}"
    heuristic = _heuristic(head_dim, query.dtype, input_precision, launch.capability(query.device))
    settings = launch_settings(kernel, head_dim, query, heuristic)
    num_sequences = cu_seqlens.numel() - 1
    _packed_attention_kernel[(total_tokens // settings["BLOCK_M"] + num_sequences, num_heads)](
        query,
        key,
        value,
        out,
        cu_seqlens,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        out.stride(0),
        num_sequences,
        softmax_scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        BLOCK_S=256,
        MASK_ALL=query.dtype == torch.float32 and input_precision != "tf32",
        INPUT_PRECISION=input_precision,
        **settings,
    )
    return out


def _heuristic(head_dim: int, dtype: torch.dtype, input_precision: str, capability: int) -> Settings:
    """Tiles that do not spill on sm_80 to sm_100 (see the compile table in tests/kernels)."""
    if dtype != torch.float32:
        small = head_dim > (64 if 90 <= capability < 120 else 32)
        block_n, num_stages = (32, 3) if small else (64, 2)
        return {"BLOCK_M": 64, "BLOCK_N": block_n, "OVERLAP": 0, "num_warps": 4, "num_stages": num_stages}
    # With eight warps and heads of 16, each thread has less than 128 bits of a tile.
    block_m, block_n, num_warps = 32, 32, 8 if head_dim > 16 else 4
    if input_precision == "tf32":
        block_m, num_warps = (64, 4) if head_dim <= 64 else (128, 8)
    elif input_precision == "tf32x3" and head_dim > 64:
        block_n = 16
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "OVERLAP": 0, "num_warps": num_warps, "num_stages": 2}


_CANDIDATES = {
    "half": grid(
        "BLOCK_M BLOCK_N num_warps",
        [
            (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (64, 128, 4), (64, 128, 8),
            (128, 32, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8),
        ],
        num_stages=(2, 3, 4),
        OVERLAP=(0,),
    )
    # Tiles for which ptxas overlaps, and nothing spills, on sm_90 at a head_dim of 64 or of 128.
    + grid(
        "BLOCK_M BLOCK_N num_warps",
        [(64, 32, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8)],
        num_stages=(2, 3),
        OVERLAP=(1,),
    ),
    "tf32": grid(
        "BLOCK_M BLOCK_N num_warps",
        [
            (32, 32, 4), (64, 32, 4), (64, 32, 8), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 32, 8),
            (128, 64, 8),
        ],
        num_stages=(1, 2, 3),
    ),
    "fp32": grid(
        "BLOCK_M BLOCK_N num_warps",
        [(16, 16, 4), (32, 16, 4), (32, 16, 8), (32, 32, 4), (32, 32, 8), (64, 16, 8), (64, 32, 8)],
        num_stages=(1, 2),
    ),
}  # fmt: skip


def candidates(dtype: torch.dtype, input_precision: str) -> list[Settings]:
    """Settings to try on a GPU."""
    if dtype != torch.float32:
        return _CANDIDATES["half"]
    return _CANDIDATES["tf32" if input_precision == "tf32" else "fp32"]
