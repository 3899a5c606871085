"""The precision validation passes the right model, fails every wrong one, and shows what it measured."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mistakes import (
    MISTAKES,
    PACKED,
    Mistake,
    angles_in_fp16,
    eos_pooled,
    recomputed_inv_freq,
    tanh_gelu,
    tf32,
    with_tensors,
)
from models import model_of
from tokens import decode

from esm_packed import kernels
from esm_packed.checkpoints import Checkpoint, load_checkpoint, save_fair_esm
from esm_packed.config import ESM2Config
from esm_packed.kernels import dispatch
from esm_packed.outputs import mean_of, output_names
from esm_packed.packing import pack
from esm_packed.reports.page import ReportError
from esm_packed.reports.validation import errors
from esm_packed.reports.validation.activations import Activations
from esm_packed.reports.validation.errors import Errors, PathResult, measure, rank_agreement
from esm_packed.reports.validation.numbers import as_json
from esm_packed.reports.validation.page import summary_lines, write_report
from esm_packed.reports.validation.reference import Reference, compute_reference, spread
from esm_packed.reports.validation.run import (
    Validation,
    ValidationSettings,
    by_length_class,
    estimate_seconds,
    num_passes,
    validate,
    verdict_line,
    weights_note,
)
from esm_packed.reports.validation.thresholds import (
    ERRORS_OF_MISTAKES,
    ERRORS_OF_THE_CORRECT_MODEL,
    THRESHOLDS,
    Threshold,
)
from esm_packed.reports.validation.verdict import judge, passes_classical_pair
from esm_packed.stress import stress_checkpoint

CPU = torch.device("cpu")
CONFIG = ESM2Config(6, 128, 4)
TOKEN_BUDGET = 400
LENGTHS = [5, 300, 80, 1, 41, 90, 120, 7, 60, 3, 33, 70, 25]
SETTINGS = ValidationSettings(CPU, TOKEN_BUDGET)

rng = np.random.default_rng(0)
PROTEINS = [rng.integers(4, 24, length).astype(np.uint8) for length in LENGTHS]
IDS = [f"protein{number}" for number in range(len(LENGTHS))]
CONDITIONS = {"proteins": "a<b>.fasta", "command": "esm-packed validate"}


@pytest.fixture(scope="module")
def stress() -> Checkpoint:
    return stress_checkpoint(CONFIG)


@pytest.fixture(scope="module")
def reference(stress: Checkpoint) -> Reference:
    return compute_reference("esm-packed", stress, CPU, PROTEINS)[0]


@pytest.fixture(scope="module")
def validation(stress: Checkpoint) -> Validation:
    return validate(lambda: stress, IDS, PROTEINS, SETTINGS)


@pytest.fixture(scope="module")
def report(validation: Validation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its files."""
    folder = tmp_path_factory.mktemp("report")
    write_report(validation, CONDITIONS, folder)
    return folder


# Wrong models


@pytest.mark.parametrize("variant", MISTAKES)
def test_a_wrong_model_fails_in_fp32(
    variant: Mistake, stress: Checkpoint, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout = variant(stress, monkeypatch)
    result = measure(model, layout, PROTEINS, reference, TOKEN_BUDGET)
    verdict = judge("fp32", [result], THRESHOLDS["fp32"])
    assert not verdict.passed and verdict.num_failed == len(PROTEINS)
    assert verdict.worst_relative_l2 is not None and verdict.worst_relative_l2 > 5e-5, "by no mere hair"


@pytest.mark.parametrize("variant", [eos_pooled, recomputed_inv_freq, tanh_gelu, angles_in_fp16])
def test_the_classical_pair_does_not_notice(
    variant: Mistake, stress: Checkpoint, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `CLASSICAL_NOTE` says, of proteins longer than a peptide."""
    model, layout = variant(stress, monkeypatch)
    cosine = measure(model, layout, PROTEINS, reference, TOKEN_BUDGET).means.cosine
    assert passes_classical_pair(cosine[torch.tensor(LENGTHS) >= 20])


def test_tf32_stand_in_keeps_ten_bits() -> None:
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -(1 + 2**-10 + 2**-13)])
    assert tf32(values).tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -(1 + 2**-10)]


def test_the_right_model_passes_in_every_mode_on_every_path(validation: Validation) -> None:
    assert [verdict.mode for verdict in validation.verdicts] == ["fp32", "fp16", "bf16"]
    assert validation.passed
    assert {path.path for path in validation.paths} == {
        "packed, sdpa",
        "packed, reference",
        "padded, masked sdpa",
    }
    worst = {verdict.mode: verdict.worst_relative_l2 or 0.0 for verdict in validation.verdicts}
    # each precision shows: none was computed in another
    assert worst["fp32"] < 2e-6
    assert 1e-5 < worst["fp16"] < 5e-3
    assert 5e-4 < worst["bf16"] < 3e-2
    assert ("tf32", "dtype 'tf32' needs a CUDA device, not cpu; choose 'fp32'") in validation.not_run
    assert any(what == "fp16, packed, varlen" for what, _ in validation.not_run)


def test_errors_are_those_of_embed_against_fair_esm(stress: Checkpoint, reference: Reference) -> None:
    """Formed again with NumPy from what `ESM2.embed` gives; packs of one, so that the bits are the same."""
    pytest.importorskip("esm.model.esm2", reason="fair-esm 2.0.0 is not installed")
    fair_esm, _ = compute_reference("fair-esm", stress, CPU, PROTEINS)
    torch.testing.assert_close(reference.means, fair_esm.means, rtol=0, atol=1e-11)
    model = model_of(stress, "fp32")
    path = measure(model, PACKED, PROTEINS, fair_esm, token_budget=1)
    for protein, sequence in enumerate(map(decode, PROTEINS)):
        expected = fair_esm.means[-1, protein].numpy()
        (actual,) = model.embed([sequence])
        error = actual - expected
        relative_l2 = np.linalg.norm(error) / np.linalg.norm(expected)
        assert float(path.means.relative_l2[protein]) == pytest.approx(relative_l2, rel=1e-6)
        assert float(path.means.max_error[protein]) == pytest.approx(np.abs(error).max(), rel=1e-6)
        _, expected_rows = fair_esm.residues(protein)
        (rows,) = model.embed([sequence], per_residue=True)
        assert rows.shape == expected_rows.shape, "so few residues are all compared"
        relative_l2 = np.linalg.norm(rows - expected_rows.numpy()) / np.linalg.norm(expected_rows)
        assert float(path.residues.relative_l2[protein]) == pytest.approx(relative_l2, rel=1e-6)
    assert torch.equal(path.mean_by_layer[-1], path.means.relative_l2)
    torch.testing.assert_close(path.residues_by_layer[-1], path.residues.relative_l2)


def test_errors_of_every_layer(stress: Checkpoint, reference: Reference) -> None:
    """Formed again from the model's layers; packs of one, so that the bits are the same."""
    model, layers = model_of(stress, "fp32"), range(CONFIG.num_layers + 1)
    path = measure(model, PACKED, PROTEINS, reference, token_budget=1)
    for protein, ids in enumerate(PROTEINS[:5]):
        batch = pack([ids])
        hidden_states = model.forward_packed(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers
        ).representations
        means = model.embed_packed(batch, output_names(["mean"], layers))
        for layer in layers:
            positions, expected = reference.layer_residues(protein, layer)
            actual = hidden_states[layer][1:-1].double()
            assert len(positions) == len(actual), "so few residues are all compared"
            of_residues = float((actual - expected).norm() / expected.norm())
            assert float(path.residues_by_layer[layer, protein]) == pytest.approx(of_residues, rel=1e-6)
            expected = reference.means[layer, protein]
            of_mean = float((means[mean_of(layer)][0].double() - expected).norm() / expected.norm())
            assert float(path.mean_by_layer[layer, protein]) == pytest.approx(of_mean, rel=1e-6)


def test_against_fair_esm_in_fp64(stress: Checkpoint) -> None:
    """Our FP64 path is within FP64's own rounding of fair-esm, so that either may be the reference."""
    pytest.importorskip("esm.model.esm2", reason="fair-esm 2.0.0 is not installed")
    settings = replace(SETTINGS, reference="fair-esm", modes=("fp64", "fp32"))
    done: list[int] = []
    validation = validate(lambda: stress, IDS, PROTEINS, settings, done.append)
    assert validation.passed and validation.reference.name == "fair-esm"
    double = next(verdict for verdict in validation.verdicts if verdict.mode == "fp64")
    assert double.worst_relative_l2 is not None and double.worst_relative_l2 < 1e-12
    assert sum(done) == num_passes(CONFIG, settings) * sum(LENGTHS)


def test_fair_esm_missing_is_said(stress: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "esm.model.esm2", None)
    with pytest.raises(ReportError, match=r"pip install fair-esm==2\.0\.0"):
        compute_reference("fair-esm", stress, CPU, PROTEINS)


def test_broken_weights_are_said(stress: Checkpoint) -> None:
    broken = with_tensors(stress, **{"layers.2.fc1.bias": torch.full((4 * CONFIG.hidden_size,), torch.inf)})
    with pytest.raises(ReportError, match="not finite even in fp64"):
        compute_reference("esm-packed", broken, CPU, PROTEINS[:2])


def test_fp16_overflow_is_detected() -> None:
    checkpoint = stress_checkpoint(ESM2Config(4, 96, 4), peak=60_000)
    settings = replace(SETTINGS, modes=("fp32", "fp16"))
    validation = validate(lambda: checkpoint, IDS, PROTEINS, settings)
    fp32, fp16 = validation.verdicts
    assert fp32.passed and fp32.num_nonfinite == 0
    assert not fp16.passed and not validation.passed
    assert 0 < fp16.num_nonfinite < len(PROTEINS)
    path = next(path for path in validation.paths if path.mode == "fp16")
    hit = path.nonfinite.any(0)
    assert torch.equal(hit, ~path.means.relative_l2.isfinite())
    assert not path.nonfinite[0].any() and path.nonfinite[1:, hit].all(), "from the layer of the outlier on"
    largest = validation.activations.max_abs("feed-forward output", 1)
    assert largest is not None and largest > 65_504
    assert any("NaN or Inf" in line for line in summary_lines(validation))


# The parts


def path_result(relative_l2: list[float], cosine: list[float]) -> PathResult:
    l2, cosines = torch.tensor([relative_l2, cosine], dtype=torch.float64)
    errors = Errors(l2, cosines, torch.zeros(len(cosine)))
    nothing = torch.empty(0)
    return PathResult("fp16", "packed", "sdpa", errors, errors, nothing, nothing, nothing, None, None, 0)


@pytest.mark.parametrize(
    "relative_l2, cosine, passed, failed",
    [
        ([1e-3, 5e-3], [1.0, 0.99999], True, 0),
        ([1e-3, 5.1e-3], [1.0, 1.0], False, 1),
        ([1e-3, 1e-3], [1.0, 0.99998], False, 1),
        ([1e-3, float("nan")], [1.0, float("nan")], False, 1),
        ([1e-3, 1e-3], [1.0, float("nan")], False, 1),
        ([float("nan")] * 2, [float("nan")] * 2, False, 2),
    ],
)
def test_every_protein_must_keep_to_the_thresholds(
    relative_l2: list[float], cosine: list[float], passed: bool, failed: int
) -> None:
    verdict = judge("fp16", [path_result(relative_l2, cosine)], Threshold(5e-3, 0.99999))
    assert verdict.passed == passed and verdict.num_failed == failed
    if failed:
        assert verdict.worst_protein == (1 if failed == 1 else 0)


@pytest.mark.parametrize("mode", ["fp64", "fp32"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_fails_where_no_cosine_is_asked_for(mode: str, broken: float) -> None:
    assert THRESHOLDS[mode].cosine is None
    limit = THRESHOLDS[mode].relative_l2
    good = path_result([limit, 0.0, limit], [float("nan")] * 3)
    assert judge(mode, [good], THRESHOLDS[mode]).passed
    assert not judge(mode, [path_result([0.0, 1.001 * limit, 0.0], [1.0] * 3)], THRESHOLDS[mode]).passed
    bad = path_result([0.0, broken, 0.0], [1.0] * 3)
    verdict = judge(mode, [good, replace(bad, layout="padded")], THRESHOLDS[mode])
    assert not verdict.passed
    assert (verdict.num_failed, verdict.num_nonfinite) == (1, 1)
    assert (verdict.worst_path, verdict.worst_protein) == ("padded, sdpa", 1)
    assert verdict.worst_relative_l2 == limit, "of the finite embeddings"


def test_the_classical_pair_fails_on_nan() -> None:
    cosine = torch.ones(1000, dtype=torch.float64)
    assert passes_classical_pair(cosine)
    cosine[:10] = 0.996
    assert passes_classical_pair(cosine)
    cosine[10] = 0.996
    assert not passes_classical_pair(cosine)
    assert not passes_classical_pair(torch.tensor([1.0] * 999 + [0.994]))
    assert not passes_classical_pair(torch.tensor([1.0] * 999 + [float("nan")]))


def test_one_bad_path_fails_the_mode() -> None:
    good, bad = path_result([1e-4] * 3, [1.0] * 3), path_result([1e-4, 1.0, 1e-4], [1.0, 0.5, 1.0])
    verdict = judge("fp16", [good, replace(bad, layout="padded")], THRESHOLDS["fp16"])
    assert not verdict.passed and not verdict.classical
    assert (verdict.worst_path, verdict.worst_protein, verdict.worst_cosine) == ("padded, sdpa", 1, 0.5)


def test_relative_errors_are_relative_to_the_reference() -> None:
    expected = torch.tensor([[3.0, -4.0], [0.0, 2.0]], dtype=torch.float64)
    assert errors._relative_l2(2 * expected, expected).tolist() == [1.0, 1.0]
    assert errors._relative_l2(expected, 2 * expected).tolist() == [0.5, 0.5]
    hidden_states = torch.cat([torch.full((3, 2), 9.0), 2 * expected, torch.full((1, 2), 9.0)])
    # BOS is token 2
    found = errors._residue_errors(hidden_states, 2, torch.tensor([0, 1]), expected)
    assert found.tolist() == [1.0, 1.0, 4.0]
    # the second residue at a right angle: the lowest cosine, and the largest difference of either sign
    hidden_states[4] = torch.tensor([6.0, 0.0])
    found = errors._residue_errors(hidden_states, 2, torch.tensor([0, 1]), expected)
    assert found.tolist() == pytest.approx([(25 + 40) ** 0.5 / 29**0.5, 0.0, 6.0])


def test_what_is_not_finite_is_left_out_of_medians_and_extremes() -> None:
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([nan, 9.0, 1.0, inf, 2.0, -inf])
    assert errors.finite_median(values) == 2.0
    assert (errors.finite_min(values), errors.finite_max(values)) == (1.0, 9.0)
    for function in (errors.finite_median, errors.finite_min, errors.finite_max):
        assert function(torch.tensor([nan, inf])) is None


def test_neighbors_are_those_of_the_reference() -> None:
    angles = torch.tensor([0.0, 1.0, 3.0, 7.0, 15.0, 31.0]).deg2rad().double()
    expected = torch.stack([angles.cos(), angles.sin()], 1)
    assert rank_agreement(3 * expected, expected) == (1.0, None, 5)  # the 5 nearest are all there are
    swapped = expected[[0, 5, 2, 3, 4, 1]]
    top1, top10, neighbors = rank_agreement(swapped, expected)
    # by hand: the nearest are 1 0 1 2 3 4 in the reference, and 5 4 5 2 3 0 in `swapped`
    assert (top1, top10, neighbors) == (2 / 6, None, 5)
    broken = expected.clone()
    broken[2] = float("nan")
    # 2 finds nothing and is not found, and was the nearest of 3
    assert rank_agreement(broken, expected)[0] == 4 / 6
    assert rank_agreement(expected[:2], expected[:2]) == (None, None, 1)


def test_ten_nearest_in_common_by_brute_force() -> None:
    random = np.random.default_rng(1)
    expected = random.normal(size=(40, 5))
    actual = expected + 0.3 * random.normal(size=expected.shape)
    nearest = []
    for rows in (actual, expected):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        others = [np.delete(np.arange(40), row) for row in range(40)]
        nearest.append(
            [sorted(other, key=lambda o: -unit[o] @ unit[row])[:10] for row, other in enumerate(others)]
        )
    top10 = np.mean([len(set(found) & set(wanted)) / 10 for found, wanted in zip(*nearest, strict=True)])
    assert 0.3 < top10 < 0.9
    assert rank_agreement(torch.from_numpy(actual), torch.from_numpy(expected))[1] == pytest.approx(top10)


def test_sampled_residues_are_spread_and_bounded() -> None:
    assert [positions.tolist() for positions in spread([3, 1], 100)] == [[0, 1, 2], [0]]
    positions = spread([1000, 10, 1], 101)
    assert [len(some) for some in positions] == [99, 1, 1]
    assert positions[0][0] == 0 and positions[0][-1] == 999
    assert positions[0].diff().min() >= 10


def test_length_classes_have_both_ends() -> None:
    classes = by_length_class([100, 1, 101, 2000, 1022, 1023])
    assert [(name, members.tolist()) for name, members in classes] == [
        ("1–100", [0, 1]),
        ("101–250", [2]),
        ("501–1022", [4]),
        ("over 1022", [3, 5]),
    ]


def test_activations_are_those_of_fair_esm(stress: Checkpoint, validation: Validation) -> None:
    esm2 = pytest.importorskip("esm.model.esm2", reason="fair-esm 2.0.0 is not installed")
    model = esm2.ESM2(CONFIG.num_layers, CONFIG.hidden_size, CONFIG.num_heads).double().eval()
    state = {name: tensor.double() for name, tensor in stress.tensors.items()}
    model.load_state_dict(state | {"lm_head.weight": state["embed_tokens.weight"]})
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def keep(name: str, layer: int) -> Callable[..., None]:
        def hook(module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen.setdefault((name, layer), []).append(output.abs().flatten())
            if name == "feed-forward output":
                seen.setdefault(("GELU", layer), []).append(inputs[0].abs().flatten())

        return hook

    for number, layer in enumerate(model.layers, 1):
        layer.fc2.register_forward_hook(keep("feed-forward output", number))
        layer.self_attn.out_proj.register_forward_hook(keep("attention output", number))
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            norm.register_forward_hook(keep("LayerNorm", number))
    model.emb_layer_norm_after.register_forward_hook(keep("LayerNorm", CONFIG.num_layers))
    with torch.no_grad():
        for ids in PROTEINS:
            model(torch.tensor([[0, *ids.tolist(), 2]]))
    assert len(seen) == 4 * CONFIG.num_layers
    for place, values in seen.items():
        values_seen = torch.cat(values)
        assert validation.activations.max_abs(*place) == pytest.approx(float(values_seen.max()), rel=1e-6)
        share = float(((values_seen > 0) & (values_seen < 2.0**-14)).double().mean())
        assert validation.activations.subnormal_share(*place) == pytest.approx(share, rel=1e-2, abs=1e-6)


def test_recording_leaves_nothing_behind(stress: Checkpoint) -> None:
    before = {name: getattr(kernels, name) for name in kernels.__all__}
    model = model_of(stress, "fp32")
    with pytest.raises(RuntimeError, match="stop"), Activations(model).recorded():
        raise RuntimeError("stop")
    assert {name: getattr(kernels, name) for name in kernels.__all__} == before
    assert not any(module._forward_hooks for module in model.modules())
    measure(model, PACKED, PROTEINS[:2], compute_reference("esm-packed", stress, CPU, PROTEINS[:2])[0], 400)
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_nobody_trained_are_named(tmp_path: Path, stress: Checkpoint) -> None:
    demo, path = load_checkpoint("demo"), tmp_path / "esm2_file.pt"
    for checkpoint, word in (
        (demo, "demo"),
        (stress, "stress"),
        (load_checkpoint("random:esm2_t6_8M_UR50D"), "random"),
    ):
        assert word in str(weights_note(checkpoint))
        save_fair_esm(checkpoint, path, torch.float32)
        assert word in str(weights_note(load_checkpoint(path)))
    name = "emb_layer_norm_after"
    trained = with_tensors(
        stress, **{f"{name}.{part}": torch.rand(CONFIG.hidden_size) for part in ("weight", "bias")}
    )
    assert weights_note(trained) is None


def test_the_estimate_follows_from_the_time_of_one_layer(
    stress: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a first call takes 10 s and a second one 1 s."""
    ticks = accumulate(cycle([0, 10, 0, 1]))
    monkeypatch.setattr(
        "esm_packed.reports.validation.run.time", SimpleNamespace(perf_counter=lambda: next(ticks))
    )
    tokens = sum(LENGTHS) + 2 * len(LENGTHS)
    # FP64: the median protein alone. Other paths: the first 4 proteins, which fit into the budget.
    one_reference = 6 * tokens / (41 + 2)
    others = 6 * tokens / (5 + 300 + 80 + 1 + 2 * 4) * 9
    assert num_passes(CONFIG, SETTINGS) == 1 + 9
    assert estimate_seconds(CONFIG, PROTEINS, SETTINGS) == pytest.approx(one_reference + others)
    with_fair_esm = replace(SETTINGS, reference="fair-esm")
    assert num_passes(CONFIG, with_fair_esm) == 2 + 9
    assert estimate_seconds(CONFIG, PROTEINS, with_fair_esm) == pytest.approx(2 * one_reference + others)


def in_mode(mode: str, backend: str, relative_l2: float = 0.0, layout: str = "packed") -> PathResult:
    return replace(path_result([relative_l2], [1.0]), mode=mode, backend=backend, layout=layout)


def line_of(paths: list[PathResult], device: torch.device) -> str:
    modes = dict.fromkeys(path.mode for path in paths)
    verdicts = [judge(mode, [p for p in paths if p.mode == mode], THRESHOLDS[mode]) for mode in modes]
    return verdict_line(verdicts, paths, device)


def test_a_verdict_holds_for_a_device_and_its_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference and the padded layout are yardsticks: a run uses neither unless it is told to."""
    on_cpu = [
        in_mode("fp32", "sdpa"),
        in_mode("fp32", "reference"),
        in_mode("fp32", "masked sdpa", layout="padded"),
        in_mode("fp16", "sdpa"),
    ]
    assert line_of(on_cpu, CPU) == "passed on CPU, SDPA; GPU kernels not validated"
    failed = [*on_cpu, in_mode("bf16", "sdpa", relative_l2=1.0)]
    assert line_of(failed, CPU) == "FAILED (bf16) on CPU, SDPA; GPU kernels not validated"

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cuda"})
    gpu = torch.device("cuda", 0)
    on_gpu = [in_mode("fp32", "triton"), in_mode("fp16", "varlen"), in_mode("fp16", "triton")]
    assert line_of(on_gpu, gpu) == "passed on NVIDIA X, triton, varlen"
    fp64 = [in_mode("fp64", "sdpa")]
    assert line_of(fp64, gpu) == "passed on NVIDIA X, SDPA; GPU kernels not validated"
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", set())
    assert line_of(on_gpu, gpu) == "passed on NVIDIA X, triton, varlen; GPU kernels not validated"


# The page


def test_the_page_needs_no_other_file(report: Path, validation: Validation) -> None:
    text = (report / "validation.html").read_text()
    assert text.count("<img ") == text.count('src="data:image/svg+xml;base64,') == 6
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "does not separate right from wrong models" in text.replace("\n", " ")
    assert "These are stress weights" in text and "a&lt;b&gt;.fasta" in text
    for name in ("errors", "layers", "layers-2", "lengths", "activations", "activations-2"):
        assert (report / f"{name}.png").stat().st_size > 10_000
    verdict = "passed on CPU, SDPA; GPU kernels not validated"
    assert re.search(r"</h1>\s*<p[^>]*>" + verdict, text)
    data = json.loads((report / "validation.json").read_text(), parse_constant=pytest.fail)
    assert next(iter(data.items())) == ("verdict", verdict)
    assert data["proteins"] == {"sequence_ids": IDS, "lengths": LENGTHS}
    assert data["model"]["note"].startswith("These are stress weights")
    assert len(data["paths"]) == 9
    for path, measured in zip(data["paths"], validation.paths, strict=True):
        assert path["means"]["relative_l2"] == pytest.approx(measured.means.relative_l2.tolist(), rel=1e-9)
        assert len(path["residues"]["cosine"]) == len(IDS)
        assert [len(row) for row in path["mean_relative_l2_by_layer"]] == [len(IDS)] * 7


def test_every_mode_has_a_badge_in_the_first_table(report: Path) -> None:
    text = (report / "validation.html").read_text()
    table = text.partition("<h2>Verdict</h2>")[2].partition("</table>")[0]
    badges = re.findall(r">(\w+)</td><td[^>]*><span class=\"badge badge-([\w-]+)\">", table)
    assert badges == [("fp32", "passed"), ("fp16", "passed"), ("bf16", "passed"), ("tf32", "not-run")]
    assert "needs a CUDA device" in table
    headings = re.findall(r"<h2>(.+)</h2>", text)
    assert headings[:2] == ["Verdict", "How the default thresholds were derived"]
    assert headings[-1] == "Conditions"


def test_thresholds_are_derived_from_the_published_errors() -> None:
    path = Path(__file__).parents[2] / "reports" / "published" / "cpu-amd-epyc-2-cores" / "mistakes.json"
    published = json.loads(path.read_text())

    def rounded(errors: dict[str, dict[str, float]]) -> dict[str, float]:
        return {name: float(f"{each['worst_relative_l2']:.2e}") for name, each in errors.items()}

    assert rounded(published["correct_model"]) == ERRORS_OF_THE_CORRECT_MODEL
    mistakes = rounded(published["mistakes_in_fp32"])
    assert sorted(mistakes.values()) == sorted(ERRORS_OF_MISTAKES.values())
    assert all(error <= THRESHOLDS[mode].relative_l2 for mode, error in ERRORS_OF_THE_CORRECT_MODEL.items())
    assert min(ERRORS_OF_MISTAKES.values()) > THRESHOLDS["fp32"].relative_l2


@pytest.fixture
def drawn_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn once and not saved, which takes longer; for tests that are not about the files."""

    def draw(figure: Any, directory: Path, name: str) -> str:
        figure.set_dpi(20)
        figure.canvas.draw()
        return ""

    monkeypatch.setattr("esm_packed.reports.page._save_figure", draw)


@pytest.mark.usefixtures("drawn_only")
def test_what_is_not_finite_is_null_and_shown(tmp_path: Path) -> None:
    checkpoint = stress_checkpoint(ESM2Config(2, 96, 4), peak=2e5)
    validation = validate(lambda: checkpoint, IDS[1:5], PROTEINS[1:5], replace(SETTINGS, modes=("fp16",)))
    data = as_json(validation, CONDITIONS)
    assert data["paths"][0]["means"]["relative_l2"] == [None] * 4
    assert data["paths"][0]["first_nonfinite_layer"] == [1] * 4
    assert data["verdicts"][0]["worst_relative_l2"] is None and data["passed"] is False
    page, *_ = write_report(validation, CONDITIONS, tmp_path)
    assert "overflows" in page.read_text() and "recomputes them in FP32" in page.read_text()


@pytest.mark.usefixtures("drawn_only")
def test_a_single_protein_has_no_ranks(tmp_path: Path, stress: Checkpoint) -> None:
    validation = validate(lambda: stress, IDS[:1], PROTEINS[:1], replace(SETTINGS, modes=("fp32",)))
    assert validation.paths[0].top1 is None
    write_report(validation, CONDITIONS, tmp_path)


def test_csv_and_markdown_say_what_the_page_says(report: Path, validation: Validation) -> None:
    with (report / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(sequence_id, path.mode, path.path) for sequence_id in IDS for path in validation.paths]
    assert [(row["sequence_id"], row["mode"], row["path"]) for row in rows] == expected
    first = [row for row in rows if row["sequence_id"] == IDS[0]]
    for row, path in zip(first, validation.paths, strict=True):
        assert float(row["mean_relative_l2"]) == pytest.approx(float(path.means.relative_l2[0]), rel=1e-9)
        assert float(row["residues_cosine"]) == pytest.approx(float(path.residues.cosine[0]), rel=1e-9)
    markdown = (report / "validation.md").read_text()
    assert markdown.index(validation.verdict) < markdown.index("## Verdict")
    assert "![" in markdown and "](errors.png)" in markdown and "| mode | verdict |" in markdown
