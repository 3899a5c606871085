"""What a worker asks of its machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from esm_packed import ESM2
from esm_packed.errors import UsageError
from esm_packed.runners.cli import main as cli
from esm_packed.runners.compute.worker import set_threads

FASTA = Path(__file__).parents[2] / "examples" / "proteins.fasta"


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("command", ["embed", "validate"])
def test_threads_that_no_machine_could_start(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch ends such a process with a segmentation fault."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: pytest.fail(f"{threads} threads"))
    output = ["-o", str(tmp_path / "out.h5"), "--threads", "100000"]
    arguments = [str(FASTA), "--model", "demo"] if command == "embed" else ["demo", str(FASTA)]
    assert cli.main([command, *arguments, "--device", "cpu", *output]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--threads 100000: this machine has" in line and "choose at most" in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_model_that_does_not_fit(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_checkpoint(*call: object) -> None:
        raise error

    monkeypatch.setattr(ESM2, "from_checkpoint", from_checkpoint)
    arguments = [str(FASTA), "-o", str(tmp_path / "out.h5"), "--model", "demo", "--device", "cpu"]
    assert cli.main(["embed", *arguments]) == 2
    assert "error: demo in fp32 does not fit into the memory of cpu\n" in capsys.readouterr().err


def test_threads_beyond_the_cpus_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for cpus, most in ((1, 64), (2, 64), (16, 64), (100, 400)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cpus=cpus: set(range(cpus)))
        set_threads(None)
        set_threads(most)
        with pytest.raises(UsageError, match=f"--threads {most + 1}: .* {cpus} CPUs; choose at most {most}"):
            set_threads(most + 1)
    assert asked == [64, 64, 64, 400]
