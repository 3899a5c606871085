"""`pytest benchmarks --benchmark-json` as its users run it, small: what the file says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from measuring import FIELDS

from esm_packed.config import ESM2_MODELS

pytestmark = pytest.mark.slow  # 15 s

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

ROOT = Path(__file__).parents[2]
SMALL = ["--blocks", "2", "--tokens", "150", "--threads", "1", "--workload", "short50", "--dtype", "fp32"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    not_inherited = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in not_inherited}
    command = [sys.executable, "-m", "pytest", "--benchmark-quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file that one call writes for two suites."""
    path = tmp_path_factory.mktemp("records") / "out.json"
    suites = ["benchmarks/bench_model.py", "benchmarks/bench_runner.py"]
    chosen = ["-k", "bench_model or overhead and demo"]
    done = run(*suites, *SMALL, *chosen, "--benchmark-json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_every_record_has_every_field(content: dict[str, Any]) -> None:
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
    assert machine["command"].startswith("pytest --benchmark-quiet benchmarks/bench_model.py benchmarks/")
    assert {"gpu", "gpu_state", "cuda", "packages", "tf32", "git_commit", "threads"} <= machine.keys()
    if machine["gpu"] is None:
        assert {record["peak_memory_bytes"] for record in own} == {None}
        assert {record["mfu_datasheet"] for record in own} == {None}
        assert [entry["reason"] for entry in content["not_run"]] == [
            "needs a CUDA device: on a CPU there is nothing to copy"
        ]


def test_the_runners_overhead_is_measured(content: dict[str, Any]) -> None:
    records = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    own = [record for record in records if record["suite"] == "runner"]
    assert [record["block"] for record in own] == [0, 1]
    for record in own:
        assert record["parts"].keys() == {"indexing", "planning", "pipeline", "merging"}
        assert record["seconds"] == pytest.approx(sum(record["parts"].values()))
        assert record["ratio"] == pytest.approx(record["seconds"] / record["forward_seconds"])
        # The times above are longer on a busy machine. This is about 0.04.
        assert 0 < record["processor_ratio"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "tiny"], "'tiny' is invalid; choose from uniref, viral"),
        pytest.param(["--dtype", "fp8"], "'fp8' is invalid; choose from fp32", marks=pytest.mark.slow),  # 3 s
    ],
)
def test_an_unknown_name_is_refused(arguments: list[str], message: str) -> None:
    done = run("benchmarks/bench_packing.py", *arguments)
    assert done.returncode == 4
    assert message in done.stderr
