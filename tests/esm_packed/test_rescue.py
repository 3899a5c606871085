"""What is not finite in a half type is computed again in FP32, and said; never returned in silence."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from models import model_of

from esm_packed import ESM2
from esm_packed import model as model_module
from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint
from esm_packed.config import ESM2Config
from esm_packed.rescue import Rescue
from esm_packed.stress import stress_checkpoint

CONFIG = ESM2Config(4, 96, 4)
CPU = torch.device("cpu")


def proteins(*lengths: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in lengths]


@pytest.fixture(scope="module")
def overflowing() -> Checkpoint:
    """Overflows in FP16 for long proteins."""
    return stress_checkpoint(CONFIG, peak=70_000)


def changed(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint("changed", CONFIG, {**checkpoint.tensors, **tensors}, "", "")


SEQUENCES = proteins(*[8] * 6, 250, 250)


@pytest.mark.parametrize("per_residue", [False, True])
@pytest.mark.parametrize("token_budget", [1, 1024])
def test_what_overflows_is_recomputed_and_named(
    overflowing: Checkpoint, per_residue: bool, token_budget: int
) -> None:
    model, truth = model_of(overflowing, "fp16"), model_of(overflowing, "fp32")
    options: dict[str, Any] = {"per_residue": per_residue, "token_budget": token_budget}
    pattern = r"^2 of 8 sequences: .*not finite \(dtype fp16\); .*fp32: sequences\[6\], sequences\[7\]$"
    with pytest.warns(UserWarning, match=pattern) as caught:
        arrays = model.embed(SEQUENCES, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    expected = [truth.embed([sequence], per_residue=per_residue)[0] for sequence in SEQUENCES]
    for array, in_fp32, was_rescued in zip(arrays, expected, [False] * 6 + [True] * 2, strict=True):
        assert array.dtype == np.float32 and array.shape == in_fp32.shape
        np.testing.assert_allclose(array, in_fp32, rtol=0.1, atol=0.1)
        assert np.array_equal(array, in_fp32) == was_rescued


def test_of_several_layers_all_are_recomputed_and_the_sequence_is_named_once(overflowing: Checkpoint) -> None:
    model, truth = model_of(overflowing, "fp16"), model_of(overflowing, "fp32")
    with pytest.warns(UserWarning, match="^2 of 8 sequences:") as caught:
        several = model.embed(SEQUENCES, layer=[0, -1])
    assert len(caught) == 1
    for layer, arrays in several.items():
        np.testing.assert_array_equal(arrays[6], truth.embed([SEQUENCES[6]], layer=layer)[0])
        assert np.isfinite(arrays).all()


def test_no_warning_and_no_second_model_without_need(
    overflowing: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "load_in_fp32", lambda *call: pytest.fail("loaded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of(overflowing, "fp16").embed(SEQUENCES[:6])
        for mode in ("bf16", "fp32", "fp64"):
            model_of(overflowing, mode).embed(SEQUENCES)


@pytest.mark.parametrize("mode", ["fp16", "fp32", "fp64"])
@pytest.mark.parametrize("per_residue", [False, True])
def test_what_no_precision_can_hold_is_nan_and_named(
    overflowing: Checkpoint, mode: str, per_residue: bool
) -> None:
    table = overflowing.tensors["embed_tokens.weight"].clone()
    table[22, 0] = torch.inf  # W
    model = model_of(changed(overflowing, {"embed_tokens.weight": table}), mode)
    with pytest.warns(UserWarning) as caught:
        arrays = model.embed(["ACD", "AWC", "CDE"], per_residue=per_residue)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"1 of 3 sequences: the embedding is not finite (dtype {mode})")
    assert message.endswith(": sequences[1]")
    assert ("nor in fp32" in message) == (mode == "fp16")
    assert np.isnan(arrays[1]).all()
    assert np.isfinite(arrays[0]).all() and np.isfinite(arrays[2]).all()


def test_many_are_counted_and_not_all_named(overflowing: Checkpoint) -> None:
    weight = torch.full((96,), torch.inf)
    model = model_of(changed(overflowing, {"emb_layer_norm_after.weight": weight}), "fp32")
    with pytest.warns(UserWarning, match=r"^30 of 30 .*: sequences\[0\], .*, sequences\[19\] and 10 more$"):
        model.embed(["ACD"] * 30)


def test_contacts_that_overflow_are_recomputed(overflowing: Checkpoint) -> None:
    with pytest.warns(UserWarning, match=r"contacts are not finite \(dtype fp16\); recomputed in fp32"):
        contacts = model_of(overflowing, "fp16").predict_contacts(SEQUENCES[6])
    np.testing.assert_array_equal(contacts, model_of(overflowing, "fp32").predict_contacts(SEQUENCES[6]))
    assert np.isfinite(contacts).all()


def test_the_model_in_fp32_is_loaded_once(overflowing: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(overflowing, "fp16")
    names = [name for name, _ in model.named_parameters()]
    loaded = []
    original = model_module.load_in_fp32

    def load(checkpoint: Checkpoint, device: torch.device) -> ESM2:
        loaded.append(device)
        return original(checkpoint, device)

    monkeypatch.setattr(model_module, "load_in_fp32", load)
    model = model_of(overflowing, "fp16")
    with pytest.warns(UserWarning, match="recomputed"):
        model.embed(SEQUENCES)
        model.embed(SEQUENCES[6:])
    assert loaded == [CPU]
    assert [name for name, _ in model.named_parameters()] == names, "it is no part of the model"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_can_rescue_too(overflowing: Checkpoint, copied) -> None:
    with pytest.warns(UserWarning, match="recomputed in fp32"):
        assert np.isfinite(copied(model_of(overflowing, "fp16")).embed(SEQUENCES[6:])).all()


def test_no_room_on_the_device_means_the_cpu(
    overflowing: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ESM2.from_checkpoint
    tried = []

    def from_checkpoint(checkpoint: Checkpoint, device: torch.device, *others: Any) -> ESM2:
        tried.append(device)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("out of memory")
        return original(checkpoint, device, *others)

    monkeypatch.setattr(ESM2, "from_checkpoint", from_checkpoint)
    monkeypatch.setattr(
        model_module, "select_backend", lambda name, device, *others: select_backend(name, CPU, *others)
    )
    assert model_module.load_in_fp32(overflowing, torch.device("cuda", 0)).device == CPU
    assert tried == [torch.device("cuda", 0), CPU]


def test_an_error_that_is_no_lack_of_memory_surfaces() -> None:
    rows = {"mean/1": np.full(3, np.inf, np.float32)}

    def fail(error: Exception):
        def compute(model: object) -> dict[str, np.ndarray]:
            raise error

        return compute

    rescue = Rescue(object)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a bug"):
        rescue.replace(rows, fail(RuntimeError("a bug")), "dtype fp16")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        is_finite, reason = rescue.replace(rows, fail(error), "dtype fp16")
        assert not is_finite and "not enough memory" in reason
        assert np.isnan(rows["mean/1"]).all()


def test_what_storage_cannot_hold_is_nan() -> None:
    rows = {"mean/1": np.array([np.inf, 1.0], np.float16), "mean/2": np.array([1.0, 2.0], np.float16)}
    too_large = {"mean/1": np.array([1e6, 1.0], np.float32), "mean/2": np.array([1.0, 2.0], np.float32)}
    rescue = Rescue(object)  # type: ignore[arg-type]
    is_finite, reason = rescue.replace(rows, lambda model: too_large, "stored as float16")
    assert not is_finite and "nor in fp32" in reason
    assert all(np.isnan(row).all() for row in rows.values())
