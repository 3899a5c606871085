"""Every operation in plain PyTorch: used on the CPU, and the reference of tests and benchmarks.

Sequences lie end to end; `cu_seqlens` (num_sequences + 1,) int32 says where each begins.
Statistics, softmax, angles and pooling are formed in FP32, in FP64 where the tensors are FP64.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

TRAINED_KEEP_RATIO = 1 - 0.15 * 0.8
"""Share of embeddings that survived masking when ESM-2 was trained: 15% chosen, 80% of these zeroed."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype for tensors of `dtype`: FP64 for FP64, FP32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def embed_tokens(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    weight: torch.Tensor,
    mask_id: int | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed tokens with ESM-2's token dropout and restart positions at every sequence.

    Each sequence's embeddings are scaled by (1 - 0.15 * 0.8) / (1 - masked / tokens), counted over that
    sequence alone with BOS and EOS, and rows of `<mask>` are zero (fair-esm 2.0.0, `ESM2.forward`). This is
    no random dropout: it is active at inference.

    Args:
        input_ids: (total_tokens,) int32 or int64.
        cu_seqlens: (num_sequences + 1,) int32.
        weight: (vocab_size, hidden_size).
        mask_id: token id of `<mask>`; None leaves the embeddings unscaled.
        out_dtype: dtype of the residual stream.

    Returns:
        (total_tokens, hidden_size) `out_dtype` embeddings and (total_tokens,) int32 `position_ids`, 0 at BOS.
    """
    lengths = cu_seqlens.diff()
    position_ids, sequence = _position_ids(cu_seqlens, input_ids.numel())
    embeddings = F.embedding(input_ids, weight)
    if mask_id is not None:
        dtype = statistics_dtype(weight.dtype)
        is_mask = input_ids == mask_id
        num_masked = torch.zeros(lengths.numel(), dtype=dtype, device=weight.device)
        num_masked.index_add_(0, sequence, is_mask.to(dtype))
        scale = TRAINED_KEEP_RATIO / (1 - num_masked / lengths)
        embeddings = embeddings * scale[sequence].masked_fill(is_mask, 0)[:, None]
    return embeddings.to(out_dtype), position_ids


def _position_ids(cu_seqlens: torch.Tensor, total_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Position of each token in its sequence, int32, and the sequence's index; both (total_tokens,)."""
    device = cu_seqlens.device
    sequence = torch.arange(cu_seqlens.numel() - 1, device=device).repeat_interleave(
        cu_seqlens.diff(), output_size=total_tokens
    )
    tokens = torch.arange(total_tokens, dtype=torch.int32, device=device)
    return tokens - cu_seqlens[:-1][sequence], sequence


def rotary_qk_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor) -> None:
    """Rotate queries and keys in place by their position, rotate-half layout (Su et al. 2021, RoFormer).

    Args:
        qkv: (total_tokens, 3, num_heads, head_dim); queries and keys are modified, values are not.
        cos, sin: (max_positions, head_dim / 2) FP32, FP64 for FP64 `qkv`.
        position_ids: (total_tokens,) int32.
    """
    cos = cos.index_select(0, position_ids)[:, None, None, :]
    sin = sin.index_select(0, position_ids)[:, None, None, :]
    # converted at once: arithmetic of mixed dtypes is slow on a CPU
    first, second = qkv[:, :2].to(cos.dtype).chunk(2, dim=-1)
    rotated_first = torch.addcmul(first * cos, second, sin, value=-1)
    out_first, out_second = qkv[:, :2].chunk(2, dim=-1)
    out_second.copy_(torch.addcmul(second * cos, first, sin))
    out_first.copy_(rotated_first)


def rotary_qk_interleaved_(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor
) -> None:
    """As `rotary_qk_`, where a head's two halves alternate, as `matmul.interleave_heads_` orders them.

    Each pair that is rotated is one complex number then, which a CPU multiplies in one pass. The heads of a
    token's queries and keys lie end to end; tokens may be strided.
    """
    # Torch multiplies contiguous numbers in vectors, and the rest of a thread's share one by one, where it
    # rounds in another way. With a gap behind each number it takes all one by one, however work is divided.
    cos, sin = cos.index_select(0, position_ids), sin.index_select(0, position_ids)
    tables = torch.stack([cos, sin, cos, sin], -1)
    rotations = torch.view_as_complex(tables.view(*tables.shape[:2], 2, 2))[:, :, 0]
    queries_and_keys = qkv[:, :2].view(len(qkv), 2 * qkv.shape[2], qkv.shape[3])
    converted = queries_and_keys.to(cos.dtype)
    pairs = converted.view(*converted.shape[:2], cos.shape[1], 2)
    torch.view_as_complex(pairs).mul_(rotations[:, None])
    if converted is not queries_and_keys:
        queries_and_keys.copy_(converted)


def rotary_qk_packed_(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    """As `rotary_qk_`, with positions that restart at every boundary.

    Args:
        qkv, cos, sin: as for `rotary_qk_`.
        cu_seqlens: (num_sequences + 1,) int32.
    """
    rotary_qk_(qkv, cos, sin, _position_ids(cu_seqlens, len(qkv))[0])


def layer_norm(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """LayerNorm with statistics in FP32 (FP64 for FP64), result in the dtype of `weight`.

    Args:
        hidden_states: (total_tokens, hidden_size), any float dtype.
        weight, bias: (hidden_size,).
        eps: added to the variance.

    Returns:
        (total_tokens, hidden_size) in the dtype of `weight`.
    """
    if hidden_states.dtype == weight.dtype:
        return F.layer_norm(hidden_states, weight.shape, weight, bias, eps)
    dtype = statistics_dtype(hidden_states.dtype)
    normalized = F.layer_norm(hidden_states.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return normalized.to(weight.dtype)


def add_layer_norm_(
    delta: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`residual += delta` in place, then LayerNorm of the sum before it was rounded.

    Args:
        delta: (total_tokens, hidden_size) in the dtype of `weight`.
        residual: (total_tokens, hidden_size), that dtype or FP32; modified.
        weight, bias: (hidden_size,).
        eps: added to the variance.

    Returns:
        (total_tokens, hidden_size) in the dtype of `weight`.
    """
    if residual.dtype == statistics_dtype(residual.dtype):
        total = residual.add_(delta)
    else:
        total = residual.float() + delta.float()
        residual.copy_(total)
    return layer_norm(total, weight, bias, eps)


def bias_gelu_(hidden_states: torch.Tensor, bias: torch.Tensor) -> None:
    """GELU of `hidden_states + bias` in its exact form, x/2 * (1 + erf(x / sqrt 2)), in place.

    Args:
        hidden_states: (total_tokens, width), modified.
        bias: (width,).
    """
    hidden_states.copy_(F.gelu(hidden_states.to(statistics_dtype(hidden_states.dtype)) + bias))


def segment_mean(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Mean over the residues of each sequence, without BOS and EOS.

    Args:
        hidden_states: (total_tokens, hidden_size).
        cu_seqlens: (num_sequences + 1,) int32; every sequence has at least one residue between BOS and EOS.

    Returns:
        (num_sequences, hidden_size) FP32, FP64 for FP64.
    """
    dtype = statistics_dtype(hidden_states.dtype)
    bounds = cu_seqlens.tolist()
    means = torch.empty(len(bounds) - 1, hidden_states.shape[1], dtype=dtype, device=hidden_states.device)
    for mean, (start, end) in zip(means, pairwise(bounds), strict=True):
        torch.mean(hidden_states[start + 1 : max(start + 1, end - 1)], 0, dtype=dtype, out=mean)
    return means


def segment_max(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Maximum over the residues of each sequence, without BOS and EOS; NaN where any of them is NaN.

    Args:
        hidden_states: (total_tokens, hidden_size).
        cu_seqlens: (num_sequences + 1,) int32.

    Returns:
        (num_sequences, hidden_size) FP32, FP64 for FP64; -inf for a sequence without residues.
    """
    bounds = cu_seqlens.tolist()
    maxima = hidden_states.new_full(
        (len(bounds) - 1, hidden_states.shape[1]),
        float("-inf"),
        dtype=statistics_dtype(hidden_states.dtype),
    )
    for maximum, (start, end) in zip(maxima, pairwise(bounds), strict=True):
        if end - start > 2:
            maximum.copy_(hidden_states[start + 1 : end - 1].amax(0))
    return maxima


def attention_probabilities(query: torch.Tensor, key: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    """softmax(query key^T * softmax_scale) of one sequence.

    Args:
        query, key: (seqlen, num_heads, head_dim).

    Returns:
        (num_heads, seqlen, seqlen) FP32, FP64 for FP64.
    """
    dtype = statistics_dtype(query.dtype)
    scores = torch.einsum("qhd,khd->hqk", query.to(dtype) * softmax_scale, key.to(dtype))
    return scores.softmax(-1)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    input_precision: str = "ieee",
) -> torch.Tensor:
    """Bidirectional attention of every sequence with itself, materializing all scores.

    Args:
        query, key, value: (total_tokens, num_heads, head_dim).
        cu_seqlens: (num_sequences + 1,) int32.
        max_seqlen: of the interface that attention backends share; not needed here.
        softmax_scale: factor on the scores, head_dim^-0.5 in ESM-2.
        input_precision: not obeyed here, where FP32 follows torch's global switches; see `attention`.

    Returns:
        (total_tokens, num_heads, head_dim).
    """
    bounds = cu_seqlens.tolist()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start, end in pairwise(bounds):
        probabilities = attention_probabilities(query[start:end], key[start:end], softmax_scale)
        out[start:end] = torch.einsum("hqk,khd->qhd", probabilities, value[start:end].to(probabilities.dtype))
    return out


MAP_TILE = 1 << 19
"""Probabilities that `add_attention_maps_` holds at once at most, in rows of all heads."""


def add_attention_maps_(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Add a weighted sum of the heads' attention maps to `scores`, and sum each map by rows and columns.

    Only residues count: of the maps, whose rows sum to one with BOS and EOS, these rows and columns are cut
    off. No map is held in full.

    Args:
        query, key: (total_tokens, num_heads, head_dim), rotated.
        weight: (num_heads,) FP32, FP64 for FP64.
        scores: (total_tokens, max_seqlen - 2) in the dtype of `weight`, modified: at the token of residue i,
            column j holds the sum for residues i and j of its sequence. What lies beyond is left alone.
        cu_seqlens: (num_sequences + 1,) int32.
        max_seqlen: tokens of the longest sequence.
        softmax_scale: factor on the products of queries and keys, head_dim^-0.5 in ESM-2.

    Returns:
        (total_tokens, num_heads) in the dtype of `weight`: the sum of a residue's row and of its column in
        the map of each head; 0 for BOS and EOS.
    """
    num_heads, dtype = query.shape[1], weight.dtype
    sums = scores.new_zeros(query.shape[:2])
    for start, end in pairwise(cu_seqlens.tolist()):
        if end - start <= 2:
            continue
        residues = slice(start + 1, end - 1)
        keys = key[start:end].to(dtype).permute(1, 2, 0)
        num_rows = max(1, MAP_TILE // (num_heads * (end - start)))
        for first in range(start + 1, end - 1, num_rows):
            rows = slice(first, min(first + num_rows, end - 1))
            queries = (query[rows].to(dtype) * softmax_scale).transpose(0, 1)
            maps = queries @ keys
            torch.softmax(maps, -1, out=maps)
            weighted = (weight @ maps.view(num_heads, -1)).view(maps.shape[1:])
            scores[rows, : end - start - 2] += weighted[:, 1:-1]
            sums[rows] += maps[..., 1:-1].sum(-1).T
            sums[residues] += maps.sum(1)[:, 1:-1].T
    return sums
