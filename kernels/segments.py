"""Which sequence a packed token belongs to, found inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_bounds(cu_seqlens_ptr, num_sequences, tokens, BLOCK_S: tl.constexpr):
    """First token of each token's sequence, and the first token after it.

    All of `cu_seqlens` is compared at once: unlike a binary search's, its loads do not wait for each other.

    Args:
        cu_seqlens_ptr: (num_sequences + 1,) int32.
        tokens: (BLOCK_T,) int32, indices into the packed tokens.
        BLOCK_S: boundaries looked at in one step.

    Returns:
        Two (BLOCK_T,) int32; for tokens beyond the last sequence the second is 2**31 - 1.
    """
    # tokens * 0, for Triton's interpreter and compiler agree on the type and layout of what a loop carries.
    starts = tokens * 0
    ends = tokens * 0 + 2147483647
    for first in range(0, num_sequences + 1, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)
        bounds = tl.load(cu_seqlens_ptr + index, mask=index <= num_sequences, other=2147483647)
        before = bounds[None, :] <= tokens[:, None]  # (BLOCK_T, BLOCK_S)
        starts = tl.maximum(starts, tl.max(tl.where(before, bounds[None, :], 0), axis=1))
        ends = tl.minimum(ends, tl.min(tl.where(before, 2147483647, bounds[None, :]), axis=1))
    return starts, ends
