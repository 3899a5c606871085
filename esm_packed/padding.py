"""Sequences padded to a common length, for comparison with packing and as a fallback.

A padded batch has a row of `max_seqlen` tokens for each sequence. It is a packed batch all the same: a row is
two segments, the sequence and its padding, so that embedding, token dropout and pooling see the sequence
alone, while the matrix multiplications and the attention pay for the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from esm_packed.alphabet import BOS_ID, EOS_ID, PAD_ID
from esm_packed.attention import extend_keys
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch


def plan_padded(lengths: npt.ArrayLike, token_budget: int) -> list[npt.NDArray[np.int64]]:
    """Batches of sequences of similar length, as in fair-esm's `esm-extract`.

    Args:
        lengths: (num_sequences,) tokens of each sequence, BOS and EOS included.
        token_budget: most tokens a batch may hold, padding included; a longer sequence is a batch of its own.

    Returns:
        For each batch the indices of its sequences, longest first, ties in input order.

    Raises:
        ValueError: the budget is not positive.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if token_budget < 1:
        raise ValueError(f"token_budget must be positive, got {token_budget}")
    longest_first = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(lengths):
        count = max(1, token_budget // int(lengths[longest_first[start]]))
        batches.append(longest_first[start : start + count])
        start += count
    return batches


def pad(token_ids: Sequence[npt.NDArray[np.uint8]]) -> PackedBatch:
    """Lay sequences out in rows as long as the longest one, in the order given, on the CPU.

    Args:
        token_ids: for each sequence a (num_residues,) uint8 array as `alphabet.encode` gives it.

    Returns:
        2 * num_sequences segments; those of even number are the sequences, the others their padding.

    Raises:
        ValueError: there is no sequence.
    """
    if not token_ids:
        raise ValueError("token_ids is empty: a batch holds at least one sequence")
    lengths = np.array([len(ids) + SPECIAL_TOKENS for ids in token_ids])
    max_seqlen = int(lengths.max())
    rows = np.full((len(token_ids), max_seqlen), PAD_ID, dtype=np.int32)
    rows[:, 0] = BOS_ID
    for row, ids in zip(rows, token_ids, strict=True):
        row[1 : len(ids) + 1] = ids
        row[len(ids) + 1] = EOS_ID
    starts = max_seqlen * np.arange(len(token_ids))
    segments = np.stack([starts, starts + lengths], axis=1).ravel()
    return PackedBatch(
        torch.from_numpy(rows.ravel()),
        torch.from_numpy(np.append(segments, rows.size).astype(np.int32)),
        max_seqlen,
        segments=slice(None, None, 2),
    )


def padded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Attention over the rows of a padded batch, with padding masked out; an `attention.PackedAttention`."""
    num_heads, head_dim = query.shape[1:]
    lengths = cu_seqlens.diff()[::2]
    shape = (-1, max_seqlen, num_heads, head_dim)
    keys, values = extend_keys(key.reshape(shape), value.reshape(shape))
    is_token = torch.arange(keys.shape[1], device=query.device) < lengths[:, None]
    attended = F.scaled_dot_product_attention(
        query.reshape(shape).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=is_token[:, None, None, :],
        scale=softmax_scale,
    )
    return attended.transpose(1, 2).reshape(-1, num_heads, head_dim)
