"""What an output may contain, and the names of its datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from esm_packed import outputs
from esm_packed.alphabet import AMINO_ACIDS, TOKENS

POOLED = tuple(name for name, kind in outputs.KINDS.items() if kind.has_layers and not kind.is_ragged)
"""Kinds with one row per sequence and layer."""
RAGGED = tuple(name for name, kind in outputs.KINDS.items() if kind.is_ragged)
"""Kinds in which sequences have different numbers of rows."""
STARTS: dict[outputs.Per, str] = {"residue": "starts", "pair": "pair_starts"}
"""Columns with the first row of each sequence, by what a row stands for."""
PARTS: dict[outputs.Per, str] = {"residue": "parts", "pair": "pair_parts"}
"""Datasets that list the part files next to the output, by what a row stands for."""
KINDS = tuple(outputs.KINDS)
PER_LAYER = tuple(name for name, kind in outputs.KINDS.items() if kind.has_layers)
"""Kinds that exist for each layer."""
TOKENS_OF = {"logits": AMINO_ACIDS, "logits_all": TOKENS}
"""What the columns of a kind stand for."""


def row_shape(kind: str, columns: int) -> tuple[int, ...]:
    """Return the shape of a row of a kind in its dataset."""
    return () if outputs.KINDS[kind].columns == 1 else (columns,)


def dataset_of(kind: str, layer: int | None, layers: Sequence[int]) -> str:
    """Return the name of the dataset for a kind and, if the kind has layers, a layer.

    Args:
        kind: one of `KINDS`.
        layer: one of `layers`; None selects the last one.
        layers: the layers kept; the mean of the last one is `embeddings`.
    """
    if kind not in PER_LAYER:
        return kind
    layer = layers[-1] if layer is None else layer
    return "embeddings" if kind == "mean" and layer == layers[-1] else f"{kind}/{layer}"


def datasets_of(kinds: Sequence[str], layers: Sequence[int]) -> Iterator[tuple[str, int | None, str]]:
    """Yield each kind with each of its layers (None if it has none) and the name of the dataset."""
    for kind in kinds:
        for layer in layers if kind in PER_LAYER else (None,):
            yield kind, layer, dataset_of(kind, layer, layers)
