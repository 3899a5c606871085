"""Masked marginals of a protein by this package and others: checked against FP64, and only then timed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from contenders.checked import CheckedContest, Variant, protein
from contenders.packages import FairEsm, Transformers, token_ids_with_ends
from measuring import DEVICE

from esm_packed.alphabet import AMINO_ACID_IDS, MASK_ID, encode
from esm_packed.config import ESM2Config
from esm_packed.model import ESM2
from esm_packed.numerics import matmul_precision
from esm_packed.outputs import LOG_PROBABILITIES
from esm_packed.packing import pack, plan_packs
from esm_packed.readout import log_probabilities_of
from esm_packed.scoring import answer_together, plan_queries
from esm_packed.transformers import esm_config

NUM_CHECKED = 5


class PackedMarginals:
    """This package: copies packed together, with logits computed only for the masked rows.

    With `every_row` the logits of all tokens are computed, and those rows are selected.
    """

    def __init__(self, model: ESM2, token_budget: int, *, every_row: bool) -> None:
        self.model, self.token_budget, self.every_row = model, token_budget, every_row
        self.backend = model.attention_backend

    def prepare(self, sequence: str) -> None:
        token_ids = encode(sequence)
        queries = plan_queries(len(token_ids), range(len(token_ids)))
        self.packs, self.order = [], []
        for members in plan_packs([query.num_tokens for query in queries], self.token_budget):
            chosen = [queries[index] for index in members]
            batch = pack([query.copy_of(token_ids) for query in chosen])
            self.packs.append(batch.read_at([query.places for query in chosen]).to(DEVICE))
            self.order += members.tolist()

    def run(self) -> None:
        self.rows = [
            log_probabilities_of(
                self.model(replace(batch, rows=None), return_logits=True).logits[batch.rows]
            )[:, AMINO_ACID_IDS]
            if self.every_row
            else self.model.embed_packed(batch, [LOG_PROBABILITIES])[LOG_PROBABILITIES]
            for batch in self.packs
        ]

    def log_probabilities(self) -> torch.Tensor:
        rows = torch.cat(self.rows)
        ordered = torch.full_like(rows, torch.nan)
        ordered[torch.tensor(self.order)] = rows
        return ordered


class MarginalsInBatches:
    """Copies of a protein in batches of `copies`; they have equal lengths and need no padding.

    Args:
        loaded: a rival's model and how it computes.
        copies: number of copies in a batch.
    """

    def __init__(self, loaded: FairEsm | Transformers, copies: int) -> None:
        self._model, self._precision, self._copies = loaded.model, loaded.precision, copies
        self.backend = f"batches of {copies}"

    def prepare(self, sequence: str) -> None:
        length = len(sequence)
        masked = token_ids_with_ends(sequence).repeat(length, 1)
        masked[torch.arange(length), torch.arange(length) + 1] = MASK_ID  # after BOS
        starts = range(0, length, self._copies)
        self.tokens = [masked[start : start + self._copies].to(DEVICE) for start in starts]
        self.places = [
            (torch.arange(len(tokens), device=DEVICE), torch.arange(len(tokens), device=DEVICE) + start + 1)
            for start, tokens in zip(starts, self.tokens, strict=True)
        ]

    @torch.no_grad()
    def run(self) -> None:
        with matmul_precision(self._precision):
            self.rows = [
                log_probabilities_of(self._model(tokens)["logits"][places])[:, AMINO_ACID_IDS]
                for tokens, places in zip(self.tokens, self.places, strict=True)
            ]

    def log_probabilities(self) -> torch.Tensor:
        return torch.cat(self.rows)


class MaskedLM(Transformers):
    """transformers' EsmForMaskedLM with SDPA."""

    prefix = ""

    def _make(self, config: ESM2Config) -> Any:
        hub = esm_config(config, attn_implementation="sdpa")
        return importlib.import_module("transformers").EsmForMaskedLM(hub)


@dataclass(frozen=True)
class Marginals(Variant):
    """Masked marginals by `esm_packed`, `esm_packed_every_row`, `fair_esm` or `transformers`.

    Args:
        copies: number of copies computed together.
    """

    copies: int


class MarginalsContest(CheckedContest[Marginals]):
    """Masked marginals of several sites."""

    quantity = "log-probabilities"
    limits: ClassVar[dict[str, float]] = {"fp32": 1e-4, "tf32": 0.1, "fp16": 0.1, "bf16": 1.0}

    def _load(self, variant: Marginals) -> Any:
        if variant.provider.startswith("esm_packed"):
            model = self._contest.model(variant.model, variant.dtype)
            budget = variant.copies * (variant.num_residues + 2)
            return PackedMarginals(model, budget, every_row=variant.provider.endswith("every_row"))
        rival = {"fair_esm": FairEsm, "transformers": MaskedLM}[variant.provider]
        return MarginalsInBatches(rival(variant.model, variant.dtype, token_budget=0), variant.copies)

    def _result(self, contender: Any, variant: Marginals) -> torch.Tensor:
        rows: torch.Tensor = contender.log_probabilities()
        checked = rows[self._sites(variant)]
        return checked if rows.isfinite().all() else torch.full_like(checked, torch.nan)

    def _truth(self, variant: Marginals) -> torch.Tensor:
        model = self._contest.model(variant.model, "fp64")
        token_ids = encode(protein(variant.num_residues))
        rows = [
            torch.from_numpy(answer_together(model, [(token_ids, query)])[0])
            for query in plan_queries(len(token_ids), self._sites(variant))
        ]
        return torch.cat(rows)

    @staticmethod
    def _sites(variant: Marginals) -> list[int]:
        last = variant.num_residues - 1
        return list(dict.fromkeys(last * step // (NUM_CHECKED - 1) for step in range(NUM_CHECKED)))
