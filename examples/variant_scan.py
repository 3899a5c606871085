"""Score every substitution of a protein, draw the scores, and list the residues that tolerate least.

    python examples/variant_scan.py examples/proteins.fasta P01308 -o scan.png

A score is log p(mutant) - log p(wild type). The demo model's scores mean nothing. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import esm_packed
from esm_packed.alphabet import encode
from esm_packed.reports.scan import Scan, write_scan_figure
from esm_packed.scoring import scored_sites


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

    token_ids = encode(protein)
    # Residues such as X are none of the 20 amino acids, so there is nothing to compare a mutant with.
    sites = scored_sites(token_ids)
    scan = Scan(token_ids, log_probabilities[sites], f"{options.id}, {options.model}")
    write_scan_figure(scan, options.output, options.output.suffix)
    print(f"{options.output}: {scan.scores.size:,} scores")

    mean_scores = scan.scores.mean(0)
    least = [place for place in np.argsort(mean_scores) if np.isfinite(mean_scores[place])][:5]
    print("least tolerant residues:", ", ".join(f"{protein[place]}{place + 1}" for place in least))


if __name__ == "__main__":
    main()
