"""Embed a FASTA file, and draw the first two principal components of its proteins.

    python examples/embed_and_look.py examples/proteins.fasta --table examples/locations.tsv -o map.png

`esm-packed map` draws the same from the command line. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

import esm_packed


def principal_components(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n, 2) coordinates of (n, hidden_size) rows."""
    centered = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    return centered @ directions[:2].T


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed proteins and draw them.")
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--table", type=Path, help="tab-separated: ID, and what to color by")
    parser.add_argument("-o", "--output", type=Path, default=Path("map.png"))
    options = parser.parse_args()

    # The output stays; a second run of this script opens it again.
    with esm_packed.embed_file(options.fasta, options.output.with_suffix(".h5"), model=options.model) as file:
        ids, rows = list(file.ids), file[:]
    colors = dict.fromkeys(ids, "protein")
    if options.table:
        with options.table.open() as table:
            colors |= {name: value for name, value in csv.reader(table, delimiter="\t") if name in colors}

    points = principal_components(rows)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for value in sorted(set(colors.values())):
        chosen = np.array([colors[name] == value for name in ids])
        axes.scatter(*points[chosen].T, s=18, label=value)
    for name, point in zip(ids, points, strict=True):
        axes.annotate(name, point, fontsize=5, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="PC 1", ylabel="PC 2", title=f"{options.model}: {len(ids)} proteins")
    axes.margins(0.12)
    axes.legend()
    figure.savefig(options.output, dpi=150)
    print(f"{options.output}: {len(ids)} proteins")


if __name__ == "__main__":
    main()
