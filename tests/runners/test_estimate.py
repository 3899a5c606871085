"""`embed --estimate`: the plan, the size and the time of a run that is not made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from proteins import write_fasta

import esm_packed
from esm_packed.runners.cli import main as cli
from esm_packed.runners.state.cut import FLOPS_PER_SHARD


@pytest.fixture
def fasta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 3e7)
    path = tmp_path / "in.fasta"
    residues = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 4
    write_fasta(path, [*(residues[: 7 + 3 * number] for number in range(40)), residues[:7]])
    return path


def estimate(capsys: pytest.CaptureFixture[str], fasta: Path, *options: str, code: int = 0) -> dict[str, str]:
    command = ["embed", str(fasta), "-o", str(fasta.parent / "out.h5"), "--estimate", "--model", "demo"]
    assert cli.main([*command, "--device", "cpu", *options]) == code
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("include", ["mean", "mean,per_residue", "contacts"])
def test_says_what_the_run_then_does_and_writes_nothing(
    fasta: Path, capsys: pytest.CaptureFixture[str], include: str
) -> None:
    said = estimate(capsys, fasta, "--include", include)
    assert [path.name for path in fasta.parent.iterdir()] == [fasta.name]
    output = fasta.parent / "out.h5"
    esm_packed.embed_file(
        fasta, output, model="demo", device="cpu", include=include.split(","), keep_run=True, progress=False
    ).close()
    shards = len(list((fasta.parent / "out.h5.run" / "shards").iterdir()))
    assert shards > 3
    assert said["shards"] == f"{shards:,}"
    assert said["sequences"].startswith("41 (")
    assert said["computed"].startswith("40 sequences (")
    size, unit = said["output"].removeprefix("about ").split()
    in_bytes = float(size) * {"kB": 1e3, "MB": 1e6}[unit]
    assert abs(in_bytes - output.stat().st_size) <= 0.1 * output.stat().st_size + 32_000
    assert re.match(r"about \d+\.\d s, [\d,]+ residues/s; measured on \d+ packs?", said["time"])


def test_counts_windows_workers_and_what_is_reused(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = fasta.parent / "old.h5"
    esm_packed.embed_file(fasta, old, model="demo", device="cpu", progress=False).close()
    assert (
        estimate(capsys, fasta, "--reuse", str(old))["computed"]
        == f"0 sequences (0 residues); 40 taken from {old}"
    )
    said = estimate(capsys, fasta, "--windows", "50", "--overlap", "10", "--workers", "3")
    assert said["computed"].startswith("77 sequences and windows (")
    assert "with 3 workers" in said["time"]


def test_mistakes_are_said_as_by_the_run(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate(capsys, fasta, "--layers", "9", code=2)
    fasta.write_text(">a\nM1K\n")
    estimate(capsys, fasta, code=2)
    assert [path.name for path in fasta.parent.iterdir()] == [fasta.name]
