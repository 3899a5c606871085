"""Whole commands on small inputs, from start to exit, compared with `import torch`.

pytest benchmarks/bench_startup.py --blocks 9 --benchmark-json startup.json
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from bench_end_to_end import checked_output
from measuring import record
from workloads import proteins, write_fasta

MODEL = "demo"
NUM_PROTEINS = 10
TARGET_SECONDS = 1.0
"""How much longer than `import torch` embedding may take."""

FASTA, OUTPUT = "proteins.fasta", "out.h5"
EMBED = ("-m", "esm_packed", "embed", FASTA, "--model", MODEL, "--device", "cpu", "-o")
COMMANDS = {
    "import_torch": ("-c", "import torch"),
    "embed": (*EMBED, OUTPUT),
    "check": ("-m", "esm_packed", "check", MODEL, "--device", "cpu"),
    "status": ("-m", "esm_packed", "status", "kept.h5"),
    "help": ("-m", "esm_packed", "--help"),
    "version": ("-m", "esm_packed", "--version"),
}
"""Arguments of the interpreter."""


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    return {"provider": config.getoption("--provider") or list(COMMANDS)}


class Folder:
    """A directory in which every command can run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sequences = proteins("uniref", 4096)[:NUM_PROTEINS]
        write_fasta(path / FASTA, self.sequences)
        self.run(*EMBED, "kept.h5", "--keep-run")
        self.seconds: defaultdict[int, dict[str, float]] = defaultdict(dict)
        self.processor_seconds = 0.0

    def run(self, *arguments: str) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], cwd=self._path, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert done.returncode == 0, done.stderr

    def check(self, provider: str) -> dict[str, Any]:
        """Run a command once, unmeasured; errors of the rows that it wrote."""
        self.run(*COMMANDS[provider])
        if provider != "embed":
            return {}
        return checked_output(self._path / OUTPUT, Path(MODEL), self.sequences, "fp32")

    def remove_output(self) -> None:
        (self._path / OUTPUT).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("startup"))


@pytest.fixture(scope="module")
def checked() -> dict[str, dict[str, Any]]:
    return {}


def test_startup(
    block: int, provider: str, folder: Folder, checked: dict[str, dict[str, Any]], benchmark: Any
) -> None:
    benchmark.group = "startup"
    if provider not in checked:
        checked[provider] = folder.check(provider)
    benchmark.pedantic(folder.run, COMMANDS[provider], setup=folder.remove_output, rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = folder.seconds[block]
    seconds[provider] = benchmark.stats.stats.median
    embeds = provider == "embed"
    record(
        benchmark,
        suite="startup",
        block=block,
        provider=provider,
        model=MODEL if embeds else None,
        dtype="fp32" if embeds else None,
        sequences=NUM_PROTEINS if embeds else None,
        processor_seconds=folder.processor_seconds,
        seconds_beyond_import=seconds[provider] - seconds["import_torch"]
        if provider in ("embed", "check") and "import_torch" in seconds
        else None,
        target=TARGET_SECONDS if embeds else None,
        **checked[provider],
    )
