"""A model and a FASTA file to a report, its verdict, and clear words for what cannot be."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proteins import random_proteins, write_fasta

from esm_packed import ESM2
from esm_packed.checkpoints import save_fair_esm
from esm_packed.config import ESM2Config
from esm_packed.errors import UsageError
from esm_packed.reports.page import ReportError
from esm_packed.reports.validation.thresholds import Threshold
from esm_packed.runners.cli import main as cli
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import InputError, ReadOptions
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_RECOMPUTED
from esm_packed.runners.system.terminal import EXIT_COMPLETE
from esm_packed.runners.validate import ValidateRequest, choose, validate_file
from esm_packed.runners.watch.console import Console
from esm_packed.stress import stress_checkpoint

LENGTHS = [30, 12, 75, 12, 200, 5, 41]
QUIET = Console(quiet=True)


@pytest.fixture
def request_for(tmp_path: Path) -> ValidateRequest:
    write_fasta(tmp_path / "in.fasta", random_proteins(LENGTHS))
    return ValidateRequest("demo", str(tmp_path / "in.fasta"), tmp_path / "report", device="cpu")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To save them takes longer than to compute; for tests that are not about the page."""
    monkeypatch.setattr("esm_packed.reports.page._save_figure", lambda figure, directory, name: "")


def test_the_demo_passes_and_is_called_the_demo(
    request_for: ValidateRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request = replace(request_for, max_length=100, command="esm-packed validate demo in.fasta")
    lines, passed = validate_file(request, Console())
    assert passed
    terminal = capsys.readouterr().err
    assert "7 proteins, 275 residues, 10 times: about" in terminal
    text = "\n".join(lines)
    for mode in ("fp32", "fp16", "bf16"):
        assert f"{mode}  passed" in text
    assert "tf32  not run" in text and "needs a CUDA device" in text
    assert "the weights of the demo" in text
    assert lines[-1] == "passed on CPU, SDPA; GPU kernels not validated"
    data = json.loads((request.output / "validation.json").read_text())
    assert data["proteins"]["sequence_ids"] == [f"protein{number}" for number in range(7)]
    assert data["proteins"]["lengths"] == [30, 12, 75, 12, 100, 5, 41]
    assert data["conditions"]["truncated"] == "1 to their first 100 residues"
    page = (request.output / "validation.html").read_text()
    assert "the weights of the demo" in page and request.command in page
    assert {path.suffix for path in request.output.iterdir()} == {
        ".html",
        ".md",
        ".json",
        ".csv",
        ".png",
        ".svg",
    }


@pytest.mark.usefixtures("without_figures")
def test_a_stricter_threshold_fails(request_for: ValidateRequest) -> None:
    request = replace(request_for, dtypes=("bf16",), thresholds={"bf16": Threshold(1e-4)}, limit=3)
    lines, passed = validate_file(request, QUIET)
    assert not passed
    assert any(line.startswith("bf16  FAILED") for line in lines)
    assert lines[-1] == "FAILED (bf16) on CPU, SDPA; GPU kernels not validated"
    data = json.loads((request.output / "validation.json").read_text())
    assert data["passed"] is False and data["verdicts"][0]["threshold"]["relative_l2"] == 1e-4


@pytest.mark.usefixtures("without_figures")
def test_fair_esm_as_the_reference(request_for: ValidateRequest) -> None:
    pytest.importorskip("esm.model.esm2", reason="fair-esm 2.0.0 is not installed")
    lines, passed = validate_file(replace(request_for, reference="fair-esm", dtypes=("fp64", "fp32")), QUIET)
    assert passed and "against fair-esm in fp64" in lines[0]
    data = json.loads((request_for.output / "validation.json").read_text())
    worst = {verdict["mode"]: verdict["worst_relative_l2"] for verdict in data["verdicts"]}
    assert worst["fp64"] < 1e-12 and worst["fp32"] < 2e-6


@pytest.mark.usefixtures("without_figures")
def test_a_report_is_replaced_only_when_asked(request_for: ValidateRequest) -> None:
    request = replace(request_for, dtypes=("fp32",), limit=2)
    validate_file(request, QUIET)
    with pytest.raises(UsageError, match="already contains a report; use --overwrite"):
        validate_file(request, QUIET)
    validate_file(replace(request, overwrite=True, limit=1), QUIET)
    assert len(json.loads((request.output / "validation.json").read_text())["proteins"]["lengths"]) == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"device": "cuda:99"}, UsageError, "cuda:99"),
        ({"dtypes": ("fp8",)}, UsageError, r"--dtype 'fp8' is not one of fp64, fp32"),
        ({"thresholds": {"int8": Threshold(1.0)}}, UsageError, "--threshold 'int8'"),
        ({"reference": "esmc"}, UsageError, "--reference 'esmc' is not one of esm-packed, fair-esm"),
        ({"dtypes": ("tf32",)}, ReportError, "no mode can run: tf32: .*needs a CUDA device"),
        ({"fasta": "missing.fasta"}, InputError, "missing.fasta: no such file"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    request_for: ValidateRequest, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        validate_file(replace(request_for, **change), QUIET)
    assert not request_for.output.exists()


def test_a_file_is_no_folder(request_for: ValidateRequest) -> None:
    request_for.output.write_text("mine")
    with pytest.raises(UsageError, match="not a directory; choose a directory"):
        validate_file(request_for, QUIET)
    assert request_for.output.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    request_for: ValidateRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm_packed.runners.validate.validate", None)
    with pytest.raises(UsageError, match="/proc/report: the report cannot be written there"):
        validate_file(replace(request_for, output=Path("/proc/report"), limit=1), QUIET)


def test_without_matplotlib(request_for: ValidateRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install 'matplotlib>=3\.8'"):
        validate_file(request_for, QUIET)


def test_the_sample_is_distinct_and_spread_over_the_lengths(tmp_path: Path) -> None:
    sequences = list(random_proteins(range(10, 110)))
    write_fasta(tmp_path / "in.fasta", sequences)
    with (tmp_path / "in.fasta").open("a") as file:
        file.write(f">again\n{sequences[40]}\n")
    index = build_index([str(tmp_path / "in.fasta")], tmp_path / "index", ReadOptions())
    chosen, rule = choose(index, 10)
    assert rule == "10 of 100 distinct sequences, evenly spaced by length"
    lengths = index.lengths[:]
    assert [int(lengths[record]) for record in chosen] == [10, 21, 32, 43, 54, 65, 76, 87, 98, 109]
    assert choose(index, 0) == (list(range(100)), "all 100 distinct sequences")
    assert len(choose(index, 99)[0]) == 99


@pytest.mark.usefixtures("without_figures")
def test_what_overflows_in_fp16_is_found_and_embedded_in_fp32(tmp_path: Path) -> None:
    """The report counts it, and the rows `embed` makes of it are those of the FP32 model."""
    lengths = [8, 250, 8, 9, 200, 10, 250, 7]
    sequences = list(random_proteins(lengths))
    write_fasta(tmp_path / "in.fasta", sequences)
    path = tmp_path / "esm2_stress.pt"
    save_fair_esm(stress_checkpoint(ESM2Config(4, 96, 4), peak=70_000), path)

    request = ValidateRequest(str(path), str(tmp_path / "in.fasta"), tmp_path / "report", device="cpu")
    # 1.0 alone lets every finite embedding of these pass
    lax = {"fp16": Threshold(1.0)}
    lines, passed = validate_file(replace(request, dtypes=("fp32", "fp16"), thresholds=lax), QUIET)
    assert not passed
    assert any("stress weights" in line for line in lines)
    data = json.loads((request.output / "validation.json").read_text())
    assert [verdict["passed"] for verdict in data["verdicts"]] == [True, False]
    of_fp16 = next(path for path in data["paths"] if path["mode"] == "fp16")
    overflows = np.array([error is None for error in of_fp16["means"]["relative_l2"]])
    assert data["verdicts"][1]["num_failed"] == data["verdicts"][1]["num_nonfinite"] == overflows.sum()
    assert 0 < overflows.sum() < len(lengths)

    output = tmp_path / "out.h5"
    options = ["--model", str(path), "--device", "cpu", "--dtype", "fp16", "--quiet"]
    assert cli.main(["embed", str(tmp_path / "in.fasta"), "-o", str(output), *options]) == EXIT_COMPLETE
    with EmbeddingReader(output) as reader:
        rows, status = reader.embeddings(), reader.column("status")
    assert status.tolist() == np.where(overflows, STATUS_RECOMPUTED, STATUS_COMPUTED).tolist()
    fp32 = np.stack(ESM2.from_pretrained(path, dtype="fp32", device="cpu").embed(sequences))
    errors = np.linalg.norm(rows - fp32, axis=1) / np.linalg.norm(fp32, axis=1)
    assert (errors[overflows] <= 1e-5).all()
    assert (errors[~overflows] > 1e-5).all(), "these are FP16's own"


@pytest.mark.usefixtures("without_figures")
def test_torch_runs_on_one_thread_where_asked(request_for: ValidateRequest) -> None:
    before = torch.get_num_threads()
    try:
        validate_file(replace(request_for, threads=1, limit=1, dtypes=("fp32",)), QUIET)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
