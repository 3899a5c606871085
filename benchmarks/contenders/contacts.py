"""Contacts of a protein by this package and by fair-esm: checked against FP64, and only then timed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from contenders.checked import CheckedContest, Variant, protein
from contenders.contest import Contest
from contenders.packages import FairEsm, token_ids_with_ends
from measuring import DEVICE

from esm_packed import contacts
from esm_packed.alphabet import encode
from esm_packed.model import ESM2
from esm_packed.numerics import matmul_precision
from esm_packed.packing import pack


class PackedContacts:
    """This package: a pass that sums over the attention maps, of which none is held."""

    def __init__(self, model: ESM2) -> None:
        self.model, self.backend = model, model.attention_backend

    def prepare(self, sequence: str) -> None:
        self.batch = pack([encode(sequence)]).to(DEVICE)

    def run(self) -> None:
        self.probabilities = contacts.forward(self.model, self.batch)[1][0]


class FairEsmContacts:
    """fair-esm 2.0.0: `predict_contacts` on one protein."""

    backend = "all attention maps"

    def __init__(self, loaded: FairEsm) -> None:
        self._model, self._precision = loaded.model, loaded.precision

    def prepare(self, sequence: str) -> None:
        self.tokens = token_ids_with_ends(sequence)[None].to(DEVICE)

    @torch.no_grad()
    def run(self) -> None:
        with matmul_precision(self._precision):
            self.probabilities: torch.Tensor = self._model.predict_contacts(self.tokens)[0]


class ContactsContest(CheckedContest[Variant]):
    """Contacts of one protein, by `esm_packed` or `fair_esm`."""

    quantity = "contacts"
    limits: ClassVar[dict[str, float]] = {"fp32": 1e-4, "tf32": 0.05, "fp16": 0.05, "bf16": 0.2}

    def __init__(self, contest: Contest) -> None:
        super().__init__(contest)
        self._rivals: dict[tuple[str, str], FairEsm] = {}

    def _load(self, variant: Variant) -> Any:
        if variant.provider == "esm_packed":
            return PackedContacts(self._contest.model(variant.model, variant.dtype))
        key = variant.model, variant.dtype
        if key not in self._rivals:
            self._rivals[key] = FairEsm(*key, token_budget=0)
        return FairEsmContacts(self._rivals[key])

    def _result(self, contender: Any, variant: Variant) -> torch.Tensor:
        probabilities: torch.Tensor = contender.probabilities
        return probabilities

    def _truth(self, variant: Variant) -> torch.Tensor:
        exact = PackedContacts(self._contest.model(variant.model, "fp64"))
        exact.prepare(protein(variant.num_residues))
        exact.run()
        return exact.probabilities.cpu()
