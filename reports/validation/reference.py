"""Reference embeddings in FP64, one protein at a time, pooled independently of the tested code."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.alphabet import BOS_ID, EOS_ID
from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS
from esm_packed.packing import pack
from esm_packed.reports.page import ReportError
from esm_packed.reports.validation.activations import Activations

TokenIds = npt.NDArray[np.uint8]
Representations = dict[int, torch.Tensor]

_RESIDUE_BYTES = 1 << 29
"""Most that the sampled residues take, once for the last layer and once for all layers."""


@dataclass
class _Sample:
    """Rows of some residues of each protein, `offsets` (num_proteins + 1,) apart in `rows`."""

    positions: list[torch.Tensor]
    offsets: npt.NDArray[np.int64]
    rows: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], most: int, hidden_size: int, num_layers: int) -> _Sample:
        positions = spread(lengths, most)
        offsets = np.cumsum([0, *map(len, positions)])
        return cls(
            positions, offsets, torch.empty(num_layers, int(offsets[-1]), hidden_size, dtype=torch.float64)
        )

    def of_protein(self, protein: int, layer: int) -> torch.Tensor:
        return self.rows[layer, self.offsets[protein] : self.offsets[protein + 1]]


class Reference:
    """Mean embeddings of every layer, and sampled residues.

    Args:
        name: what computed it.
        lengths: residues of each protein.
        num_layers, hidden_size: of the model.

    Attributes:
        means: (num_layers + 1, num_proteins, hidden_size) FP64 on the CPU.
    """

    def __init__(self, name: str, lengths: Sequence[int], num_layers: int, hidden_size: int) -> None:
        self.name = name
        self.means = torch.empty(num_layers + 1, len(lengths), hidden_size, dtype=torch.float64)
        row_bytes = 8 * hidden_size
        self._last = _Sample.of(lengths, _RESIDUE_BYTES // row_bytes, hidden_size, 1)
        self._layers = _Sample.of(
            lengths, _RESIDUE_BYTES // (row_bytes * (num_layers + 1)), hidden_size, num_layers + 1
        )

    def add(self, protein: int, representations: Representations) -> None:
        """Keep a protein's layers, each (num_residues + 2, hidden_size) with BOS and EOS."""
        for layer, hidden_states in representations.items():
            rows = hidden_states[1:-1].double().cpu()
            self.means[layer, protein] = rows.mean(0)
            self._layers.of_protein(protein, layer).copy_(rows[self._layers.positions[protein]])
        self._last.of_protein(protein, 0).copy_(rows[self._last.positions[protein]])

    def residues(self, protein: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the residues sampled of the last layer, and their (num_sampled, hidden_size) rows."""
        return self._last.positions[protein], self._last.of_protein(protein, 0)

    def layer_residues(self, protein: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `residues`, of any layer; these are fewer."""
        return self._layers.positions[protein], self._layers.of_protein(protein, layer)

    @property
    def num_residues(self) -> tuple[int, int]:
        """Residues compared in the last layer, and in every layer."""
        return int(self._last.offsets[-1]), int(self._layers.offsets[-1])


def spread(lengths: Sequence[int], most: int) -> list[torch.Tensor]:
    """For each protein evenly spaced positions: all if there are at most `most`, at least one of each."""
    share = min(1.0, most / sum(lengths))
    counts = [max(1, int(length * share)) for length in lengths]
    return [
        torch.linspace(0, length - 1, count, dtype=torch.float64).round().long()
        for length, count in zip(lengths, counts, strict=True)
    ]


def compute_reference(
    name: str,
    checkpoint: Checkpoint,
    device: torch.device,
    token_ids: Sequence[TokenIds],
    advance: Callable[[int], None] = lambda residues: None,
) -> tuple[Reference, Activations]:
    """The reference, and the activations that our FP64 path meets on the way.

    Args:
        name: one of `config.REFERENCES`; with `fair-esm` our path runs as well, for the activations.
        checkpoint: freshly loaded.
        device: to compute on.
        token_ids: residues of each protein.
        advance: called with the number of residues completed, twice for each with `fair-esm`.

    Raises:
        ReportError: fair-esm is not installed, or an embedding is not finite.
    """
    config = checkpoint.config
    lengths = [len(ids) for ids in token_ids]
    run_fair_esm = fair_esm_runner(checkpoint, device) if name == "fair-esm" else None
    reference = Reference(name, lengths, config.num_layers, config.hidden_size)

    precision = PRECISIONS["fp64"]
    model = ESM2.from_checkpoint(
        checkpoint, device, precision, select_backend("auto", device, precision, config.head_dim)
    )
    activations = Activations(model)
    with activations.recorded():
        for protein, ids in enumerate(token_ids):
            batch = pack([ids]).to(device)
            representations = model(batch, range(config.num_layers + 1)).representations
            if run_fair_esm is None:
                reference.add(protein, representations)
            advance(len(ids))
    if run_fair_esm is not None:
        del model
        for protein, ids in enumerate(token_ids):
            reference.add(protein, run_fair_esm(ids))
            advance(len(ids))
    if not reference.means.isfinite().all():
        raise ReportError(
            f"{checkpoint.source}: its embeddings are not finite even in fp64: the weights are broken"
        )
    return reference, activations


def fair_esm_runner(checkpoint: Checkpoint, device: torch.device) -> Callable[[TokenIds], Representations]:
    """fair-esm's model in FP64: residues of one protein to its layers, (num_residues + 2, hidden_size) each.

    Raises:
        ReportError: it is not installed.
    """
    try:
        esm2: Any = importlib.import_module("esm.model.esm2")
        attention: Any = importlib.import_module("esm.multihead_attention")
        alphabet: Any = importlib.import_module("esm.data").Alphabet.from_architecture("ESM-1b")
    except ImportError:
        raise ReportError(
            "--reference fair-esm: fair-esm is not installed (another package may be called esm): "
            "pip install fair-esm==2.0.0"
        ) from None
    config = checkpoint.config
    layers = list(range(config.num_layers + 1))
    model = esm2.ESM2(config.num_layers, config.hidden_size, config.num_heads, alphabet, config.token_dropout)
    model = model.double().eval()
    state = {name: tensor.double() for name, tensor in checkpoint.tensors.items()}
    state["lm_head.weight"] = state["embed_tokens.weight"]
    # A head that the checkpoint lacks keeps its random weights; no representation passes through a head.
    lacking = model.load_state_dict(state, strict=False)
    assert not lacking.unexpected_keys
    assert all(name.startswith(("lm_head.", "contact_head.")) for name in lacking.missing_keys)
    model = model.to(device)

    def run(ids: TokenIds) -> Representations:
        tokens = torch.tensor([[BOS_ID, *ids.tolist(), EOS_ID]], device=device)
        with torch.no_grad(), _softmax_in_fp64(attention):
            representations = model(tokens, repr_layers=layers)["representations"]
        return {layer: representations[layer][0] for layer in layers}

    return run


@contextmanager
def _softmax_in_fp64(attention: Any) -> Iterator[None]:
    """fair-esm forms its softmax in FP32 even in a double model, which limits it to FP32's accuracy."""
    softmax = attention.utils_softmax
    attention.utils_softmax = lambda x, dim, onnx_trace=False: x.softmax(dim)
    try:
        yield
    finally:
        attention.utils_softmax = softmax
