"""Score every substitution of a protein, and draw the scores as a heat map.

    python examples/variant_scan.py examples/proteins.fasta P01308 -o scan.png

A column is a residue, a row an amino acid; blue is what the model prefers to the wild type, red what it finds
less probable, white the wild type itself. The demo model's scores mean nothing. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import esm_packed
from esm_packed.alphabet import AMINO_ACIDS


def main() -> None:
    parser = argparse.ArgumentParser(description="Scan the variants of a protein.")
    parser.add_argument("fasta", type=Path)
    parser.add_argument("id", help="of the protein")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="masked", choices=["masked", "wild-type"])
    parser.add_argument("-o", "--output", type=Path, default=Path("scan.png"))
    options = parser.parse_args()

    protein = dict(esm_packed.read_fasta(options.fasta))[options.id]
    model = esm_packed.ESM2.from_pretrained(options.model)
    (log_probabilities,) = model.log_probabilities([protein], method=options.method)
    # NaN where the residue is none of the 20 amino acids, so that there is nothing to compare with.
    wild_type = np.array(["".join(AMINO_ACIDS).find(residue) for residue in protein])
    of_wild_type = np.where(wild_type < 0, np.nan, log_probabilities[np.arange(len(protein)), wild_type])
    scores = log_probabilities - of_wild_type[:, None]

    limit = float(np.nanquantile(np.abs(scores), 0.99))
    figure = Figure(figsize=(max(5, len(protein) / 8), 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        scores.T, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(AMINO_ACIDS)), AMINO_ACIDS, fontsize=7)
    ticks = [place for place in range(len(protein)) if (place + 1) % 10 == 0]
    axes.set_xticks(ticks, [f"{protein[place]}{place + 1}" for place in ticks])
    axes.set(xlabel="residue", title=f"{options.id}, {options.model}, {options.method}")
    figure.colorbar(image, label="log p(mutant) - log p(wild type), nats")
    figure.savefig(options.output, dpi=120)

    worst = scores.mean(1).argsort()[:5]
    print(f"{options.output}: {scores.size:,} scores")
    print("least tolerant residues:", ", ".join(f"{protein[place]}{place + 1}" for place in worst))


if __name__ == "__main__":
    main()
