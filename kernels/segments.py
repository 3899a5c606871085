"""Which sequence a packed token or a tile of tokens belongs to, found inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_bounds(cu_seqlens_ptr, num_sequences, tokens, BLOCK_S: tl.constexpr):
    """First token of each token's sequence, and the first token after it.

    All of `cu_seqlens` is compared: unlike in a binary search, the loads do not depend on each other.

    Args:
        cu_seqlens_ptr: (num_sequences + 1,) int32.
        tokens: (BLOCK_T,) int32, indices into the packed tokens.
        BLOCK_S: boundaries compared in one step.

    Returns:
        Two (BLOCK_T,) int32; for tokens beyond the last sequence the second is 2**31 - 1.
    """
    # tokens * 0, so that interpreter and compiler agree on type and layout of the loop-carried value.
    starts = tokens * 0
    ends = tokens * 0 + 2147483647
    for first in range(0, num_sequences + 1, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)
        bounds = tl.load(cu_seqlens_ptr + index, mask=index <= num_sequences, other=2147483647)
        before = bounds[None, :] <= tokens[:, None]  # (BLOCK_T, BLOCK_S)
        starts = tl.maximum(starts, tl.max(tl.where(before, bounds[None, :], 0), axis=1))
        ends = tl.minimum(ends, tl.min(tl.where(before, 2147483647, bounds[None, :]), axis=1))
    return starts, ends


@triton.jit
def sequence_of_tile(tile, cu_seqlens_ptr, num_sequences, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """First token and length of the sequence that owns a tile, and the tile's first query in it."""
    # Sequence i owns the tiles from cu_seqlens[i] // BLOCK_M + i on. These always suffice, at most one is
    # idle, and their owner follows from cu_seqlens alone, without a table of tiles or a prefix sum.
    start = 0
    end = 2147483647
    first_tile = 0
    for first in range(0, num_sequences + 1, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)
        bounds = tl.load(cu_seqlens_ptr + index, mask=index <= num_sequences, other=2147483647)
        tiles = bounds // BLOCK_M + index
        reached = tiles <= tile
        start = tl.maximum(start, tl.max(tl.where(reached, bounds, 0), axis=0))
        end = tl.minimum(end, tl.min(tl.where(reached, 2147483647, bounds), axis=0))
        first_tile = tl.maximum(first_tile, tl.max(tl.where(reached, tiles, 0), axis=0))
    # Tokens after the last sequence, as in a captured graph, have no end.
    length = tl.where(end == 2147483647, 0, end - start)
    first_query = (tile - first_tile) * BLOCK_M
    return start, length, first_query
