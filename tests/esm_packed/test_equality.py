"""Equal to fair-esm 2.0.0: every layer, logits, means and contacts, on checkpoints in its own format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fair_esm_reference
import numpy as np
import pytest
import torch
from fair_esm_reference import end_to_end
from tolerances import relative_error

from esm_packed import ESM2
from esm_packed.alphabet import encode
from esm_packed.outputs import mean_of, output_names
from esm_packed.packing import PackedBatch, pack

HEAD_DIMS = [16, 24, 32, 64, 128]
NUM_LAYERS = 3
HALF_TYPES = [(16, "fp16"), (24, "bf16"), (128, "fp16")]
"""Each of the others takes 2 s."""
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def proteins(*more: int) -> list[str]:
    """Lengths 1 to 300, and `more`, every letter ESM-2 knows, masks in some, one masked throughout.

    Many are short: a rounding in a row's variance moves the whole row, so a gate on means needs many rows.
    """
    lengths = [129, 1, 2, 15, 16, 17, 63, 64, 65, 300, *range(3, 83, 2), *more]
    plain = fair_esm_reference.random_sequences(lengths, seed=1)
    half_masked = plain[0][:60] + "<mask>" * 50 + plain[0][60:]
    return [half_masked, "<mask>" * 7, "M<mask>", *plain]


@dataclass(frozen=True)
class Case:
    checkpoint: Path
    sequences: list[str]
    truth: list[dict[str, Any]]

    def fair(self, dtype: str, stop: int | None = None) -> list[dict[str, Any]]:
        model = fair_esm_reference.load(self.checkpoint, DTYPES[dtype])
        return fair_esm_reference.run(model, self.sequences[:stop])

    def batch(self, stop: int | None = None) -> PackedBatch:
        return pack([encode(sequence) for sequence in self.sequences[:stop]])


@pytest.fixture(scope="module", params=HEAD_DIMS, ids=lambda head_dim: f"head_dim{head_dim}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("checkpoint") / f"esm2_head_dim{request.param}.pt"
    num_heads = 4 if request.param <= 32 else 2
    fair_esm_reference.write_checkpoint(
        path, num_layers=NUM_LAYERS, num_heads=num_heads, head_dim=request.param
    )
    # longer than positions were in training; elsewhere it would take most of the time
    sequences = proteins(*[1300] * (request.param == 24))
    truth = fair_esm_reference.run(fair_esm_reference.load(path, torch.float64), sequences)
    return Case(path, sequences, truth)


a_head_dim = pytest.mark.parametrize("case", [24], indirect=True, ids=lambda dim: f"head_dim{dim}")
"""For what does not depend on it."""


def ours(model: ESM2, batch: PackedBatch) -> dict[str, torch.Tensor]:
    layers = range(NUM_LAYERS + 1)
    output = model.forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers, return_logits=True
    )
    assert output.logits is not None
    return (
        {f"layer {layer}": output.representations[layer] for layer in layers}
        | {
            name.replace("/", " "): mean
            for name, mean in model.embed_packed(batch, output_names(["mean"], layers)).items()
        }
        | {"logits": output.logits}
    )


def test_fp64_is_fair_esm(case: Case) -> None:
    model = ESM2.from_pretrained(case.checkpoint, dtype="fp64", device="cpu")
    expected = end_to_end(case.truth)
    for name, actual in ours(model, case.batch()).items():
        assert actual.dtype == torch.float64
        assert relative_error(actual, expected[name]) <= 1e-10, name


def test_fp32_is_as_close_to_the_truth_as_fair_esm(case: Case) -> None:
    model = ESM2.from_pretrained(case.checkpoint, dtype="fp32", device="cpu")
    truth, fair = end_to_end(case.truth), end_to_end(case.fair("fp32"))
    for name, actual in ours(model, case.batch()).items():
        assert relative_error(actual, truth[name]) <= 1.5 * relative_error(fair[name], truth[name]), name


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(head_dim, dtype, marks=() if (head_dim, dtype) in HALF_TYPES else pytest.mark.slow)
        for head_dim in HEAD_DIMS
        for dtype in ("fp16", "bf16")
    ],
    indirect=["case"],
)
def test_half_types_are_within_twice_the_error_of_fair_esm(case: Case, dtype: str) -> None:
    model = ESM2.from_pretrained(case.checkpoint, dtype=dtype, device="cpu")
    # The last protein is left out: fair-esm takes 10 s for 1,300 residues in a half type on a CPU.
    truth, fair = end_to_end(case.truth[:-1]), end_to_end(case.fair(dtype, -1))
    for name, actual in ours(model, case.batch(-1)).items():
        assert relative_error(actual, truth[name]) <= 2 * relative_error(fair[name], truth[name]), name


def test_contacts_are_those_of_fair_esm(case: Case) -> None:
    sequence = case.sequences[3]
    fair = fair_esm_reference.load(case.checkpoint, torch.float64)
    with fair_esm_reference.faithful(torch.float64):
        tokens = torch.tensor([[0, *fair_esm_reference.ALPHABET.encode(sequence), 2]])
        expected = fair.predict_contacts(tokens)[0].numpy()
    assert expected.std() > 1e-3
    actual = ESM2.from_pretrained(case.checkpoint, dtype="fp64", device="cpu").predict_contacts(sequence)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    single = ESM2.from_pretrained(case.checkpoint, dtype="fp32", device="cpu").predict_contacts(sequence)
    np.testing.assert_allclose(single, expected, atol=1e-4)


@pytest.mark.parametrize("dtype, bound", [("fp64", 1e-12), ("fp32", 1e-5)])
def test_packing_changes_nothing(case: Case, dtype: str, bound: float) -> None:
    """Alone, packed, and packed in another order: the same rows."""
    model = ESM2.from_pretrained(case.checkpoint, dtype=dtype, device="cpu")
    sequences = case.sequences[:12]
    together = model.embed(sequences, per_residue=True, token_budget=10_000)
    order = np.random.default_rng(0).permutation(len(sequences))
    shuffled = model.embed([sequences[i] for i in order], per_residue=True, token_budget=400)
    means = model.embed(sequences)
    for position, index in enumerate(order):
        alone = model.embed([sequences[index]], per_residue=True)[0]
        scale = np.abs(alone).max()
        assert np.abs(together[index] - alone).max() <= bound * scale
        assert np.abs(shuffled[position] - alone).max() <= bound * scale
        assert np.abs(means[index] - alone.mean(0)).max() <= bound * scale


@a_head_dim
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_boundary_is_seen(case: Case, shift: int) -> None:
    model = ESM2.from_pretrained(case.checkpoint, dtype="fp32", device="cpu")
    batch = case.batch()
    shifted = batch.cu_seqlens.clone()
    shifted[10] += shift
    right = model.embed_packed(batch, [mean_of(NUM_LAYERS)])[mean_of(NUM_LAYERS)]
    wrong_batch = PackedBatch(batch.input_ids, shifted, batch.max_seqlen)
    wrong = model.embed_packed(wrong_batch, [mean_of(NUM_LAYERS)])[mean_of(NUM_LAYERS)]
    assert relative_error(wrong[9:11], right[9:11]) > 1e-2
    untouched = [i for i in range(batch.num_sequences) if i not in (9, 10)]
    assert relative_error(wrong[untouched], right[untouched]) <= 1e-5


@a_head_dim
def test_recomputed_inv_freq_is_another_model(case: Case) -> None:
    """Were inv_freq recomputed in FP32 rather than read, the FP64 test would fail by this much."""
    model = ESM2.from_pretrained(case.checkpoint, dtype="fp64", device="cpu")
    head_dim = model.config.head_dim
    model.rotary.inv_freq = 1 / 10000 ** (torch.arange(0, head_dim, 2).double() / head_dim)
    actual = ours(model, case.batch())
    assert relative_error(actual["mean 3"], end_to_end(case.truth)["mean 3"]) > 1e-7
