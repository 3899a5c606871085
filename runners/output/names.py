"""What an output may hold, and the names of the data sets it is in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from esm_packed import outputs
from esm_packed.alphabet import AMINO_ACIDS, TOKENS

POOLED = tuple(name for name, kind in outputs.KINDS.items() if kind.has_layers and not kind.is_ragged)
"""Kinds with one row for each sequence and layer."""
RAGGED = tuple(name for name, kind in outputs.KINDS.items() if kind.is_ragged)
"""Kinds in which sequences differ in their numbers of rows."""
STARTS: dict[outputs.Per, str] = {"residue": "starts", "pair": "pair_starts"}
"""Columns that say where the rows of a sequence begin, by what a row is for."""
PARTS: dict[outputs.Per, str] = {"residue": "parts", "pair": "pair_parts"}
"""Data sets that list the files of rows that are beside the output, by what a row is for."""
KINDS = tuple(outputs.KINDS)
PER_LAYER = tuple(name for name, kind in outputs.KINDS.items() if kind.has_layers)
"""Kinds that there are of each layer."""
TOKENS_OF = {"logits": AMINO_ACIDS, "logits_all": TOKENS}
"""What the columns of a kind stand for."""


def row_shape(kind: str, columns: int) -> tuple[int, ...]:
    """Shape of a row of a kind in its data set."""
    return () if outputs.KINDS[kind].columns == 1 else (columns,)


def dataset_of(kind: str, layer: int | None, layers: Sequence[int]) -> str:
    """Name of the data set that holds a kind, of a layer where the kind has layers.

    Args:
        kind: one of `KINDS`.
        layer: one of `layers`; None stands for the last one.
        layers: the layers kept; the mean of the last one is `embeddings`.
    """
    if kind not in PER_LAYER:
        return kind
    layer = layers[-1] if layer is None else layer
    return "embeddings" if kind == "mean" and layer == layers[-1] else f"{kind}/{layer}"


def datasets_of(kinds: Sequence[str], layers: Sequence[int]) -> Iterator[tuple[str, int | None, str]]:
    """Each kind with each of its layers, None if it has none, and the name of the data set."""
    for kind in kinds:
        for layer in layers if kind in PER_LAYER else (None,):
            yield kind, layer, dataset_of(kind, layer, layers)
