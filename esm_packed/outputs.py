"""Kinds of output of a forward pass, per sequence or per residue.

The name of an output is its kind and layer, such as `mean/33`, or its kind alone for the last layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Per = Literal["sequence", "residue", "pair", "site"]
"""Unit that has a row; a pair is a pair of residues i <= j, a site a scored residue."""


class Kind(NamedTuple):
    """A kind of output.

    Args:
        text: description for users.
        per: unit that has a row.
        has_layers: whether there is one output per layer.
        columns: values per row; 0 for the hidden size of the model.
    """

    text: str
    per: Per = "sequence"
    has_layers: bool = False
    columns: int = 0

    @property
    def is_ragged(self) -> bool:
        """Whether sequences have different numbers of rows."""
        return self.per != "sequence"


KINDS = {
    "mean": Kind("mean over the residues", has_layers=True),
    "max": Kind("maximum over the residues", has_layers=True),
    "bos": Kind("the BOS token", has_layers=True),
    "per_residue": Kind("each residue", per="residue", has_layers=True),
    "logits": Kind("logits of the 20 amino acids, each residue", per="residue", columns=20),
    "logits_all": Kind("logits of all 33 tokens, each residue", per="residue", columns=33),
    "unmasked_nll": Kind("mean negative log-likelihood of the residues, unmasked, in nats", columns=1),
    "contacts": Kind("contact probability of each pair of residues", per="pair", columns=1),
}
LOG_PROBABILITIES = "log_probabilities"
"""Output of a scoring run; its batches select the rows."""

_ALL_KINDS = KINDS | {
    LOG_PROBABILITIES: Kind("log-probabilities of the 20 amino acids, each site", per="site", columns=20)
}

KINDS_IN_WINDOWS = ("mean", "per_residue")
"""Kinds that a protein in windows has."""


def output_names(kinds: Iterable[str], layers: Iterable[int]) -> list[str]:
    """Names of the outputs of some kinds, in the order of `KINDS`, and layers."""
    layers, wanted = list(layers), set(kinds)
    return [
        name
        for kind, described in KINDS.items()
        if kind in wanted
        for name in ([f"{kind}/{layer}" for layer in layers] if described.has_layers else [kind])
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


def per_of(name: str) -> Per:
    """Unit that has a row in the output `name`."""
    kind = _ALL_KINDS.get(kind_of(name))
    return "sequence" if kind is None else kind.per


def is_ragged(name: str) -> bool:
    """Whether sequences differ in the number of rows of the output called `name`."""
    return per_of(name) != "sequence"


def num_columns(name: str, hidden_size: int) -> int:
    """Values in a row of the output called `name`."""
    return KINDS[kind_of(name)].columns or hidden_size


def needs_logits(names: Iterable[str]) -> bool:
    """Whether the language-model head must run for these outputs."""
    return any(kind_of(name) in ("logits", "logits_all", "unmasked_nll", LOG_PROBABILITIES) for name in names)


def needs_contacts(names: Iterable[str]) -> bool:
    """Whether contacts must be predicted for these outputs."""
    return "contacts" in names
