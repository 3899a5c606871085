"""Instructions of NVIDIA GPUs that Triton does not offer by name, and what stands for them elsewhere."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda


@triton.constexpr_function
def has_ptx():
    """Whether a kernel may hold PTX: not in Triton's interpreter, nor on AMD GPUs."""
    return not triton.knobs.runtime.interpret and is_cuda()


@triton.jit
def reciprocal(x):
    """1 / x of FP32 values, to 1 ulp in one instruction; subnormal values count as zero."""
    if has_ptx():
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / x
    return result


@triton.jit
def copied(x):
    """FP32 values, copied at this place into registers of their own.

    A loop that carries a product to its next round would otherwise read the product's registers while tensor
    cores still write them. ptxas then lets every product of the kernel wait for the one before.
    """
    if has_ptx():
        result = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        result = x
    return result
