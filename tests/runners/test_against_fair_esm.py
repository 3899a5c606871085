"""The whole path, from a FASTA file to the rows on disk, against fair-esm on the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import fair_esm_reference
import h5py
import numpy as np
import pytest
import torch

from esm_packed.runners.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "proteins.fasta"
MYCOPLASMA = ROOT.parent / "shared" / "data" / "mycoplasma_genitalium.fasta"


def records_of(path: Path) -> dict[str, str]:
    records = path.read_text().split(">")[1:]
    return {r.split(maxsplit=1)[0]: "".join(r.splitlines()[1:]) for r in records}


@pytest.mark.parametrize(
    "model, fasta, num_records",
    [
        ("demo", EXAMPLES, 35),
        pytest.param(
            "random:esm2_t12_35M_UR50D", MYCOPLASMA, 476, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]
        ),
    ],
)
def test_rows_are_those_of_fair_esm(model: str, fasta: Path, num_records: int, tmp_path: Path) -> None:
    if not fasta.exists():
        pytest.skip(f"needs {fasta}")
    output, checkpoint = tmp_path / "out.h5", tmp_path / "esm2_checkpoint.pt"
    assert main(["embed", str(fasta), "-o", str(output), "--model", model, "--quiet"]) == 0
    assert main(["checkpoint", model, "-o", str(checkpoint)]) == 0
    fair = fair_esm_reference.load(checkpoint, torch.float32)
    last = fair.num_layers

    records = records_of(fasta)
    with h5py.File(output) as file:
        assert list(file["sequence_ids"].asstr()) == list(records)
        assert file["embeddings"].shape == (num_records, fair.embed_dim)
        rows, truncated = file["embeddings"][:], file["truncated"][:]
    for row, cut, sequence in zip(rows, truncated, records.values(), strict=True):
        expected = fair_esm_reference.run(fair, [sequence[:1022]])[0]["mean"][last].numpy()
        assert np.linalg.norm(row - expected) <= 1e-5 * np.linalg.norm(expected)
        assert cut == (len(sequence) > 1022)
