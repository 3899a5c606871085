"""The named workloads: seeded, as long as measured proteins, of real residues."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import workloads
from contenders.batching import LAYOUTS, computed_lengths, plan_unsorted
from workloads import MAX_RESIDUES, WORKLOADS, proteins, sample_residues, token_lengths, write_fasta

from esm_packed.alphabet import encode

MEASURED = json.loads(Path(workloads.__file__).with_name("length_quantiles.json").read_text())


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_proteins_of_exactly_so_many_tokens(name: str) -> None:
    first = proteins(name, 5000, seed=3)
    assert first == proteins(name, 5000, seed=3)
    assert sum(len(sequence) + 2 for sequence in first) == 5000
    assert [len(sequence) + 2 for sequence in first] == token_lengths(name, 5000, seed=3)
    if name != "constant1024":
        assert first != proteins(name, 5000, seed=4)


@pytest.mark.parametrize("total_tokens", [3, 4, 5, 6, 1023, 1024, 1025, 1026, 1027])
@pytest.mark.parametrize("name", ["short50", "constant1024"])
def test_every_protein_keeps_a_residue(name: str, total_tokens: int) -> None:
    lengths = token_lengths(name, total_tokens)
    assert sum(lengths) == total_tokens
    assert min(lengths) >= 3


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("uniref", "uniref_esm2_10k"),
        ("viral", "swissprot_viruses"),
        ("proteome", "mycoplasma_genitalium"),
    ],
)
def test_lengths_have_the_measured_quantiles(name: str, source: str) -> None:
    drawn = sample_residues(name, 100_000, np.random.default_rng(0))
    for percent in (5, 25, 50, 75, 90):
        expected = min(MEASURED[source]["len"][percent], MAX_RESIDUES)
        assert np.percentile(drawn, percent) == pytest.approx(expected, rel=0.05)
    assert drawn.max() == MAX_RESIDUES


@pytest.mark.parametrize(
    ("name", "low", "high"), [("short50", 25, 75), ("medium150", 75, 225), ("long300", 150, 450)]
)
def test_length_classes_stay_within_their_bounds(name: str, low: int, high: int) -> None:
    drawn = sample_residues(name, 20_000, np.random.default_rng(0))
    assert drawn.min() >= low
    assert drawn.max() <= high
    assert drawn.mean() == pytest.approx((low + high) / 2, rel=0.1)


def test_constant1024_is_constant() -> None:
    assert token_lengths("constant1024", 4096) == [1024] * 4


def test_residues_are_as_frequent_as_in_uniref_and_in_the_alphabet() -> None:
    text = "".join(proteins("uniref", 200_000))
    counts = Counter(text)
    assert counts["L"] / len(text) == pytest.approx(0.09928, rel=0.05)
    assert counts["W"] / len(text) == pytest.approx(0.01137, rel=0.1)
    encode(text)


def test_an_unknown_workload_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="workload 'tiny' is not known; choose from uniref"):
        proteins("tiny", 100)
    with pytest.raises(ValueError, match="at least 3, got 2"):
        proteins("uniref", 2)


def test_the_fasta_file_holds_the_proteins(tmp_path: Path) -> None:
    sequences = proteins("short50", 500)
    write_fasta(tmp_path / "a.fasta", sequences)
    lines = (tmp_path / "a.fasta").read_text().split("\n")
    assert lines[1:-1:2] == sequences
    assert lines[0] == ">p0"


def test_what_attention_computes_in_each_layout() -> None:
    """By hand: rows of a padded batch are as long as its longest; a filled pack has padding behind."""
    token_ids = [np.full(residues, 5, dtype=np.uint8) for residues in (3, 7)]
    lengths = {
        name: computed_lengths(layout.lay_out(token_ids, 20), name).tolist()
        for name, layout in LAYOUTS.items()
    }
    assert lengths == {
        "packed": [5, 9],
        "fixed": [5, 9, 6],
        "padded": [9, 9],
        "padded_unsorted": [9, 9],
    }


def test_batches_in_input_order() -> None:
    batches = [batch.tolist() for batch in plan_unsorted([4, 2, 5, 5, 1, 30, 1], 10)]
    assert batches == [[0, 1], [2, 3], [4], [5], [6]]
