"""The README's first command on a fresh clone in a new virtual environment; `.ci/run` is the second one."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import h5py
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("make"), reason="needs git and make")
def test_make_embed_on_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")
    }

    def make_embed(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", "embed", *arguments], cwd=clone, env=environment, capture_output=True, text=True
        )

    first = make_embed()
    assert first.returncode == 0, first.stdout + first.stderr
    with h5py.File(clone / "embeddings.h5") as file:
        assert file["embeddings"].shape == (35, 96)
        assert file.attrs["model_name"] == "demo"
    assert "residues/s" in first.stdout
    assert "MODEL=esm2_t33_650M_UR50D" in first.stdout

    start = time.monotonic()
    assert make_embed().returncode == 0
    assert time.monotonic() - start < 60

    (clone / "mine.fasta").write_text(">a\nMKT\n>b\nACD\n")
    mine = make_embed("FASTA=mine.fasta", "OUT=mine.h5", "MODEL=random:esm2_t6_8M_UR50D")
    assert mine.returncode == 0, mine.stdout + mine.stderr
    with h5py.File(clone / "mine.h5") as file:
        assert file["embeddings"].shape == (2, 320)
