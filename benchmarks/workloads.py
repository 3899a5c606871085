"""Named sets of proteins, seeded, with measured lengths and residues: what every benchmark here computes.

    uniref         UniRef50, of which ESM-2 was trained
    viral          Swiss-Prot, viruses: short and very long proteins
    proteome       Mycoplasma genitalium, all proteins
    short50        proteins of 25 to 75 residues, from UniParc
    medium150      of 75 to 225, from UniRef50
    long300        of 150 to 450, from UniRef50
    constant1024   1,024 tokens each, BOS and EOS included: nothing to gain from packing

Lengths are drawn from the quantiles in `length_quantiles.json`, straight lines between them. Longer proteins
are cut to 1,022 residues, as `esm-packed embed` and fair-esm's `esm-extract` do by default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm_packed.packing import SPECIAL_TOKENS

MAX_RESIDUES = 1022
SHORTEST = SPECIAL_TOKENS + 1

RESIDUE_COUNTS = {
    "L": 9928, "A": 9490, "G": 7754, "V": 7275, "S": 6920, "E": 6256, "R": 5830, "T": 5612, "D": 5539,
    "I": 5497, "P": 4879, "K": 4705, "F": 3691, "N": 3578, "Q": 3537, "Y": 2780, "M": 2271, "H": 2080,
    "C": 1230, "W": 1137, "X": 11,
}  # fmt: skip
"""Of 100,000 residues, in 1,000 UniRef50 proteins that ESM-2 was trained on."""


@dataclass(frozen=True)
class LengthDistribution:
    """Lengths of real proteins.

    Args:
        source: key of `length_quantiles.json`.
        shortest: residues; shorter proteins are left out.
        longest: residues; longer proteins are left out.
    """

    source: str
    shortest: int = 1
    longest: int = 1 << 30


WORKLOADS: dict[str, LengthDistribution | None] = {
    "uniref": LengthDistribution("uniref_esm2_10k"),
    "viral": LengthDistribution("swissprot_viruses"),
    "proteome": LengthDistribution("mycoplasma_genitalium"),
    "short50": LengthDistribution("uniparc_5k", 25, 75),
    "medium150": LengthDistribution("uniref_esm2_10k", 75, 225),
    "long300": LengthDistribution("uniref_esm2_10k", 150, 450),
    "constant1024": None,
}


@cache
def _quantiles(source: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shares from 0 to 1, and the residues below which they lie."""
    measured = json.loads(Path(__file__).with_name("length_quantiles.json").read_text())[source]
    return np.array(measured["pct"]) / 100, np.array(measured["len"], dtype=np.float64)


def sample_residues(name: str, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Lengths in residues of `count` proteins.

    Raises:
        ValueError: there is no workload of this name.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r} is not known; choose from {', '.join(WORKLOADS)}")
    distribution = WORKLOADS[name]
    if distribution is None:
        return np.full(count, MAX_RESIDUES)
    shares, residues = _quantiles(distribution.source)
    # Quantiles repeat where many proteins are equally long; `interp` then takes the last of them.
    low, high = np.interp([distribution.shortest, distribution.longest], residues, shares)
    drawn = np.interp(rng.uniform(low, high, count), shares, residues)
    return np.minimum(np.rint(drawn).astype(np.int64), MAX_RESIDUES)


def token_lengths(name: str, total_tokens: int, seed: int = 0) -> list[int]:
    """Tokens of proteins, BOS and EOS included, the last one cut so that they make `total_tokens` together.

    Every protein keeps at least one residue.

    Raises:
        ValueError: there is no workload of this name, or no protein fits into `total_tokens`.
    """
    if total_tokens < SHORTEST:
        raise ValueError(f"total_tokens must be at least {SHORTEST}, got {total_tokens}")
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    left = total_tokens
    while left:
        for residues in sample_residues(name, 256, rng).tolist():
            length = min(residues + SPECIAL_TOKENS, left)
            lengths.append(length if left - length >= SHORTEST else left)
            left -= lengths[-1]
            if not left:
                break
    return lengths


def proteins(name: str, total_tokens: int, seed: int = 0) -> list[str]:
    """Proteins of `token_lengths`, of residues as frequent as in UniRef50.

    Raises:
        ValueError: as `token_lengths`.
    """
    lengths = token_lengths(name, total_tokens, seed)
    counts = np.array(list(RESIDUE_COUNTS.values()))
    letters = np.frombuffer("".join(RESIDUE_COUNTS).encode(), dtype=np.uint8)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(letters, total_tokens - SPECIAL_TOKENS * len(lengths), p=counts / counts.sum())
    text = drawn.tobytes().decode()
    ends = np.cumsum(np.array(lengths) - SPECIAL_TOKENS).tolist()
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def write_fasta(path: Path, sequences: Sequence[str]) -> None:
    """Write proteins named p0, p1 and so on."""
    path.write_text("".join(f">p{index}\n{sequence}\n" for index, sequence in enumerate(sequences)))
