"""Outputs of a forward pass, by their names in `outputs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from esm_packed import kernels
from esm_packed.alphabet import AMINO_ACID_IDS
from esm_packed.contacts import upper_triangle
from esm_packed.kernels.reference import statistics_dtype
from esm_packed.outputs import LOG_PROBABILITIES, is_ragged, kind_of, layer_of
from esm_packed.packing import PackedBatch

if TYPE_CHECKING:
    from esm_packed.model import PackedOutput

FINITE = "finite"
"""Whether all rows of a sequence are finite; computed along with ragged outputs."""


def kept_outputs(
    output: PackedOutput,
    batch: PackedBatch,
    names: Sequence[str],
    residue_dtype: torch.dtype | None = None,
    contacts: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """Compute the requested outputs of a forward pass.

    Args:
        output: with the layers, and the logits, that `names` need.
        batch: what was computed.
        names: of the outputs.
        residue_dtype: of ragged outputs; None for the one they are computed in, which for BF16 is FP32, as
            NumPy has no BF16.
        contacts: (num_residues, num_residues) of each sequence, if `names` need them.

    Returns:
        By name: (num_sequences, columns) FP32 (FP64 for FP64), (total_tokens, columns) rows of all tokens,
        BOS, EOS and padding included, or (total_pairs, 1) of the sequences one after the other, each as
        `upper_triangle` gives it. Log-probabilities are (num_rows, 20) FP32 (FP64 for FP64) of `batch.rows`,
        in nats, normalized over all 33 tokens. With ragged ones also `FINITE`, (num_sequences,) bool.
    """
    kept, finite = {}, []
    for name in names:
        kind, layer = kind_of(name), layer_of(name)
        if kind == "contacts":
            triangles = [upper_triangle(matrix) for matrix in contacts]
            finite.append(torch.stack([pairs.sum() for pairs in triangles]).isfinite())
            kept[name] = torch.cat(triangles)[:, None].to(residue_dtype or triangles[0].dtype)
            continue
        rows = output.logits if layer is None else output.representations[layer]
        assert rows is not None
        if name == LOG_PROBABILITIES:
            kept[name] = rows = log_probabilities_of(rows)[:, AMINO_ACID_IDS]
            finite.append(_are_finite(rows, batch))
            continue
        if kind == "unmasked_nll":
            rows, kind = _negative_log_likelihood(rows, batch.input_ids), "mean"
        if kind == "logits":
            rows = rows[:, AMINO_ACID_IDS].contiguous()
        if is_ragged(name):
            dtype = residue_dtype or (torch.float32 if rows.dtype == torch.bfloat16 else rows.dtype)
            kept[name] = rows = rows.to(dtype)
            # a sum is finite only if each of its terms is
            finite.append(kernels.segment_mean(rows, batch.cu_seqlens)[batch.segments].isfinite().all(1))
        elif kind == "bos":
            first = batch.cu_seqlens[:-1].clamp(max=batch.total_tokens - 1)
            kept[name] = rows[first][batch.segments].to(statistics_dtype(rows.dtype))
        else:
            pool = kernels.segment_mean if kind == "mean" else kernels.segment_max
            kept[name] = pool(rows, batch.cu_seqlens)[batch.segments]
    if finite:
        kept[FINITE] = torch.stack(finite).all(0)
    return kept


def _negative_log_likelihood(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """(total_tokens, 1) of each token, in nats."""
    return -log_probabilities_of(logits).gather(1, input_ids[:, None].long())


def _are_finite(values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """(num_sequences,) bool, whether all outputs of a sequence are finite."""
    assert batch.rows is not None
    sequences = torch.searchsorted(batch.cu_seqlens, batch.rows.to(torch.int32), right=True) - 1
    faults = torch.zeros(batch.cu_seqlens.numel() - 1, device=values.device)
    faults.index_add_(0, sequences, (~values.isfinite().all(1)).to(faults.dtype))
    return faults[batch.segments] == 0


def log_probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """(num_rows, vocab_size) FP32 (FP64 for FP64) log-probabilities of all tokens, in nats."""
    return logits.to(statistics_dtype(logits.dtype)).log_softmax(1)
