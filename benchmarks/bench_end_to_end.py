"""FASTA to HDF5, like `esm-packed embed`, with the model read from a file: wall time and its stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from contenders.contest import (
    MAX_RELATIVE_ERRORS,
    checked_indices,
    compute_truth,
    nonfinite_indices,
    worst_relative_error,
)
from measuring import DEVICE, ON_GPU, flops_of, peak_memory, record
from workloads import proteins, write_fasta

from esm_packed.checkpoints import load_checkpoint, save_fair_esm
from esm_packed.packing import SPECIAL_TOKENS
from esm_packed.runners.session import EmbedRequest, Summary, embed_files
from esm_packed.runners.watch.console import Console

TOTAL_TOKENS = 4_000_000 if ON_GPU else 4096
WORKLOADS = ("uniref", "short50")
DTYPES = ("fp32", "fp16") if ON_GPU else ("fp32",)
STAGES = ("reading", "copying", "computing", "writing", "wall")


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    return {
        "model": config.getoption("--model"),
        "workload": config.getoption("--workload") or list(WORKLOADS),
        "dtype": config.getoption("--dtype") or list(DTYPES),
    }


class Files:
    """Checkpoints and FASTA files, created once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.checked: dict[tuple[str, str, str], dict[str, Any]] = {}

    def model(self, name: str) -> Path:
        path = self._directory / f"esm2_{name.rpartition(':')[2].replace('/', '_')}.pt"
        if not path.exists():
            save_fair_esm(load_checkpoint(name), path)
        return path

    def fasta(self, workload: str, total_tokens: int) -> Path:
        path = self._directory / f"{workload}-{total_tokens}.fasta"
        if not path.exists():
            write_fasta(path, proteins(workload, total_tokens))
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    yield Files(tmp_path_factory.mktemp("end_to_end"))


def checked_output(output: Path, model: Path, sequences: Sequence[str], dtype: str) -> dict[str, Any]:
    """Errors of a few rows relative to FP64, and the attention backend named in the file.

    Raises:
        AssertionError: the errors are too large for the precision mode, or a row is not finite.
    """
    indices = checked_indices(sequences)
    truth = compute_truth(load_checkpoint(model), [sequences[index] for index in indices], True).embeddings
    with h5py.File(output) as file:
        rows = torch.from_numpy(file["embeddings"][:])
        backend = file.attrs["attention_backend"]
    bad = nonfinite_indices(rows)
    assert not bad, f"{len(bad)} rows are not finite, such as {bad[:3]}"
    relative_error, allowed = worst_relative_error(rows[indices], truth), MAX_RELATIVE_ERRORS[dtype]
    assert relative_error <= allowed, f"relative_error to FP64 is {relative_error:.1e}, above {allowed}"
    return {
        "relative_error": relative_error,
        "max_error": float((rows[indices] - truth).abs().max()),
        "backend": backend,
    }


def test_end_to_end(
    block: int,
    model: str,
    workload: str,
    dtype: str,
    files: Files,
    tmp_path: Path,
    benchmark: Any,
    pytestconfig: pytest.Config,
) -> None:
    benchmark.group = f"end_to_end {workload}"
    total_tokens = pytestconfig.getoption("--tokens") or TOTAL_TOKENS
    sequences = proteins(workload, total_tokens)
    checkpoint = files.model(model)
    request = EmbedRequest(
        inputs=(str(files.fasta(workload, total_tokens)),),
        output=tmp_path / "out.h5",
        model=str(checkpoint),
        device=str(DEVICE),
        dtype=dtype,
        threads=torch.get_num_threads(),
    )
    console = Console(quiet=True)
    key = (model, workload, dtype)
    if key not in files.checked:  # the first run also compiles the kernels
        peak = peak_memory(lambda: embed_files(request, console), 0)
        if not ON_GPU:
            embed_files(request, console)
        found = checked_output(request.output, checkpoint, sequences, dtype)
        files.checked[key] = found | {"peak_memory_bytes": peak}
        request.output.unlink()
    summary: Summary = benchmark.pedantic(embed_files, (request, console), rounds=1)
    residues = [len(sequence) for sequence in sequences]
    assert summary.stages.residues == sum(residues)
    record(
        benchmark,
        suite="end_to_end",
        block=block,
        provider="esm_packed",
        model=model,
        workload=workload,
        dtype=dtype,
        layout="packed",
        sequences=len(sequences),
        useful_tokens=sum(residues) + SPECIAL_TOKENS * len(residues),
        padded_tokens=sum(residues) + SPECIAL_TOKENS * len(residues),
        flops=flops_of(load_checkpoint(checkpoint).config, residues),
        stages={stage: getattr(summary.stages, stage) for stage in STAGES},
        **files.checked[key],
    )
