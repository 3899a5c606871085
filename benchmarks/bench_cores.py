"""All cores of a CPU: packs computed one by one with all threads, or several at once with one thread each.

    pytest benchmarks/bench_cores.py --full --blocks 2 --benchmark-json cores.json

Packs lie in memory and models are loaded when the clock starts. Without `--full` it is a trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contenders.contest import compute_truth, worst_relative_error
from contenders.processes import PlainProcesses
from measuring import record
from workloads import proteins, write_fasta

from esm_packed.checkpoints import load_checkpoint, save_fair_esm
from esm_packed.config import DEFAULT_TOKEN_BUDGETS
from esm_packed.packing import SPECIAL_TOKENS
from esm_packed.runners.system.environment import num_cpus

TOKEN_BUDGET = DEFAULT_TOKEN_BUDGETS["cpu"]
MAX_RELATIVE_ERROR = 1e-5

NUM_PROTEINS = {"esm2_t6_8M_UR50D": 500, "esm2_t12_35M_UR50D": 100, "esm2_t30_150M_UR50D": 30}
TRIAL_PROTEINS = 8
"""Of the smallest model, without `--full`."""

MOST_TOKENS = 2000
"""Tokens per protein that are drawn, more than any has."""

PROVIDERS = ("threads", "processes", "packs_at_once")
"""One process with a thread for each core; a process of one thread for each core; one process that computes
as many packs at the same time, each with one thread, and holds the weights once."""


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    names = list(NUM_PROTEINS)
    return {
        "size": names if config.getoption("--full") else names[:1],
        "provider": config.getoption("--provider") or list(PROVIDERS),
    }


@dataclass(frozen=True)
class Work:
    """A model in a file, proteins, and the FP64 means of the first and the last of them."""

    model: Path
    fasta: Path
    residues: int
    sequences: int
    truth: torch.Tensor


class Works:
    """The work of each model, created once."""

    def __init__(self, folder: Path, full: bool) -> None:
        self._folder = folder
        self._full = full
        self._made: dict[str, Work] = {}

    def of(self, size: str) -> Work:
        if size not in self._made:
            count = NUM_PROTEINS[size] if self._full else TRIAL_PROTEINS
            sequences = proteins("uniref", count * MOST_TOKENS)[:count]
            folder = self._folder / size
            folder.mkdir()
            checkpoint = load_checkpoint(f"random:{size}")
            save_fair_esm(checkpoint, folder / "esm2_model.pt")
            write_fasta(folder / "proteins.fasta", sequences)
            truth = compute_truth(checkpoint, [sequences[0], sequences[-1]], True).embeddings
            self._made[size] = Work(
                folder / "esm2_model.pt", folder / "proteins.fasta", sum(map(len, sequences)), count, truth
            )
        return self._made[size]


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Works]:
    yield Works(tmp_path_factory.mktemp("cores"), bool(pytestconfig.getoption("--full")))


def test_cores(block: int, size: str, provider: str, works: Works, benchmark: Any) -> None:
    benchmark.group = f"cores {size}"
    work, cores = works.of(size), num_cpus()
    how = {
        "threads": {"threads": cores},
        "processes": {"count": cores},
        "packs_at_once": {"at_once": cores},
    }
    with ExitStack() as stack:
        processes = PlainProcesses(
            str(work.model), work.fasta, TOKEN_BUDGET, stack, are_shared=True, **how[provider]
        )
        benchmark.pedantic(processes.compute, rounds=1)
        means = torch.from_numpy(processes.means())
    assert len(means) == work.sequences
    error = worst_relative_error(means[[0, -1]], work.truth)
    assert error <= MAX_RELATIVE_ERROR, f"relative error is {error:.1e}, allowed are {MAX_RELATIVE_ERROR}"
    record(
        benchmark,
        suite="cores",
        block=block,
        provider=provider,
        model=f"random:{size}",
        workload="uniref",
        dtype="fp32",
        layout="packed",
        token_budget=TOKEN_BUDGET,
        sequences=work.sequences,
        useful_tokens=work.residues + SPECIAL_TOKENS * work.sequences,
        relative_error=error,
        cores=cores,
    )
