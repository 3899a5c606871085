"""The memory of a whole run does not grow with the number of records, nor with the size of a shard."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import peak_memory
import pytest
from programs import run_python
from proteins import random_proteins, write_fasta

MIB = 2**20
POLL_SECONDS = 0.02


def peak_anonymous_bytes(process: subprocess.Popen[str]) -> int:
    """Wait for `process`; the most anonymous memory that was resident in it at any look."""
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        # a process that has ended and is not waited for yet has no such line
        if found := re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.MULTILINE):
            peak = max(peak, 1024 * int(found[1]))
        time.sleep(POLL_SECONDS)
    return peak


def embed(folder: Path, number: int) -> int:
    """Embed `number` records with the command line; its peak of anonymous memory in bytes."""
    fasta, output = folder / f"{number}.fasta", folder / f"{number}.h5"
    write_fasta(fasta, random_proteins([10] * number))
    command = [sys.executable, "-m", "esm_packed", "embed", str(fasta), "-o", str(output)]
    options = ["--model", "demo", "--device", "cpu", "--threads", "1", "--quiet"]
    begin = time.monotonic()
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, text=True, cwd=folder)
        try:
            peak = peak_anonymous_bytes(process)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        assert process.returncode == 0, log.read()
    print(f"{number:,} records: {peak / MIB:.1f} MiB, {time.monotonic() - begin:.0f} s")
    with h5py.File(output) as file:
        assert len(file["status"]) == number
        assert not file["status"][:].any()
        for rows in (file["embeddings"][:1000], file["embeddings"][-1000:]):
            assert np.isfinite(rows).all()
            assert rows.any(axis=1).all()
    output.unlink()
    return peak


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_flat(tmp_path: Path) -> None:
    smaller = embed(tmp_path, 200_000)
    larger = embed(tmp_path, 2_000_000)
    assert larger <= smaller + 64 * MIB
    assert larger <= 768 * MIB


@pytest.mark.parametrize(
    "numbers, options",
    [
        pytest.param((2000, 32_000), (), marks=pytest.mark.slow),  # 3 s each
        ((400, 4000), ("--kind", "per_residue")),
        pytest.param((400, 4000), ("--kind", "per_residue", "--parts"), marks=pytest.mark.slow),
    ],
    ids=["mean", "per_residue", "per_residue in parts"],
)
def test_memory_does_not_grow_with_the_size_of_a_shard(
    tmp_path: Path, numbers: tuple[int, int], options: tuple[str, ...]
) -> None:
    """Nor with the number of proteins; while rows are computed and written, and while they are merged."""
    program = Path(peak_memory.__file__)
    done = run_python(program, tmp_path, *map(str, numbers), "--one-shard", *options)
    assert done.returncode == 0, done.stderr
    small, large = (1024 * int(line) for line in done.stdout.split())
    assert len(list((tmp_path / f"{numbers[1]}.h5.run" / "shards").iterdir())) == 1
    largest = max(path.stat().st_size for path in tmp_path.rglob("*"))
    assert largest > 70 * MIB
    assert large < small + 0.5 * largest
