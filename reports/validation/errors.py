"""How far one way to compute embeddings is from the reference, protein by protein and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.layouts import Layout
from esm_packed.model import ESM2, PackedOutput
from esm_packed.outputs import mean_of, output_names
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch
from esm_packed.reports.validation.reference import Reference

TokenIds = npt.NDArray[np.uint8]

NEIGHBOURS = 10


@dataclass(frozen=True)
class Errors:
    """Of each protein against the reference, FP64; NaN where the embedding is not finite.

    Args:
        relative_l2: (num_proteins,) norm of the difference over the norm of the reference.
        cosine: (num_proteins,) with the reference; for residues the lowest of the protein's.
        max_error: (num_proteins,) largest absolute difference of a component.
    """

    relative_l2: torch.Tensor
    cosine: torch.Tensor
    max_error: torch.Tensor


@dataclass(frozen=True)
class PathResult:
    """One precision mode on one path (layout and attention backend).

    Args:
        mode: precision mode.
        layout: `packed` or `padded`.
        backend: attention backend.
        means: of the mean embedding of the last layer.
        residues: of the sampled residues of the last layer.
        mean_by_layer: (num_layers + 1, num_proteins) relative L2 of the mean embedding.
        residues_by_layer: (num_layers + 1, num_proteins) relative L2 over the residues sampled for layers.
        nonfinite: (num_layers + 1, num_proteins) bool, NaN or Inf in any token's hidden state.
        top1: share of proteins whose nearest neighbor is the reference's; None with fewer than 3 proteins.
        top10: mean share of the `neighbors` nearest that are the reference's.
        neighbors: 10, or one less than there are proteins.
    """

    mode: str
    layout: str
    backend: str
    means: Errors
    residues: Errors
    mean_by_layer: torch.Tensor
    residues_by_layer: torch.Tensor
    nonfinite: torch.Tensor
    top1: float | None
    top10: float | None
    neighbors: int

    @property
    def path(self) -> str:
        """Layout and backend, as the report names them."""
        return f"{self.layout}, {self.backend}"


def measure(
    model: ESM2,
    layout: Layout,
    token_ids: Sequence[TokenIds],
    reference: Reference,
    token_budget: int,
    advance: Callable[[int], None] = lambda residues: None,
) -> PathResult:
    """Embed with `model` in `layout`, as users do, and compare with `reference`.

    Args:
        model: computes; its precision mode and attention backend name the result.
        layout: one of `LAYOUTS`.
        token_ids: residues of each protein.
        reference: of the same proteins.
        token_budget: tokens in a pack.
        advance: told of residues as they are done.
    """
    last, num_proteins = model.config.num_layers, len(token_ids)
    layers = list(range(last + 1))
    means = torch.empty_like(reference.means)
    residues = torch.empty(3, num_proteins, dtype=torch.float64)
    residues_by_layer = torch.empty(last + 1, num_proteins, dtype=torch.float64)
    nonfinite = torch.empty(last + 1, num_proteins, dtype=torch.bool)

    computing = layout.prepare(model)
    lengths = np.array([len(ids) + SPECIAL_TOKENS for ids in token_ids])
    for members in layout.plan(lengths, token_budget):
        batch = layout.lay_out([token_ids[member] for member in members], token_budget).to(model.device)
        embedded, hidden_states = _embedded(computing, batch, layers)
        starts = batch.cu_seqlens[:-1][batch.segments].tolist()
        means[:, members] = torch.stack([embedded[mean_of(layer)].double().cpu() for layer in layers])
        for start, protein in zip(starts, members.tolist(), strict=True):
            residues[:, protein] = _residue_errors(hidden_states[last], start, *reference.residues(protein))
            tokens = slice(start, start + int(lengths[protein]))
            for layer in layers:
                nonfinite[layer, protein] = not hidden_states[layer][tokens].isfinite().all()
                sampled = reference.layer_residues(protein, layer)
                residues_by_layer[layer, protein] = _residue_errors(hidden_states[layer], start, *sampled)[0]
        advance(sum(len(token_ids[member]) for member in members))

    expected = reference.means[last]
    top1, top10, neighbors = rank_agreement(means[last], expected)
    return PathResult(
        mode=model.precision,
        layout=layout.name,
        backend="masked sdpa" if layout.name == "padded" else model.attention_backend,
        means=Errors(
            _relative_l2(means[last], expected),
            _cosine(means[last], expected),
            (means[last] - expected).abs().amax(1),
        ),
        residues=Errors(*residues),
        mean_by_layer=_relative_l2(means, reference.means),
        residues_by_layer=residues_by_layer,
        nonfinite=nonfinite,
        top1=top1,
        top10=top10,
        neighbors=neighbors,
    )


def _embedded(
    model: ESM2, batch: PackedBatch, layers: Sequence[int]
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Outputs of `model.embed_packed`, and the hidden states they are computed from."""
    outputs: list[PackedOutput] = []
    hook = model.register_forward_hook(lambda model, arguments, output: outputs.append(output))
    try:
        embedded = model.embed_packed(batch, output_names(["mean"], layers))
    finally:
        hook.remove()
    return embedded, outputs[0].representations


def _residue_errors(
    hidden_states: torch.Tensor, start: int, positions: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Relative L2 over the residues at `positions` of the protein whose BOS is token `start`, lowest cosine
    of one, and largest error of a component."""
    actual = hidden_states[(start + 1 + positions).to(hidden_states.device)].double().cpu()
    return torch.stack(
        [
            _relative_l2(actual.flatten(), expected.flatten()),
            _cosine(actual, expected).min(),
            (actual - expected).abs().max(),
        ]
    )


def _relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    relative: torch.Tensor = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return relative


def _cosine(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(actual, expected, dim=-1, eps=0.0)


def rank_agreement(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float | None, float | None, int]:
    """Whether embeddings retrieve the same proteins as the reference, by cosine among themselves.

    Args:
        actual, expected: (num_proteins, hidden_size) FP64; rows of `actual` that are not finite retrieve
            nothing.

    Returns:
        Share of proteins with the same nearest neighbor, mean share of the k nearest in common, and
        k = min(10, num_proteins - 1). The first is None with fewer than 3 proteins, the second where the k
        nearest are all there are.
    """
    k = min(NEIGHBOURS, len(expected) - 1)
    if k < 2:
        return None, None, max(k, 0)
    nearest = []
    for rows in (actual, expected):
        finite = rows.isfinite().all(1)
        unit = torch.nn.functional.normalize(rows.where(finite[:, None], 0.0), dim=1)
        similarity = unit @ unit.T
        similarity[:, ~finite] = -2.0
        similarity.fill_diagonal_(-3.0)
        best = similarity.topk(k, dim=1).indices
        nearest.append(best.where(finite[:, None], -1))
    found, wanted = nearest
    common = (found[:, :, None] == wanted[:, None, :]).any(2).double().mean(1)
    top1 = float((found[:, 0] == wanted[:, 0]).double().mean())
    return top1, float(common.mean()) if k < len(expected) - 1 else None, k


def finite_median(values: torch.Tensor) -> float | None:
    """Median of the finite values; None if there are none."""
    finite = values[values.isfinite()]
    return float(finite.quantile(0.5)) if len(finite) else None


def finite_max(values: torch.Tensor) -> float | None:
    """Largest finite value; None if there is none."""
    finite = values[values.isfinite()]
    return float(finite.max()) if len(finite) else None


def finite_min(values: torch.Tensor) -> float | None:
    """Smallest finite value; None if there is none."""
    finite = values[values.isfinite()]
    return float(finite.min()) if len(finite) else None
