"""The index of FASTA files: MB/s compared with plain SHA-256 of the same file, and memory.

Small by default; ESM_PACKED_BENCH_MB=1000 creates files of 1 GB:

    ESM_PACKED_BENCH_MB=1000 pytest benchmarks/bench_index.py --benchmark-json out.json
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from measuring import record

from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.input.index import open_index

MEGABYTES = int(os.environ.get("ESM_PACKED_BENCH_MB", "20"))
ROUNDS = 3
COLUMNS = 60
KINDS = ("uniref", "short50", "identical50", "uniref_gzip")
RESIDUES = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", dtype=np.uint8)
HEADER = b">UniRef50_A%09d Uncharacterized protein n=1 Tax=Escherichia coli TaxID=562 RepID=A%07d_ECOLI\n"
OPTIONS = ReadOptions()


def write_fasta(path: Path, kind: str) -> int:
    """Write about `MEGABYTES` of seeded random proteins; return the number of records."""
    rng = np.random.default_rng(0)
    number = num_bytes = 0
    with gzip.open(path, "wb", compresslevel=1) if kind.endswith("gzip") else path.open("wb") as file:
        while num_bytes < MEGABYTES * 1_000_000:
            if kind.startswith("uniref"):  # mean about 330, as long-tailed as UniRef50
                lengths = rng.lognormal(5.55, 0.7, size=4096).clip(20, 20_000).astype(int).tolist()
            else:
                lengths = [50] * 16_384
            residues = RESIDUES[rng.integers(0, len(RESIDUES), size=sum(lengths), dtype=np.uint8)].tobytes()
            records = []
            begin = 0
            for length in lengths:
                records.append(b">s%d\n" % number if "50" in kind else HEADER % (number, number))
                if kind == "identical50":
                    begin = 0
                for start in range(begin, begin + length, COLUMNS):
                    records.append(residues[start : min(start + COLUMNS, begin + length)] + b"\n")
                begin += length
                number += 1
            text = b"".join(records)
            num_bytes += len(text)
            file.write(text)
    return number


@pytest.fixture(scope="module", params=KINDS)
def fasta(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, int]:
    path = tmp_path_factory.mktemp(request.param) / "proteins.fasta"
    return request.param, path, write_fasta(path, request.param)


def note(benchmark: Any, path: Path, num_records: int) -> None:
    record(benchmark, suite="index", block=0, sequences=num_records, bytes=path.stat().st_size)


def anonymous_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


class PeakMemory:
    """Peak resident anonymous memory within the block, beyond that at its start."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def test_index_sha256(benchmark: Any, fasta: tuple[str, Path, int]) -> None:
    """The floor: every pass must hash the file."""
    _, path, num_records = fasta

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    benchmark.pedantic(digest, rounds=ROUNDS, warmup_rounds=1)
    note(benchmark, path, num_records)


def test_index_build(benchmark: Any, fasta: tuple[str, Path, int], tmp_path: Path) -> None:
    kind, path, num_records = fasta
    processor_seconds = []

    def build() -> int:
        begin = time.process_time()
        made = build_index([str(path)], tmp_path, OPTIONS)
        processor_seconds.append(time.process_time() - begin)
        assert made.num_records == num_records
        return made.num_identical

    num_identical = benchmark.pedantic(build, rounds=ROUNDS, warmup_rounds=1)
    assert num_identical == (num_records - (num_records + 16_383) // 16_384 if "identical" in kind else 0)
    note(benchmark, path, num_records)
    benchmark.extra_info["processor_seconds"] = round(median(processor_seconds), 3)
    if Path("/proc/self/status").exists():
        with PeakMemory() as memory:
            build()
        benchmark.extra_info["peak_anonymous_mib"] = round((memory.peak - memory.before) / 2**20, 1)


def test_index_open(benchmark: Any, fasta: tuple[str, Path, int], tmp_path: Path) -> None:
    _, path, num_records = fasta
    build_index([str(path)], tmp_path, OPTIONS)
    made = benchmark.pedantic(open_index, ([str(path)], tmp_path, OPTIONS), rounds=ROUNDS, warmup_rounds=1)
    assert made is not None
    assert made.num_records == num_records
    note(benchmark, path, num_records)
