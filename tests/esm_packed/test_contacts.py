"""Contacts and attention maps: equal to fair-esm 2.0.0 whatever is packed together, in little memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fair_esm_reference
import numpy as np
import numpy.typing as npt
import pytest
import torch
from programs import run_python

from esm_packed import ESM2
from esm_packed import contacts as contacts_module
from esm_packed.alphabet import encode
from esm_packed.packing import pack

NUM_LAYERS = 3
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PEAK_MEMORY = Path(__file__).parents[1] / "support" / "contacts_memory.py"

Contacts = list[npt.NDArray[np.floating[Any]]]


def proteins() -> list[str]:
    """Every letter ESM-2 knows, masks in one and nothing else in another; lengths from 1, not in order."""
    plain = fair_esm_reference.random_sequences([70, 1, 2, 3, 129, 15, 16, 17, 64], seed=5)
    return [plain[0][:30] + "<mask>" * 9 + plain[0][30:], "<mask>" * 7, *plain]


@dataclass(frozen=True)
class Case:
    checkpoint: Path
    truth: Contacts

    def model(self, dtype: str) -> ESM2:
        return ESM2.from_pretrained(self.checkpoint, dtype=dtype, device="cpu")

    def fair(self, dtype: str) -> Contacts:
        return fair_contacts(self.checkpoint, DTYPES[dtype])

    def error(self, contacts: Contacts) -> float:
        """Relative L2 error over all proteins."""
        difference = sum(float(((c - t) ** 2).sum()) for c, t in zip(contacts, self.truth, strict=True))
        return float((difference / sum(float((t**2).sum()) for t in self.truth)) ** 0.5)


def tokens_of(sequence: str) -> torch.Tensor:
    return pack([encode(sequence)]).input_ids[None].long()


def fair_contacts(checkpoint: Path, dtype: torch.dtype) -> Contacts:
    model = fair_esm_reference.load(checkpoint, dtype)
    with fair_esm_reference.faithful(dtype):
        return [model.predict_contacts(tokens_of(sequence))[0].double().numpy() for sequence in proteins()]


@pytest.fixture(scope="module", params=[16, 24, 64], ids=lambda head_dim: f"head_dim{head_dim}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("checkpoint") / f"esm2_head_dim{request.param}.pt"
    fair_esm_reference.write_checkpoint(path, num_layers=NUM_LAYERS, num_heads=4, head_dim=request.param)
    return Case(path, fair_contacts(path, torch.float64))


a_head_dim = pytest.mark.parametrize("case", [24], indirect=True, ids=lambda dim: f"head_dim{dim}")
"""For what does not depend on it."""


@pytest.mark.parametrize("token_budget", [1, 100, 10_000])
def test_fp64_is_fair_esm(case: Case, token_budget: int) -> None:
    contacts = case.model("fp64").contacts(proteins(), token_budget=token_budget)
    for actual, expected in zip(contacts, case.truth, strict=True):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)
    assert np.concatenate([expected.ravel() for expected in case.truth]).std() > 1e-2


def test_fp32_is_as_close_to_the_truth_as_fair_esm(case: Case) -> None:
    contacts = case.model("fp32").contacts(proteins())
    assert all(actual.dtype == np.float32 for actual in contacts)
    assert case.error(contacts) <= 1.5 * case.error(case.fair("fp32"))


@pytest.mark.parametrize(("dtype", "largest"), [("fp16", 4e-3), ("bf16", 4e-2)])
def test_half_types_are_within_twice_the_error_of_fair_esm(case: Case, dtype: str, largest: float) -> None:
    contacts = case.model(dtype).contacts(proteins())
    assert all(actual.dtype == np.float32 for actual in contacts)
    rounding = torch.finfo(DTYPES[dtype]).eps / 2
    assert case.error(contacts) <= 2 * case.error(case.fair(dtype)) + rounding
    for actual, expected in zip(contacts, case.truth, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=largest)


@a_head_dim
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_contacts_are_symmetric_and_tiles_change_nothing(
    case: Case, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.model("fp32")
    expected = model.contacts(proteins())
    monkeypatch.setattr(contacts_module, "TILE", tile)
    for actual, whole in zip(model.contacts(proteins()), expected, strict=True):
        np.testing.assert_array_equal(actual, actual.T)
        np.testing.assert_allclose(actual, whole, rtol=1e-5)


@a_head_dim
def test_predict_contacts_is_contacts_of_one_protein(case: Case) -> None:
    model = case.model("fp64")
    for sequence, expected in zip(proteins(), model.contacts(proteins(), token_budget=1), strict=True):
        np.testing.assert_array_equal(model.predict_contacts(sequence), expected)
    assert model.contacts([]) == []
    with pytest.raises(ValueError, match=r"sequences\[1\] is empty"):
        model.contacts(["MKT", ""])
    with pytest.raises(ValueError, match=r"^sequence is empty"):
        model.predict_contacts("")


@a_head_dim
def test_what_is_not_finite_is_named_and_spoils_no_other(case: Case) -> None:
    model = case.model("fp32")
    expected = model.contacts(["MKTAY", "ACD"])
    with torch.no_grad():
        model.embedding.weight[22] = torch.inf  # W
    with pytest.warns(
        UserWarning, match=r"^2 of 4 sequences: the contacts are not finite \(dtype fp32\)"
    ) as told:
        actual = model.contacts(["MKTAY", "AWC", "ACD", "WW"])
    (message,) = [str(warning.message) for warning in told]
    assert message.endswith(": sequences[1], sequences[3]")
    assert told[0].filename == __file__
    assert np.isnan(actual[1]).all() and np.isnan(actual[3]).all()
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(actual[2], expected[1], rtol=1e-5)


@a_head_dim
def test_attention_maps_are_those_of_fair_esm(case: Case) -> None:
    sequence = proteins()[0]
    fair = fair_esm_reference.load(case.checkpoint, torch.float64)
    with fair_esm_reference.faithful(torch.float64):
        expected = fair(tokens_of(sequence), need_head_weights=True)["attentions"][0].numpy()
    model = case.model("fp64")
    maps = model.attention_maps(sequence)
    assert maps.shape == (NUM_LAYERS, 4, 81, 81)
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-12)
    some = model.attention_maps(sequence, layers=[-1, 1], heads=[3, -4])
    np.testing.assert_array_equal(some, maps[[2, 0]][:, [3, 0]])


@a_head_dim
def test_what_has_no_map_is_refused(case: Case) -> None:
    model = case.model("fp32")
    with pytest.raises(ValueError, match="layers: 0 is the embedding, which has no attention; pass 1 to 3"):
        model.attention_maps("MKT", layers=[1, 0])
    with pytest.raises(ValueError, match="layer 4 does not exist"):
        model.attention_maps("MKT", layers=[4])
    with pytest.raises(ValueError, match="head 4 does not exist: the model has heads 0 to 3"):
        model.attention_maps("MKT", heads=[4])


def test_no_map_is_held() -> None:
    """8M, 1,500 residues: beyond an embedding's activations one matrix and tiles; all maps are 1,080 MB."""
    done = run_python(PEAK_MEMORY, "random:esm2_t6_8M_UR50D", "1500", "contacts", "embed")
    assert done.returncode == 0, done.stderr
    contacts, embed = map(int, done.stdout.split())
    inherited = 8 * 2**20  # free memory of the process forked from may hold some of the activations
    assert contacts <= 2.5 * 4 * 1500**2 + embed + inherited
    assert contacts <= 60_000_000
