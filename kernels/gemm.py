"""fc1 with its activation: a matrix multiplication whose epilogue adds the bias and applies exact GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from esm_packed.kernels.gelu import bias_gelu_, exact_gelu
from esm_packed.kernels.launch import Settings, launch_settings, num_multiprocessors


@triton.jit(do_not_specialize=["total_tokens"])
def _gemm_bias_gelu_kernel(
    input_desc,  # (total_tokens, IN_FEATURES), tiles (BLOCK_M, BLOCK_K)
    weight_desc,  # (OUT_FEATURES, IN_FEATURES), tiles (BLOCK_N, BLOCK_K)
    out_desc,  # (total_tokens, OUT_FEATURES), tiles (BLOCK_M, BLOCK_N)
    bias_ptr,  # (OUT_FEATURES,)
    total_tokens,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_row_tiles = tl.cdiv(total_tokens, BLOCK_M)
    num_column_tiles: tl.constexpr = (OUT_FEATURES + BLOCK_N - 1) // BLOCK_N
    tiles_per_group: tl.constexpr = GROUP_M * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, NUM_PROGRAMS):
        # Neighbouring programs take GROUP_M row tiles of one column tile, so that weights are read from L2.
        group = tile // tiles_per_group
        rows_in_group = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
        row = (group * GROUP_M + (tile % tiles_per_group) % rows_in_group) * BLOCK_M
        column = ((tile % tiles_per_group) // rows_in_group) * BLOCK_N

        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, IN_FEATURES, BLOCK_K):
            inputs = input_desc.load([row, step])
            weights = weight_desc.load([column, step])
            total = tl.dot(inputs, weights.T, total)
        dim = column + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + dim, mask=dim < OUT_FEATURES, other=0.0).to(tl.float32)
        out_desc.store([row, column], exact_gelu(total + bias[None, :]).to(out_desc.dtype))


def gemm_bias_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As `linear_gelu`, in one kernel, for FP16 and BF16. FP32 accumulation, one rounding.

    Tiles travel by TMA where the GPU has it. The grid is persistent: one program per multiprocessor.
    """
    total_tokens, in_features = hidden_states.shape
    out_features = weight.shape[0]
    out = torch.empty(total_tokens, out_features, dtype=hidden_states.dtype, device=hidden_states.device)
    settings = launch_settings("gemm_bias_gelu", in_features, hidden_states, _HEURISTIC)
    block_m, block_n, block_k = (settings[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    num_tiles = triton.cdiv(total_tokens, block_m) * triton.cdiv(out_features, block_n)
    num_programs = num_multiprocessors(hidden_states.device)
    if num_tiles == 0:  # a descriptor cannot be empty
        return out
    _gemm_bias_gelu_kernel[(min(num_programs, num_tiles),)](
        TensorDescriptor.from_tensor(hidden_states, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        TensorDescriptor.from_tensor(out, [block_m, block_n]),
        bias,
        total_tokens,
        IN_FEATURES=in_features,
        OUT_FEATURES=out_features,
        NUM_PROGRAMS=num_programs,
        **settings,
    )
    return out


def linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See `matmul.linear_gelu`: the fused kernel where tuning found it faster here, else two steps."""
    settings = launch_settings("linear_gelu", weight.shape[1], hidden_states, {"FUSED": 0})
    if settings["FUSED"]:
        return gemm_bias_gelu(hidden_states, weight, bias)
    out = F.linear(hidden_states, weight)
    bias_gelu_(out, bias)
    return out


_HEURISTIC: Settings = {
    "BLOCK_M": 128,
    "BLOCK_N": 128,
    "BLOCK_K": 64,
    "GROUP_M": 8,
    "num_warps": 8,
    "num_stages": 3,
}
