"""`pytest benchmarks --benchmark-json` as its users run it, small: what the file says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import measuring
import pytest
from measuring import FIELDS, datasheet_rate

from esm_packed.config import ESM2_MODELS, ESM2Config

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

ROOT = Path(__file__).parents[2]
SMALL = ["--blocks", "2", "--tokens", "150", "--threads", "1", "--workload", "short50", "--dtype", "fp32"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--benchmark-quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_record_has_every_field(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = run("benchmarks/bench_model.py", *SMALL, "--benchmark-json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    records = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    own = [record for record in records if record["suite"] == "model"]
    assert [record["block"] for record in own] == [0, 0, 0, 1, 1, 1]  # variants take turns
    assert [record["layout"] for record in own] == ["packed", "padded", "padded_unsorted"] * 2
    for record in own:
        padding = record["padded_tokens"] - record["useful_tokens"]
        least = record["flops"] + 24 * 6 * 320**2 * padding  # and attention to the padding
        assert record["computed_flops"] >= least and (padding == 0) == (record["layout"] == "packed")
        assert padding or record["computed_flops"] == record["flops"]
        assert record.keys() >= set(FIELDS)
        assert record["useful_tokens"] == 150
        assert record["tokens_per_second"] == pytest.approx(150 / record["seconds"])
        assert record["flops"] > 24 * ESM2_MODELS["esm2_t6_8M_UR50D"].hidden_size ** 2 * 150 * 6
        assert 0 < record["relative_error"] <= 1e-5
        assert record["share_of_floor"] == pytest.approx(record["floor_seconds"] / record["seconds"])
    machine = content["machine_info"]
    assert machine["command"].startswith("pytest --benchmark-quiet benchmarks/bench_model.py --blocks 2")
    assert {"gpu", "gpu_state", "cuda", "packages", "tf32", "git_commit", "threads"} <= machine.keys()
    if machine["gpu"] is None:
        assert {record["peak_memory_bytes"] for record in own} == {None}
        assert {record["mfu_datasheet"] for record in own} == {None}
        assert [entry["reason"] for entry in content["not_run"]] == [
            "needs a CUDA device: on a CPU there is nothing to copy"
        ]


def test_the_runners_overhead_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = run(
        "benchmarks/bench_runner.py",
        "-k",
        "overhead and demo",
        "--blocks",
        "1",
        "--benchmark-json",
        str(path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    assert 0 < benchmark["extra_info"]["ratio"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "tiny"], "'tiny' is none of uniref, viral"),
        (["--dtype", "fp8"], "'fp8' is none of fp32"),
    ],
)
def test_an_unknown_name_is_refused(arguments: list[str], message: str) -> None:
    done = run("benchmarks/bench_packing.py", *arguments)
    assert done.returncode == 4
    assert message in done.stderr


def test_datasheet_rates_are_those_of_the_gpu_or_unknown() -> None:
    assert datasheet_rate("NVIDIA H100 80GB HBM3", "fp16") == 989e12
    assert datasheet_rate("NVIDIA L40S", "fp32") == 91.6e12
    assert datasheet_rate("NVIDIA L4", "fp32") == 30.3e12
    assert datasheet_rate("Some GPU", "fp16") is None
    assert datasheet_rate(None, "fp16") is None


def test_the_floor_counts_operations_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"fp16": 1e12, "copy": 1e9}
    monkeypatch.setattr(measuring, "measured_rate", rates.__getitem__)
    config = ESM2Config(num_layers=2, hidden_size=8, num_heads=2)
    moved, seconds = measuring.forward_floor(config, [8, 18], "fp16", token_budget=20)
    one_sum = 4 * 30 * 8 * 2  # two tensors read, two written
    assert moved == 2 * 2 * one_sum + 2 * (2 * 12 * 8 * 8 * 2)  # and the weights of both packs
    matmuls = 2 * (2 * 30 * 12 * 8 * 8)
    attention = 2 * (4 * 8 * (10**2 + 20**2))
    assert seconds == pytest.approx((matmuls + attention) / 1e12 + moved / 1e9)
