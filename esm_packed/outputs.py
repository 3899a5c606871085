"""Kinds of output: what is kept of a forward pass for each sequence, or for each residue.

An output is called by its kind and layer, as `mean/33`, or by its kind alone where it is of the last layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from esm_packed.alphabet import AMINO_ACIDS, TOKENS


class Kind(NamedTuple):
    """A kind of output.

    Args:
        text: what it is, for people.
        is_ragged: whether it has a row for each residue, not one for a sequence.
        has_layers: whether each layer has its own.
    """

    text: str
    is_ragged: bool = False
    has_layers: bool = False


KINDS = {
    "mean": Kind("mean over the residues", has_layers=True),
    "max": Kind("maximum over the residues", has_layers=True),
    "bos": Kind("the BOS token", has_layers=True),
    "per_residue": Kind("each residue", is_ragged=True, has_layers=True),
    "logits": Kind("logits of the 20 amino acids, each residue", is_ragged=True),
    "logits_all": Kind("logits of all 33 tokens, each residue", is_ragged=True),
    "unmasked_nll": Kind("mean negative log-likelihood of the residues in one unmasked pass, in nats"),
}
COLUMNS = {"logits": AMINO_ACIDS, "logits_all": TOKENS}
"""Tokens that the columns of a kind stand for."""


def output_names(kinds: Iterable[str], layers: Iterable[int]) -> list[str]:
    """Names of the outputs of some kinds, in the order of `KINDS`, and layers."""
    layers, wanted = list(layers), set(kinds)
    return [
        name
        for kind, (_, _, has_layers) in KINDS.items()
        if kind in wanted
        for name in ([f"{kind}/{layer}" for layer in layers] if has_layers else [kind])
    ]


def mean_of(layer: int) -> str:
    """Name of the mean embeddings of a layer."""
    return f"mean/{layer}"


def kind_of(name: str) -> str:
    """Kind of the output called `name`."""
    return name.partition("/")[0]


def layer_of(name: str) -> int | None:
    """Layer of the output called `name`; None where it is of the last one."""
    layer = name.partition("/")[2]
    return int(layer) if layer else None


def is_ragged(name: str) -> bool:
    """Whether the output called `name` has a row for each residue."""
    kind = KINDS.get(kind_of(name))
    return kind is not None and kind.is_ragged


def num_columns(name: str, hidden_size: int) -> int:
    """Values in a row of the output called `name`."""
    kind = kind_of(name)
    return 1 if kind == "unmasked_nll" else len(COLUMNS[kind]) if kind in COLUMNS else hidden_size


def needs_logits(names: Iterable[str]) -> bool:
    """Whether the language-model head must run for these outputs."""
    return any(layer_of(name) is None for name in names)
