"""Made-up proteins, and FASTA files of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

RESIDUES = "LAGVSERTIDPKQNFYMHWC"

Input = tuple[int, int, float]
"""Number and mean length of `proteins_with_copies`, and FLOPs of a shard."""

MANY_SHARDS: Input = (60, 30, 1e8)
FEW_SHARDS: Input = (12, 40, 1.6e8)
SHARDS_OF_RESIDUES: Input = (24, 30, 1.2e8)


def write_fasta(path: Path, sequences: Iterable[str]) -> Path:
    """Write proteins named protein0, protein1 and so on; `path`."""
    with path.open("w") as file:
        file.writelines(f">protein{number}\n{sequence}\n" for number, sequence in enumerate(sequences))
    return path


def random_proteins(lengths: Iterable[int], seed: int = 0) -> Iterator[str]:
    """Random proteins of these lengths."""
    rng = np.random.default_rng(seed)
    residues = np.frombuffer(RESIDUES.encode(), dtype=np.uint8)
    for length in lengths:
        yield residues[rng.integers(len(residues), size=length)].tobytes().decode()


def proteins_with_copies(number: int, length: int, seed: int = 0) -> list[str]:
    """Random proteins of about `length` residues, each fifth one a copy of an earlier one."""
    rng = random.Random(seed)
    sequences: list[str] = []
    for record in range(number):
        residues = rng.choices(RESIDUES, k=rng.randint(length // 2, length * 3 // 2))
        sequences.append("".join(residues) if record % 5 != 4 else rng.choice(sequences))
    return sequences
