"""Medians over blocks: residues/s, ratios within a block, and esm-packed's share of its floors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import pytest


@dataclass(frozen=True)
class Record:
    """One timed round."""

    block: int
    model: str
    provider: str
    residues: int
    seconds: float


RECORDS = pytest.StashKey[list[Record]]()

FLOORS = {
    "torch.mm": ("floor_matmul_mm", "floor_attention"),
    "the faster of torch.mm and oneDNN": ("floor_matmul_best", "floor_attention"),
}


def summary_lines(records: Sequence[Record]) -> Iterator[str]:
    """The lines of the table, model by model."""
    for model in dict.fromkeys(record.model for record in records):
        yield model
        residues = next(record.residues for record in records if record.model == model)
        seconds = {(r.provider, r.block): r.seconds for r in records if r.model == model}
        blocks = sorted({block for provider, block in seconds if provider == "esm_packed"})
        for provider in dict.fromkeys(provider for provider, _ in seconds):
            own = [value for (name, _), value in seconds.items() if name == provider]
            line = f"  {provider:18}{median(own):9.3f} s{residues / median(own):12,.0f} residues/s"
            ratios = [
                seconds[provider, block] / seconds["esm_packed", block]
                for block in blocks
                if (provider, block) in seconds
            ]
            if ratios and provider != "esm_packed" and not provider.startswith("floor"):
                line += f"   esm_packed is {median(ratios):.2f}x as fast"
            yield line
        for what, parts in FLOORS.items():
            shares = [
                sum(seconds[part, block] for part in parts) / seconds["esm_packed", block]
                for block in blocks
                if all((part, block) in seconds for part in parts)
            ]
            if shares:
                yield f"  share of floor {median(shares):.1%} (matrix multiplications: {what}, and attention)"
