"""The kernels that are timed, and what PyTorch offers in place of each, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from esm_packed import kernels
from esm_packed.attention import sdpa_attention
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.kernels import reference
from esm_packed.kernels.cases import CASES, HALF_DTYPES, Case, Workload

MODEL_SIZES: dict[str, ESM2Config] = {name.split("_")[2]: config for name, config in ESM2_MODELS.items()}
"""`8M`, `35M`, `150M`, `650M`, `3B`, `15B` to the model's shape."""

KERNELS: dict[str, Case] = {
    case.name: case
    for case in (
        *(case for case in CASES.values() if not case.chooses),
        replace(
            CASES["add_layer_norm_"],
            name="add_layer_norm_half_residual_",
            dtypes=HALF_DTYPES,
            residual_dtype=None,
        ),
    )
}


def kernel_dtypes() -> list[tuple[Case, torch.dtype]]:
    """Every kernel in every dtype it serves."""
    return [(case, dtype) for case in KERNELS.values() for dtype in case.dtypes]


def _embed_tokens(w: Workload) -> Callable[..., Any]:
    sequence, lengths = w.sequence, w.cu_seqlens.diff()

    def embed(
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        weight: torch.Tensor,
        mask_id: int,
        out_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.arange(input_ids.numel(), dtype=torch.int32, device=weight.device)
        is_mask = input_ids == mask_id
        num_masked = torch.zeros(lengths.numel(), device=weight.device).index_add_(
            0, sequence, is_mask.float()
        )
        scale = reference.TRAINED_KEEP_RATIO / (1 - num_masked / lengths)
        scale = scale[sequence].masked_fill(is_mask, 0)
        embeddings = F.embedding(input_ids, weight) * scale[:, None]
        return embeddings.to(out_dtype), tokens - cu_seqlens[:-1][sequence]

    return embed


def _rotary_qk_packed_(w: Workload) -> Callable[..., Any]:
    position_ids = w.position_ids

    def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        reference.rotary_qk_(qkv, cos, sin, position_ids)

    return rotate


def _bias_gelu_(w: Workload) -> Callable[..., Any]:
    def activate(hidden_states: torch.Tensor, bias: torch.Tensor) -> None:
        hidden_states.copy_(F.gelu(hidden_states + bias))

    return activate


def plain_linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """fc1 as PyTorch users write it."""
    return F.gelu(F.linear(hidden_states, weight, bias))


def separate_linear_gelu(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """fc1 as a library's matrix multiplication and our bias + GELU."""
    out = F.linear(hidden_states, weight)
    kernels.bias_gelu_(out, bias)
    return out


def _linear_then(
    rotate: Callable[..., None],
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    qkv, head_dim = F.linear(hidden_states, weight, bias), 2 * cos.shape[1]
    rotate(qkv.view(len(qkv), 3, qkv.shape[1] // (3 * head_dim), head_dim), cos, sin, position_ids)
    return qkv


plain_linear_rotary = partial(_linear_then, reference.rotary_qk_)
"""The QKV projection and the rotation in plain PyTorch."""

separate_linear_rotary = partial(_linear_then, kernels.rotary_qk_)
"""The QKV projection as a library's matrix multiplication, then our rotation."""


def _packed_attention(w: Workload) -> Callable[..., Any]:
    return lambda *, input_precision, **arguments: sdpa_attention(**arguments)


def _add_attention_maps_(w: Workload) -> Callable[..., Any]:
    bounds = list(pairwise([0, *accumulate(w.lengths)]))

    def add(
        query: torch.Tensor,
        key: torch.Tensor,
        weight: torch.Tensor,
        scores: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        sums = scores.new_zeros(query.shape[:2])
        for start, end in bounds:
            residues = slice(start + 1, end - 1)
            maps = reference.attention_probabilities(query[start:end], key[start:end], softmax_scale)
            maps = maps[:, 1:-1, 1:-1]
            scores[residues, : maps.shape[1]] += torch.einsum("hij,h->ij", maps, weight)
            sums[residues] = (maps.sum(1) + maps.sum(2)).T
        return sums

    return add


def _is_residue(w: Workload) -> torch.Tensor:
    return (w.position_ids > 0) & (w.position_ids < (w.cu_seqlens.diff()[w.sequence] - 1))


def _segment_mean(w: Workload) -> Callable[..., Any]:
    sequence = w.sequence
    weight = _is_residue(w).float()[:, None]

    def pool(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(cu_seqlens) - 1, hidden_states.shape[1], device=hidden_states.device)
        return sums.index_add_(0, sequence, hidden_states.float() * weight) / (cu_seqlens.diff() - 2)[:, None]

    return pool


def _segment_max(w: Workload) -> Callable[..., Any]:
    index = w.sequence[:, None].expand(-1, w.shape.hidden_size)
    left_out = ~_is_residue(w)[:, None]

    def pool(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        residues = hidden_states.float().masked_fill(left_out, -torch.inf)
        maxima = residues.new_full((len(cu_seqlens) - 1, residues.shape[1]), -torch.inf)
        return maxima.scatter_reduce_(0, index, residues, "amax")

    return pool


_BASELINES: dict[str, Callable[[Workload], Callable[..., Any]]] = {
    "embed_tokens": _embed_tokens,
    "rotary_qk_packed_": _rotary_qk_packed_,
    "bias_gelu_": _bias_gelu_,
    "linear_gelu": lambda w: plain_linear_gelu,
    "linear_rotary": lambda w: plain_linear_rotary,
    "packed_attention": _packed_attention,
    "add_attention_maps_": _add_attention_maps_,
    "segment_mean": _segment_mean,
    "segment_max": _segment_max,
}
"""By operation; the references of the others do not wait."""


def baseline(case: Case, workload: Workload) -> Callable[..., Any]:
    """PyTorch's counterpart of a kernel; it takes the kernel's arguments."""
    if case.operation in _BASELINES:
        return _BASELINES[case.operation](workload)
    return case.reference
