"""Bias and exact GELU, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esm_packed.kernels.intrinsics import reciprocal
from esm_packed.kernels.launch import Settings, check_contiguous, grid, launch_settings, tiles


@triton.jit
def exact_gelu(x):
    """x/2 * (1 + erf(x / sqrt 2)) of FP32 values, as max(x, 0) - |x| * erfc(|x| / sqrt 2) / 2.

    erfc is exp(-x^2 / 2) times a polynomial in t = 1 / (1 + 0.275 |x|), the form of Abramowitz and Stegun
    7.1.26, refitted. Unlike 1 + erf it loses no digits to cancellation (tests/kernels/test_gelu.py checks
    every FP16 number), and it takes fewer instructions than `tl.erf`. Infinities become NaN.
    """
    magnitude = tl.abs(x)
    t = reciprocal(1.0 + 0.275 * magnitude)
    tail = -0.12342146506854368
    tail = tail * t + 0.49350882505121313
    tail = tail * t - 0.41419707544961
    tail = tail * t + 0.4221814092022431
    tail = tail * t - 0.01011506189955115
    tail = tail * t + 0.13415786754420891
    tail = tail * t - 0.002114461057598588
    return tl.maximum(x, 0.0) - magnitude * (tail * tl.exp2(x * x * -0.7213475204444817))


@triton.jit(do_not_specialize=["total_tokens"])
def _bias_gelu_kernel(
    hidden_states_ptr,  # (total_tokens, WIDTH), modified
    bias_ptr,  # (WIDTH,)
    total_tokens,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Column blocks are the fast axis of the grid, folded into axis 0, which alone may exceed 65,535.
    num_column_blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    dim = (program % num_column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    token = (program // num_column_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (token < total_tokens)[:, None] & (dim < WIDTH)
    pointer = hidden_states_ptr + token.to(tl.int64)[:, None] * WIDTH + dim

    bias = tl.load(bias_ptr + dim, mask=dim < WIDTH, other=0.0).to(tl.float32)
    value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) + bias
    tl.store(pointer, exact_gelu(value).to(hidden_states_ptr.dtype.element_ty), mask=mask)


def bias_gelu_(hidden_states: torch.Tensor, bias: torch.Tensor) -> None:
    """See `reference.bias_gelu_`; contiguous, else ValueError. FP32 arithmetic."""
    total_tokens, width = hidden_states.shape
    check_contiguous(hidden_states=hidden_states, bias=bias)
    if bias.shape != (width,):
        raise ValueError(f"bias must be ({width},), got {tuple(bias.shape)}")
    settings = launch_settings("bias_gelu_", width, hidden_states, _heuristic(hidden_states.dtype))
    num_row_blocks = triton.cdiv(total_tokens, settings["BLOCK_T"])
    _bias_gelu_kernel[(num_row_blocks * triton.cdiv(width, settings["BLOCK_N"]),)](
        hidden_states, bias, total_tokens, WIDTH=width, **settings
    )


def _heuristic(dtype: torch.dtype) -> Settings:
    # 32 bytes per thread
    return {"BLOCK_T": 32 // dtype.itemsize // 2, "BLOCK_N": 256, "num_warps": 4}


CANDIDATES = grid(
    "BLOCK_T BLOCK_N num_warps", tiles((2, 4, 8, 16), (128, 256, 512, 1024), (4, 8), least=8, most=32)
)
