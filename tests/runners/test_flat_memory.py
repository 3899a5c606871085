"""The memory of a whole run does not grow with the number of records, nor with the size of a shard."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

MIB = 2**20
POLL_SECONDS = 0.02
RESIDUES = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)


def write_fasta(path: Path, number: int) -> None:
    """`number` records of ten random residues each, so that hardly any two are the same."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, number, 100_000):
            stop = min(start + 100_000, number)
            residues = RESIDUES[rng.integers(len(RESIDUES), size=(stop - start, 10))].tobytes()
            file.write(
                b"".join(
                    b">r%d\n%s\n" % (start + row, residues[10 * row : 10 * row + 10])
                    for row in range(stop - start)
                )
            )


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
    write_fasta(fasta, number)
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


ONE_SHARD = """
import resource, sys
import torch
from esm_packed.model import ESM2
from esm_packed.runners.cli import main as cli
from esm_packed.runners.state.cut import FLOPS_PER_SHARD

def embed_packed(self, batch, layers):  # computing would take longer than all the rest
    return {layer: torch.ones(batch.num_sequences, self.config.hidden_size) for layer in layers}

FLOPS_PER_SHARD["cpu"] = 1e30
ESM2.embed_packed = embed_packed
assert cli.main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_with_one_shard(folder: Path, number: int) -> int:
    """Peak of resident memory of a run of one shard, with six layers, in bytes."""
    fasta, output = folder / f"{number}.fasta", folder / f"{number}.h5"
    write_fasta(fasta, number)
    arguments = [
        "embed",
        fasta,
        "-o",
        output,
        "--model",
        "demo",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--keep-run",
    ]
    command = [sys.executable, "-c", ONE_SHARD, *map(str, arguments), "--quiet", "--layers", "0,1,2,3,4,5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / f"{number}.h5.run" / "shards").iterdir())) == 1
    return int(done.stdout)


def test_memory_does_not_grow_with_the_size_of_a_shard(tmp_path: Path) -> None:
    """Neither while rows are computed and written nor while they are merged."""
    small = peak_with_one_shard(tmp_path, 2_000)
    large = peak_with_one_shard(tmp_path, 32_000)
    shard_bytes = (tmp_path / "32000.h5.run" / "shards" / "00000.shard").stat().st_size
    assert shard_bytes > 70 * MIB
    assert large < small + 0.5 * shard_bytes
