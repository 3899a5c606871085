"""fc1 with its activation: a matrix multiplication whose epilogue adds the bias and applies exact GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from esm_packed.kernels import launch
from esm_packed.kernels.gelu import bias_gelu_, exact_gelu
from esm_packed.kernels.launch import Settings, check_contiguous, grid, launch_settings, num_multiprocessors


@triton.jit
def tile_of(tile, num_row_tiles, NUM_COLUMN_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile, both counted in tiles.

    Neighboring programs take GROUP_M row tiles of one column tile, so that weights are read from L2.
    """
    tiles_per_group: tl.constexpr = GROUP_M * NUM_COLUMN_TILES
    group = tile // tiles_per_group
    rows_in_group = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    row_tile = group * GROUP_M + (tile % tiles_per_group) % rows_in_group
    return row_tile, (tile % tiles_per_group) // rows_in_group


@triton.jit
def multiply_tile(
    input_ptr,  # (total_tokens, IN_FEATURES), or with USE_TMA its descriptor for tiles (BLOCK_M, BLOCK_K)
    weight_ptr,  # (OUT_FEATURES, IN_FEATURES), or for tiles (BLOCK_N, BLOCK_K)
    row,  # first token
    column,  # first row of the weight, for USE_TMA
    dim,  # (BLOCK_N,) rows of the weight
    total_tokens,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """A tile of the product: (BLOCK_M, BLOCK_N) FP32."""
    if not USE_TMA:  # rows beyond the last read the last row and are not stored
        token = row + tl.arange(0, BLOCK_M)
        input_row = tl.minimum(token, total_tokens - 1).to(tl.int64)[:, None] * IN_FEATURES
        weight_row = tl.minimum(dim, OUT_FEATURES - 1).to(tl.int64)[:, None] * IN_FEATURES
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, IN_FEATURES, BLOCK_K):
        if USE_TMA:
            inputs = input_ptr.load([row, step])
            weights = weight_ptr.load([column, step])
        else:
            addend = step + tl.arange(0, BLOCK_K)[None, :]
            in_range = addend < IN_FEATURES
            inputs = tl.load(input_ptr + input_row + addend, mask=in_range, other=0.0)
            weights = tl.load(weight_ptr + weight_row + addend, mask=in_range, other=0.0)
        total = tl.dot(inputs, weights.T, total)
    return total


@triton.jit
def store_tile(
    out_ptr,  # (total_tokens, OUT_FEATURES), or with USE_TMA its descriptor for tiles of this shape
    tile,  # (BLOCK_M, BLOCK_N) FP32
    row,  # first token
    column,  # first column, for USE_TMA
    dim,  # (BLOCK_N,) columns
    in_range,  # (BLOCK_N,) which of them there are
    total_tokens,
    OUT_FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    if USE_TMA:
        out_ptr.store([row, column], tile.to(out_ptr.dtype))
    else:
        token = row + tl.arange(0, BLOCK_M)
        tl.store(
            out_ptr + token.to(tl.int64)[:, None] * OUT_FEATURES + dim[None, :],
            tile.to(out_ptr.dtype.element_ty),
            mask=(token < total_tokens)[:, None] & in_range[None, :],
        )


@triton.jit
def _store_activated(
    out_ptr,  # as in `_gemm_bias_gelu_kernel`
    bias_ptr,
    total,  # (BLOCK_M, BLOCK_N) FP32, of the tile whose first element is at row, column
    row,
    column,
    total_tokens,
    OUT_FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    dim = column + tl.arange(0, BLOCK_N)
    in_range = dim < OUT_FEATURES
    bias = tl.load(bias_ptr + dim, mask=in_range, other=0.0).to(tl.float32)
    activated = exact_gelu(total + bias[None, :])
    store_tile(
        out_ptr, activated, row, column, dim, in_range, total_tokens, OUT_FEATURES, BLOCK_M, USE_TMA
    )  # fmt: skip


@triton.jit(do_not_specialize=["total_tokens"])
def _gemm_bias_gelu_kernel(
    input_ptr,  # as in `multiply_tile`
    weight_ptr,
    out_ptr,  # (total_tokens, OUT_FEATURES), or for tiles (BLOCK_M, BLOCK_N / NUM_STORES)
    bias_ptr,  # (OUT_FEATURES,)
    total_tokens,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_STORES: tl.constexpr,  # 2: a tile is stored in halves, which need half the shared memory
    FLATTEN: tl.constexpr,  # one loop over tiles and products, so that loads are pipelined across tiles
    USE_TMA: tl.constexpr,
):
    num_row_tiles = tl.cdiv(total_tokens, BLOCK_M)
    num_column_tiles: tl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, NUM_PROGRAMS, flatten=FLATTEN):
        row_tile, column_tile = tile_of(tile, num_row_tiles, num_column_tiles, GROUP_M)
        row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
        total = multiply_tile(
            input_ptr, weight_ptr, row, column, column + tl.arange(0, BLOCK_N), total_tokens, IN_FEATURES,
            OUT_FEATURES, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
        )  # fmt: skip
        if NUM_STORES == 1:
            _store_activated(
                out_ptr, bias_ptr, total, row, column, total_tokens, OUT_FEATURES, BLOCK_M, BLOCK_N, USE_TMA
            )
        else:
            HALF_N: tl.constexpr = BLOCK_N // 2
            left, right = total.reshape(BLOCK_M, 2, HALF_N).permute(0, 2, 1).split()
            _store_activated(
                out_ptr, bias_ptr, left, row, column, total_tokens, OUT_FEATURES, BLOCK_M, HALF_N, USE_TMA
            )
            _store_activated(
                out_ptr, bias_ptr, right, row, column + HALF_N, total_tokens, OUT_FEATURES, BLOCK_M, HALF_N,
                USE_TMA,
            )  # fmt: skip


def gemm_bias_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Like `linear_gelu`, in one kernel, for FP16 and BF16. FP32 accumulation, one rounding.

    Tiles are loaded and stored by TMA where the GPU has it. The grid is persistent; the settings give the
    number of programs per multiprocessor.
    """
    check_contiguous(hidden_states=hidden_states, weight=weight, bias=bias)
    total_tokens, in_features = hidden_states.shape
    out_features = weight.shape[0]
    out = torch.empty(total_tokens, out_features, dtype=hidden_states.dtype, device=hidden_states.device)
    settings = launch_settings("gemm_bias_gelu", in_features, hidden_states, HEURISTIC)
    block_m, block_n, block_k = (settings[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    num_tiles = triton.cdiv(total_tokens, block_m) * triton.cdiv(out_features, block_n)
    num_programs = settings.pop("PROGRAMS") * num_multiprocessors(hidden_states.device)
    if num_tiles == 0:  # a descriptor must not be empty
        return out
    use_tma = launch.capability(hidden_states.device) >= 90
    stored = [block_m, block_n // settings["NUM_STORES"]]
    tiles = ((hidden_states, [block_m, block_k]), (weight, [block_n, block_k]), (out, stored))
    _gemm_bias_gelu_kernel[(min(num_programs, num_tiles),)](
        *(TensorDescriptor.from_tensor(tensor, tile) if use_tma else tensor for tensor, tile in tiles),
        bias,
        total_tokens,
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        NUM_PROGRAMS=num_programs,
        USE_TMA=use_tma,
        **settings,
    )
    return out


def linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See `matmul.linear_gelu`: the fused kernel if tuning found it faster on this GPU, else two steps."""
    out_features, in_features = weight.shape
    settings = launch_settings("linear_gelu", in_features, hidden_states, {"FUSED": 0})
    if settings["FUSED"] and out_features == 4 * in_features:  # fc1, for which it was measured
        return gemm_bias_gelu(hidden_states, weight, bias)
    out = F.linear(hidden_states, weight)
    bias_gelu_(out, bias)
    return out


HEURISTIC: Settings = {
    "BLOCK_M": 128,
    "BLOCK_N": 128,
    "BLOCK_K": 64,
    "GROUP_M": 8,
    "PROGRAMS": 1,
    "NUM_STORES": 1,
    "FLATTEN": 0,
    "num_warps": 8,
    "num_stages": 3,
}
_WHOLE_TILES = [
    (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (64, 256, 64, 8, 4), (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 4), (128, 128, 32, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 2), (128, 256, 32, 8, 4),
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
]  # fmt: skip
# While one program activates a tile, only a second program or loads of the next tile keep its multiprocessor
# busy. Stored in halves, large tiles leave shared memory for a fourth stage.
_OVERLAPPED = [
    (128, 128, 64, 4, 2, 2, 1, 0), (128, 128, 64, 8, 2, 2, 1, 0), (128, 128, 64, 8, 3, 1, 1, 1),
    (128, 128, 64, 8, 4, 1, 1, 1), (128, 256, 64, 8, 4, 1, 2, 0), (256, 128, 64, 8, 4, 1, 2, 0),
    (128, 256, 64, 8, 3, 1, 2, 1),
]  # fmt: skip
CANDIDATES = grid(
    "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages PROGRAMS NUM_STORES FLATTEN",
    [*((*tile, 1, 1, 0) for tile in _WHOLE_TILES), *_OVERLAPPED],
    GROUP_M=(8, 16),
)
