"""Predict a property of proteins from their embeddings, and score it on proteins that were held out.

    python examples/classify.py examples/proteins.fasta examples/locations.tsv

Every protein is predicted by a logistic regression that was fitted to all others (leave-one-out). Two
baselines show what the score is worth: residue frequencies in place of embeddings, and always the most
frequent class. With your own proteins hold out whole families together, or homologs give the answer
away: the bundled ones include two chains of hemoglobin and myoglobin. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import esm_packed
from esm_packed.alphabet import AMINO_ACIDS


def held_out_predictions(rows: Any, classes: Any) -> Any:
    """What each protein is predicted to be by a model that has not seen it."""
    # Scaling is fitted within the pipeline, so that nothing of a held-out protein leaks into it.
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced"))
    return cross_val_predict(classifier, rows, classes, cv=LeaveOneOut())


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify proteins by their embeddings.")
    parser.add_argument("fasta", type=Path)
    parser.add_argument("table", type=Path, help="tab-separated: ID and class, with a header line")
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()

    with options.table.open() as table:
        classes = dict(list(csv.reader(table, delimiter="\t"))[1:])
    proteins = {name: text for name, text in esm_packed.read_fasta(options.fasta) if name in classes}
    expected = np.array([classes[name] for name in proteins])
    sequences = [sequence[:1022] for sequence in proteins.values()]
    print(f"{len(expected)} proteins: {', '.join(f'{n} {c}' for c, n in Counter(expected).most_common())}")

    embeddings = np.stack(esm_packed.ESM2.from_pretrained(options.model).embed(sequences))
    frequencies = np.array([[text.count(letter) / len(text) for letter in AMINO_ACIDS] for text in sequences])
    most_frequent = Counter(expected).most_common(1)[0][0]
    predictions = {
        f"embeddings of {options.model}": held_out_predictions(embeddings, expected),
        "residue frequencies": held_out_predictions(frequencies, expected),
        "most frequent class": np.full(len(expected), most_frequent),
    }
    print(f"{'held-out':<32}{'accuracy':>10}{'balanced':>10}")
    for name, predicted in predictions.items():
        accuracy = (predicted == expected).mean()
        print(f"{name:<32}{accuracy:>10.1%}{balanced_accuracy_score(expected, predicted):>10.1%}")


if __name__ == "__main__":
    main()
