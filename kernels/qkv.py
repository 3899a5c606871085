"""The QKV projection: a matrix multiplication whose epilogue adds the bias and rotates queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from esm_packed.kernels import gemm, launch
from esm_packed.kernels.gemm import multiply_tile, store_tile, tile_of
from esm_packed.kernels.launch import (
    check_contiguous,
    launch_settings,
    next_power_of_2,
    num_multiprocessors,
)
from esm_packed.kernels.rotary import check_positions, check_tables, rotary_qk_


@triton.jit
def _rotated(
    tile,  # (BLOCK_M, BLOCK_N) FP32, of whole heads
    cos_ptr,  # (max_positions, HALF)
    sin_ptr,
    position,  # (BLOCK_M,)
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dim = tl.arange(0, PADDED_HALF)
    angle = position.to(tl.int64)[:, None] * HALF + dim[None, :]
    mask = (dim < HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)[:, None, :]  # (BLOCK_M, 1, PADDED_HALF)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)[:, None, :]
    heads = tile.reshape(BLOCK_M, BLOCK_N // (2 * PADDED_HALF), 2, PADDED_HALF)
    first, second = heads.permute(0, 1, 3, 2).split()
    rotated = tl.join(first * cos - second * sin, second * cos + first * sin)
    return rotated.permute(0, 1, 3, 2).reshape(BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["total_tokens"])
def _gemm_bias_rotary_kernel(
    input_ptr,  # (total_tokens, IN_FEATURES), or with USE_TMA its descriptor for tiles (BLOCK_M, BLOCK_K)
    weight_ptr,  # (3 * HIDDEN_SIZE, IN_FEATURES), or for tiles (BLOCK_N, BLOCK_K)
    out_ptr,  # (total_tokens, 3 * HIDDEN_SIZE), or for tiles (BLOCK_M, BLOCK_N)
    bias_ptr,  # (3 * HIDDEN_SIZE,)
    cos_ptr,  # (max_positions, HALF)
    sin_ptr,
    position_ids_ptr,  # (total_tokens,)
    total_tokens,
    IN_FEATURES: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    HALF: tl.constexpr,  # of a head
    PADDED_HALF: tl.constexpr,  # power of two: each half of a head takes so many columns of a tile
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,  # one loop over tiles and products, so that loads are pipelined across tiles
    USE_TMA: tl.constexpr,
):
    # Values begin a tile of their own, so that a tile is rotated as a whole or not at all.
    padded_size: tl.constexpr = HIDDEN_SIZE // HALF * PADDED_HALF
    num_rotated: tl.constexpr = (2 * padded_size + BLOCK_N - 1) // BLOCK_N
    num_column_tiles: tl.constexpr = num_rotated + (padded_size + BLOCK_N - 1) // BLOCK_N
    num_row_tiles = tl.cdiv(total_tokens, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, NUM_PROGRAMS, flatten=FLATTEN):
        row_tile, column_tile = tile_of(tile, num_row_tiles, num_column_tiles, GROUP_M)
        is_rotated = column_tile < num_rotated
        first = tl.where(is_rotated, 0, 2 * HIDDEN_SIZE)
        index = tl.where(is_rotated, column_tile, column_tile - num_rotated) * BLOCK_N
        row, column = row_tile * BLOCK_M, first + index
        padded = index + tl.arange(0, BLOCK_N)
        dim = first + padded // PADDED_HALF * HALF + padded % PADDED_HALF
        token = tl.minimum(row + tl.arange(0, BLOCK_M), total_tokens - 1)
        position = tl.load(position_ids_ptr + token)
        total = multiply_tile(
            input_ptr, weight_ptr, row, column, dim, total_tokens, IN_FEATURES, 3 * HIDDEN_SIZE, BLOCK_M,
            BLOCK_N, BLOCK_K, USE_TMA,
        )  # fmt: skip

        end = tl.where(is_rotated, 2 * HIDDEN_SIZE, 3 * HIDDEN_SIZE)
        in_range = (padded % PADDED_HALF < HALF) & (dim < end)
        total += tl.load(bias_ptr + dim, mask=in_range, other=0.0).to(tl.float32)[None, :]
        if is_rotated:
            total = _rotated(total, cos_ptr, sin_ptr, position, HALF, PADDED_HALF, BLOCK_M, BLOCK_N)
        store_tile(
            out_ptr, total, row, column, dim, in_range, total_tokens, 3 * HIDDEN_SIZE, BLOCK_M, USE_TMA
        )


def gemm_bias_rotary(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Like `linear_rotary`, in one kernel, for FP16 and BF16. FP32 accumulation, one rounding.

    Tiles hold whole heads. They are loaded and stored by TMA where the GPU has it, the halves of a head are a
    power of two, and keys end with a tile. The grid is persistent, as that of `gemm.gemm_bias_gelu`.

    Raises:
        ValueError: a tensor is not contiguous, the tables are not FP32, positions are missing, or a head is
            wider than a tile.
    """
    check_contiguous(hidden_states=hidden_states, weight=weight, bias=bias, position_ids=position_ids)
    total_tokens, in_features = hidden_states.shape
    hidden_size, half = weight.shape[0] // 3, cos.shape[1]
    padded_half = next_power_of_2(half)
    check_tables(cos, sin, 2 * half)
    check_positions(position_ids, total_tokens)
    settings = launch_settings("gemm_bias_rotary", in_features, hidden_states, _HEURISTIC)
    block_m, block_n, block_k = (settings[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    if 2 * padded_half > block_n:
        raise ValueError(f"heads of {2 * half} are wider than a tile of {block_n} columns")
    out = torch.empty(total_tokens, 3 * hidden_size, dtype=hidden_states.dtype, device=hidden_states.device)
    padded_size = hidden_size // half * padded_half
    num_column_tiles = triton.cdiv(2 * padded_size, block_n) + triton.cdiv(padded_size, block_n)
    num_tiles = triton.cdiv(total_tokens, block_m) * num_column_tiles
    num_programs = settings.pop("PROGRAMS") * num_multiprocessors(hidden_states.device)
    if num_tiles == 0:  # a descriptor must not be empty
        return out
    # By TMA, a tile in which keys end would overwrite values.
    use_tma = (
        launch.capability(hidden_states.device) >= 90
        and half == padded_half
        and 2 * hidden_size % block_n == 0
    )
    tiles = ((hidden_states, [block_m, block_k]), (weight, [block_n, block_k]), (out, [block_m, block_n]))
    _gemm_bias_rotary_kernel[(min(num_programs, num_tiles),)](
        *(TensorDescriptor.from_tensor(tensor, tile) if use_tma else tensor for tensor, tile in tiles),
        bias,
        cos,
        sin,
        position_ids,
        total_tokens,
        IN_FEATURES=in_features,
        HIDDEN_SIZE=hidden_size,
        HALF=half,
        PADDED_HALF=padded_half,
        NUM_PROGRAMS=num_programs,
        USE_TMA=use_tma,
        **settings,
    )
    return out


def linear_rotary(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    interleaved: bool = False,
) -> torch.Tensor:
    """See `matmul.linear_rotary`: the fused kernel if tuning found it faster on this GPU, else two steps.

    Raises:
        ValueError: the heads are interleaved.
    """
    if interleaved:
        raise ValueError("interleaved heads are for a CPU; on a GPU weight and bias keep their order")
    out_features, in_features = weight.shape
    settings = launch_settings("linear_rotary", in_features, hidden_states, {"FUSED": 0})
    head_dim = 2 * cos.shape[1]
    # Only the shapes for which it was measured: the tiles of all candidates hold heads of 128.
    if settings["FUSED"] and out_features == 3 * in_features and head_dim <= MIN_BLOCK_N:
        return gemm_bias_rotary(hidden_states, weight, bias, cos, sin, position_ids)
    out = F.linear(hidden_states, weight, bias)
    rotary_qk_(out.view(len(out), 3, out_features // (3 * head_dim), head_dim), cos, sin, position_ids)
    return out


MIN_BLOCK_N = 128
"""Tiles hold whole heads of every ESM-2."""

_HEURISTIC, *CANDIDATES = (
    {name: value for name, value in settings.items() if name != "NUM_STORES"}
    for settings in (gemm.HEURISTIC, *gemm.CANDIDATES)
    if settings["NUM_STORES"] == 1 and settings["BLOCK_N"] >= MIN_BLOCK_N
)
