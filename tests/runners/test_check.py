"""`esm-packed check`: it passes the model it knows, and fails one that was changed in any part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from esm_packed.checkpoints import load_checkpoint, save_fair_esm
from esm_packed.checkpoints.download import OFFICIAL_FILES
from esm_packed.checkpoints.formats import DEMO_FILE
from esm_packed.config import ESM2_MODELS
from esm_packed.numerics import PRECISIONS
from esm_packed.reports.validation.thresholds import THRESHOLDS
from esm_packed.runners import check
from esm_packed.runners.cli.main import main

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens"

Change = Callable[[torch.Tensor], torch.Tensor]


def changed_demo(tmp_path: Path, name: str, change: Change) -> Path:
    """The demo in FP32, the tensors changed whose name ends with `name`, in a file called demo.pt."""
    demo = load_checkpoint("demo")
    tensors = {
        key: change(tensor.float()) if key.endswith(name) else tensor.float()
        for key, tensor in demo.tensors.items()
    }
    save_fair_esm((demo.config, tensors), tmp_path / "esm2_demo.pt")
    return (tmp_path / "esm2_demo.pt").rename(tmp_path / "demo.pt")


def test_the_demo_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "demo", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "(the file in this package)" in lines[0]
    assert lines[-1] == "passed: fp32 on cpu, attention sdpa"
    assert sum("relative L2" in line for line in lines) == 10


@pytest.mark.parametrize(
    "name, change",
    [
        ("layers.2.fc1.weight", lambda tensor: tensor * 1.001),
        ("layers.4.self_attn.k_proj.weight", lambda tensor: tensor.flip(0)),
        ("self_attn.rot_emb.inv_freq", lambda tensor: 10000.0 ** -(torch.arange(8) / 8)),
        ("embed_tokens.weight", lambda tensor: tensor.bfloat16().float()),
        ("lm_head.bias", lambda tensor: tensor + 0.01),
        ("emb_layer_norm_after.bias", lambda tensor: tensor * torch.nan),
    ],
)
def test_a_changed_model_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: Change
) -> None:
    path = changed_demo(tmp_path, name, change)
    assert main(["check", str(path), "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "(not a published file: converted or changed)" in lines[0]
    assert lines[-1].startswith("differs: fp32 on cpu, attention sdpa: ")
    assert ("logits" in lines[-1]) == (name == "lm_head.bias"), "the first that differs is named"


def test_the_same_weights_in_another_file_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed_demo(tmp_path, "lm_head.bias", lambda tensor: tensor)
    assert main(["check", str(path), "--device", "cpu"]) == 0
    assert "(not a published file: converted or changed)" in capsys.readouterr().out


def test_a_file_is_known_by_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = tmp_path / "mine.pt"
    shutil.copyfile(DEMO_FILE, renamed)
    assert main(["check", str(renamed), "--device", "cpu"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"demo: {renamed}, sha256 345a675b")


def test_the_default_precision_of_the_device_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "resolve_precision", lambda name, device: PRECISIONS["fp16"])
    assert main(["check", "demo", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "passed: fp32 on cpu, attention sdpa; fp16 on cpu, attention sdpa"
    assert sum("allowed 1.0e-05" in line for line in lines) == 10
    assert sum("allowed 5.0e-03" in line for line in lines) == 10

    path = changed_demo(tmp_path, "layers.2.fc1.weight", lambda tensor: tensor * 1.001)
    assert main(["check", str(path), "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("differs: fp32 on cpu"), "FP16 may not see it; FP32 must"


@pytest.mark.parametrize(
    "model", ["esm2_t48_15B_UR50D", "facebook/esm2_t48_15B_UR50D", "random:esm2_t6_8M_UR50D"]
)
def test_a_model_without_golden_values_is_not_loaded(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "load_checkpoint", lambda *call, **options: pytest.fail("loaded"))
    assert main(["check", model]) == 2
    error = capsys.readouterr().err
    assert f"no golden values for this model: {model}; available for demo, esm2_t6_8M_UR50D" in error
    assert "Traceback" not in error and error.count("\n") == 1


def test_a_fine_tune_has_no_golden_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed_demo(tmp_path, "lm_head.bias", lambda tensor: tensor + 1).rename(tmp_path / "esm2_mine.pt")
    assert main(["check", str(tmp_path / "esm2_mine.pt")]) == 2
    assert "no golden values for this model" in capsys.readouterr().err


def test_another_shape_under_a_published_name_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "esm2_t6_8M_UR50D.pt"
    changed_demo(tmp_path, "lm_head.bias", lambda tensor: tensor + 1).rename(path)
    assert main(["check", str(path)]) == 1
    assert "differs: esm2_t6_8M_UR50D has another shape" in capsys.readouterr().out


def test_random_weights_are_not_the_published_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of value that a published model has is computed, and none is met by chance."""
    path = tmp_path / "esm2_t6_8M_UR50D.pt"
    save_fair_esm(load_checkpoint("random:esm2_t6_8M_UR50D"), path)
    assert main(["check", str(path), "--device", "cpu"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "relative L2" in line]
    assert lines[-1].startswith("differs: ")
    errors = [float(line.split("relative L2 ")[1].split(",")[0]) for line in lines[:-1]]
    assert len(errors) == 5 and min(errors) > 0.3


def test_values_fit_the_published_models() -> None:
    known = check.load_golden()
    assert list(known) == ["demo", *list(ESM2_MODELS)[:5]]
    for name, golden in known.items():
        if name in ESM2_MODELS:
            assert golden.has_shape_of(ESM2_MODELS[name])
            assert OFFICIAL_FILES[name][0] in golden.sha256 and len(golden.sha256) == 2
        for case in golden.cases:
            assert case.values.dtype == torch.float32 and case.values.isfinite().all()
            assert case.output in ("mean", "tokens", "logits")
            assert case.source in (check.CASES_FILE.parent / "README.md").read_text()
    assert sum(path.stat().st_size for path in check.CASES_FILE.parent.iterdir()) < 120_000


def test_the_demos_values_are_those_of_fair_esm() -> None:
    _, cases, values = make_golden.demo()
    stored = load_file(check.VALUES_FILE)
    assert {case["values"] for case in cases} == set(values)
    for key, array in values.items():
        np.testing.assert_allclose(stored[key], array, rtol=0, atol=THRESHOLDS["fp64"].relative_l2 + 1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not GOLDENS.exists(), reason=f"{GOLDENS} is not here")
def test_published_values_are_those_of_their_sources() -> None:
    known, stored = check.load_golden(), load_file(check.VALUES_FILE)
    for name, (sha256, cases, values) in make_golden.published(GOLDENS).items():
        assert sha256.items() <= known[name].sha256.items()
        assert [case["sequence"] for case in cases] == [case.sequence for case in known[name].cases]
        for key, array in values.items():
            np.testing.assert_array_equal(stored[key], array)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "demo", "--device", "cuda:99"]) == 2
    assert "device cuda:99" in capsys.readouterr().err


def test_too_little_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*call: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check, "_errors", no_memory)
    assert main(["check", "demo", "--device", "cpu"]) == 2
    assert "demo does not fit into the memory of cpu in fp32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("", "argument MODEL: the name of the model is empty"),
        ("random:foo", "'random:foo' should be random:NAME or random:NAME@SEED"),
    ],
)
def test_names_that_are_no_models(model: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", model]) == 2
    assert f"esm-packed: error: {error}" in capsys.readouterr().err
