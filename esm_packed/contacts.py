"""Contact prediction from attention maps (Rao et al. 2021, "Transformer protein language models are
unsupervised structure learners"), of which none is held.

Contacts are a logistic regression on the maps P of all heads h of all layers, each symmetrized, S = P + P^T,
and corrected by the average product of its row sums a (Dunn et al. 2008):
sigmoid(sum_h w_h (S_h - a_h a_h^T / sum(a_h)) + b). So one matrix, sum_h w_h P_h, and the row sums suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from esm_packed import kernels
from esm_packed.attention import PackedAttention
from esm_packed.errors import CheckpointError
from esm_packed.kernels.reference import attention_probabilities, statistics_dtype
from esm_packed.numerics import PRECISIONS, matmul_precision
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch

if TYPE_CHECKING:
    from esm_packed.model import ESM2, PackedOutput

MOST_PAIRS = 1 << 24
"""Of the tokens of a pack and those of its longest protein, where it has several: 64 MiB of sums in FP32."""
TILE = 512
"""Side of the squares in which the matrix is symmetrized in place."""


def forward(
    model: ESM2, batch: PackedBatch, repr_layers: Sequence[int] = (), return_logits: bool = False
) -> tuple[PackedOutput, list[torch.Tensor]]:
    """Run a model, and predict contacts in the same pass.

    Args:
        model: computes.
        batch: on the device of the model, moved there from the CPU.
        repr_layers, return_logits: as `ESM2.forward` takes them.

    Returns:
        What `ESM2.forward` returns, and of each protein (num_residues, num_residues) probabilities in FP32
        (FP64 for FP64), symmetric, in memory that they share.

    Raises:
        CheckpointError: the checkpoint came without its contact-regression file.
    """
    check_contact_head(model)
    head, config = model.contact_head, model.config
    assert head is not None
    weight = head.weight.view(config.num_layers, config.num_heads)
    collect = ContactSums(attend_of(model), weight, batch)
    output: PackedOutput = model.with_attention((model.attention_backend, collect))(
        batch, repr_layers, return_logits
    )
    # TF32 has too few bits for the difference of a map and its average product.
    with torch.no_grad(), matmul_precision(PRECISIONS["fp32"]):
        return output, collect.probabilities(head.bias)


def check_contact_head(model: ESM2) -> None:
    """See that a model can predict contacts.

    Raises:
        CheckpointError: it cannot.
    """
    if model.contact_head is None:
        raise CheckpointError(no_contact_head(model.model_name))


def no_contact_head(model_name: str) -> str:
    """Message: why a model has no contacts, and what to do."""
    return (
        f"{model_name} was loaded without contact-regression weights: put the file "
        "NAME-contact-regression.pt next to NAME.pt"
    )


def attend_of(model: ESM2) -> PackedAttention:
    """The attention function of a model."""
    return next(iter(model.layers)).attention.attend


def upper_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """(n (n + 1) / 2,) entries on the diagonal of an (n, n) matrix and above, row by row."""
    rows = [matrix.new_empty(0)]
    for start in range(0, len(matrix), TILE):  # indices take several times the memory of what they select
        tile = matrix[start : start + TILE, start:]
        i, j = torch.triu_indices(*tile.shape, device=matrix.device)
        rows.append(tile[i, j])
    return torch.cat(rows)


class ContactSums:
    """An `attention.PackedAttention` that sums over the attention maps of a batch, once for each layer.

    Args:
        attend: computes attention.
        weight: (num_layers, num_heads) of the regression.
        batch: on the device of `weight`; padding behind its sequences is left out.
    """

    def __init__(self, attend: PackedAttention, weight: torch.Tensor, batch: PackedBatch) -> None:
        self._attend = attend
        self._weight = weight.to(statistics_dtype(weight.dtype))
        self._bounds = batch.residue_bounds.tolist()
        self._num_tokens = self._bounds[-1][1] + 1
        self._num_segments = range(batch.cu_seqlens.numel() - 1)[batch.segments][-1] + 1
        shape = self._num_tokens, batch.max_seqlen - SPECIAL_TOKENS
        self._scores = torch.zeros(shape, dtype=self._weight.dtype, device=weight.device)
        self._sums: list[torch.Tensor] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        weight = self._weight[len(self._sums)]
        packed = query[: self._num_tokens], key[: self._num_tokens]
        bounds = cu_seqlens[: self._num_segments + 1]
        self._sums.append(
            kernels.add_attention_maps_(*packed, weight, self._scores, bounds, max_seqlen, softmax_scale)
        )
        return self._attend(query, key, value, cu_seqlens, max_seqlen, softmax_scale)

    def probabilities(self, bias: torch.Tensor) -> list[torch.Tensor]:
        """Contacts of each protein, in memory that they share, after all layers have been called.

        Args:
            bias: (1,) of the regression.

        Returns:
            Of each protein (num_residues, num_residues) FP32, FP64 for FP64, symmetric.
        """
        sums = torch.cat(self._sums, dim=1)
        weight = self._weight.flatten()
        return [
            _regress_(self._scores[first:last, : last - first], sums[first:last].T.contiguous(), weight, bias)
            for first, last in self._bounds
        ]


def _regress_(
    scores: torch.Tensor, sums: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Turn the weighted sum of a protein's maps into its contacts, in place.

    Args:
        scores: (num_residues, num_residues), sum_h w_h P_h.
        sums: (num_maps, num_residues) of the rows of P_h + P_h^T.
        weight: (num_maps,).
        bias: (1,).
    """
    weighted = sums * (weight / sums.sum(1))[:, None]
    tiles = [slice(start, start + TILE) for start in range(0, len(scores), TILE)]
    for index, rows in enumerate(tiles):
        for columns in tiles[index:]:
            tile = scores[rows, columns] + scores[columns, rows].T
            tile.addmm_(weighted[:, rows].T, sums[:, columns], alpha=-1).add_(bias).sigmoid_()
            if columns == rows:  # a product is symmetric but for its rounding
                tile = tile.triu() + tile.triu(1).T
            scores[rows, columns] = tile
            scores[columns, rows] = tile.T
    return scores


class AttentionMaps:
    """An `attention.PackedAttention` for one sequence that keeps the attention maps asked for.

    `maps` holds by layer, counted from 1, (heads, num_residues + 2, num_residues + 2).

    Args:
        attend: computes attention.
        layers, heads: those that are kept.
    """

    def __init__(self, attend: PackedAttention, layers: Sequence[int], heads: Sequence[int]) -> None:
        self._attend, self._layers, self._heads = attend, layers, list(heads)
        self._layer = 0
        self.maps: dict[int, torch.Tensor] = {}

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        self._layer += 1
        if self._layer in self._layers:
            asked_for = query[:, self._heads], key[:, self._heads]
            self.maps[self._layer] = attention_probabilities(*asked_for, softmax_scale)
        return self._attend(query, key, value, cu_seqlens, max_seqlen, softmax_scale)
