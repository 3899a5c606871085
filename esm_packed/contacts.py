"""Contact prediction from attention maps (Rao et al. 2021, "Transformer protein language models are
unsupervised structure learners")."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esm_packed.kernels.reference import attention_probabilities


class AttentionMaps:
    """An `attention.PackedAttention` for one sequence that keeps every layer's probabilities.

    `maps` holds for each layer called so far (num_heads, num_residues, num_residues), BOS and EOS cut off.
    """

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        probabilities = attention_probabilities(query, key, softmax_scale)
        self.maps.append(probabilities[:, 1:-1, 1:-1])
        attended = torch.einsum("hqk,khd->qhd", probabilities, value.to(probabilities.dtype))
        return attended.to(value.dtype).contiguous()


def contact_probabilities(
    maps: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Logistic regression on the symmetrised maps after average product correction (Dunn et al. 2008).

    Args:
        maps: for each layer (num_heads, num_residues, num_residues) FP32 or FP64.
        weight: (1, num_layers * num_heads), layer by layer.
        bias: (1,).

    Returns:
        (num_residues, num_residues) in the dtype of `maps`.
    """
    attention = torch.cat(list(maps))
    attention = attention + attention.transpose(1, 2)
    rows, columns = attention.sum(2, keepdim=True), attention.sum(1, keepdim=True)
    corrected = attention - rows * columns / attention.sum((1, 2), keepdim=True)
    return (torch.einsum("mij,m->ij", corrected, weight[0].to(corrected.dtype)) + bias).sigmoid()
