"""The runner on a GPU: streams, pinned memory and measured budgets give the rows of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_shards import Shard, mean_arrays, run_pipeline
from proteins import write_fasta
from workloads import token_lengths

from esm_packed import ESM2
from esm_packed.alphabet import encode
from esm_packed.layouts import LAYOUTS
from esm_packed.outputs import mean_of
from esm_packed.packing import PackedBatch
from esm_packed.runners.compute.budget import measured_token_budget
from esm_packed.runners.compute.pipeline import Pipeline
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.session import embed_files
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.shard import STATUS_FAILED, STATUS_RECOMPUTED, ShardInput
from esm_packed.runners.watch.console import Console

pytestmark = pytest.mark.gpu

MODEL = "random:esm2_t6_8M_UR50D"
LAST = 6


@pytest.fixture(scope="module")
def sequences() -> list[str]:
    """Random proteins of UniRef's lengths, 100,000 tokens of them."""
    rng = np.random.default_rng(5)
    lengths = [max(1, tokens - 2) for tokens in token_lengths("uniref", 100_000)]
    return ["".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), length)) for length in lengths]


@pytest.fixture(scope="module")
def truth(sequences: list[str]) -> np.ndarray:
    """Each sequence in FP64 in a pack of its own, on the GPU."""
    if not torch.cuda.is_available():  # fixtures of the module come before `cuda_device`
        pytest.skip("needs a CUDA device")
    model = ESM2.from_pretrained(MODEL, device="auto", dtype="fp64")
    return np.stack([model.embed([sequence])[0] for sequence in sequences])


def relative_errors(rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
    errors: np.ndarray = np.linalg.norm(rows - truth, axis=1) / np.linalg.norm(truth, axis=1)
    return errors


def embed_in_shards(model: ESM2, sequences: Sequence[str], **options: object) -> tuple[Pipeline, list[Shard]]:
    """Four shards through one pipeline."""
    token_ids = [encode(sequence) for sequence in sequences]
    inputs = [ShardInput(number, token_ids[number::4]) for number in range(4)]
    shards: dict[int, Shard] = {}
    arrays = mean_arrays([LAST], model.config.hidden_size)
    pipeline = Pipeline(model, arrays=arrays, token_budget=8192, **options)  # type: ignore[arg-type]
    run_pipeline(pipeline, inputs, shards.__setitem__, arrays)
    return pipeline, [shards[number] for number in range(4)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, gate", [("fp32", 1e-5), ("tf32", 5e-3), ("fp16", 5e-3), ("bf16", 3e-2)])
def test_pipeline_gives_the_rows_of_the_model(
    cuda_device: torch.device, sequences: list[str], truth: np.ndarray, dtype: str, gate: float, layout: str
) -> None:
    model = ESM2.from_pretrained(MODEL, device=cuda_device, dtype=dtype)
    pipeline, shards = embed_in_shards(model, sequences, layout=LAYOUTS[layout])
    for number, shard in enumerate(shards):
        assert relative_errors(shard.embeddings[LAST], truth[number::4]).max() <= gate
    times = pipeline.snapshot().times
    assert times.sequences == len(sequences)
    assert 0 < times.computing <= times.wall
    assert times.copying > 0


def test_packs_in_flight_do_not_mix(
    cuda_device: torch.device, sequences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, however many packs are on their way at once."""
    model = ESM2.from_pretrained(MODEL, device=cuda_device, dtype="fp16")
    rows = []
    for in_flight in (1, 2, 6):
        monkeypatch.setattr("esm_packed.runners.compute.pipeline.PACKS_IN_FLIGHT", in_flight)
        _, shards = embed_in_shards(model, sequences)
        rows.append(b"".join(shard.embeddings[LAST].tobytes() for shard in shards))
    assert rows[0] == rows[1] == rows[2]


def test_memory_that_runs_out_halves_packs(cuda_device: torch.device, sequences: list[str]) -> None:
    """With an allocator that may take little more than the weights."""
    model = ESM2.from_pretrained(MODEL, device=cuda_device, dtype="fp16")
    _, expected = embed_in_shards(model, sequences)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda_device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 40e6) / total, cuda_device)
    try:
        pipeline, shards = embed_in_shards(model, sequences)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda_device)
    assert pipeline.times.num_halved > 0
    for shard, whole in zip(shards, expected, strict=True):
        computed = shard.status != STATUS_FAILED
        assert computed.any()
        assert (
            relative_errors(shard.embeddings[LAST][computed], whole.embeddings[LAST][computed]).max() < 5e-3
        )


def test_what_overflows_is_recomputed_in_fp32(
    cuda_device: torch.device, sequences: list[str], truth: np.ndarray
) -> None:
    model = ESM2.from_pretrained(MODEL, device=cuda_device, dtype="fp16")
    original = model.embed_packed
    spoiled = len(sequences[8]) + 2

    def overflow(batch: PackedBatch, *rest: Any, **options: Any) -> dict[str, torch.Tensor]:
        rows = original(batch, *rest, **options)
        rows[mean_of(LAST)][batch.cu_seqlens.diff() == spoiled] = torch.inf
        return rows

    model.embed_packed = overflow  # type: ignore[method-assign]
    fp32 = ESM2.from_pretrained(MODEL, device=cuda_device, dtype="fp32")
    _, shards = embed_in_shards(model, sequences, in_fp32=lambda: fp32)
    assert shards[0].status[2] == STATUS_RECOMPUTED
    assert relative_errors(shards[0].embeddings[LAST][2:3], truth[8:9]).max() <= 1e-5


def test_the_budget_that_is_measured_fits(cuda_device: torch.device) -> None:
    model = ESM2.from_pretrained(MODEL, device=cuda_device, dtype="fp16")
    assert measured_token_budget(model, 32768) == 32768
    most = measured_token_budget(model, 1 << 24)
    assert 32768 < most <= 1 << 24
    assert most % 1024 == 0


def test_from_fasta_to_file(
    cuda_device: torch.device, sequences: list[str], truth: np.ndarray, tmp_path: Path
) -> None:
    fasta, output = tmp_path / "in.fasta", tmp_path / "out.h5"
    fasta.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    request = EmbedRequest(
        (str(fasta),), output, model=MODEL, device=str(cuda_device), max_length=0, fp32_compare=10
    )
    summary = embed_files(request, Console(quiet=True))
    with EmbeddingReader(output) as reader:
        assert reader.attributes["dtype"] == "fp16"
        assert torch.cuda.get_device_name(cuda_device) in reader.attributes["device"]
        assert relative_errors(reader.embeddings(), truth).max() <= 5e-3
        comparisons = [each.comparison for each in reader.comparisons()]
    assert len(comparisons) == 10
    assert all(0 < each.relative_error <= 5e-3 and each.cosine >= 0.99999 for each in comparisons)
    assert summary.stages.sequences == len(sequences)


def test_contacts_on_disk_are_those_of_the_model(
    cuda_device: torch.device, sequences: list[str], tmp_path: Path
) -> None:
    """In packs of many, beside other kinds, with the results of one pack on their way while the next runs."""
    chosen = sequences[:40]
    write_fasta(tmp_path / "in.fasta", chosen)
    request = EmbedRequest(
        (str(tmp_path / "in.fasta"),),
        tmp_path / "out.h5",
        model=MODEL,
        device=str(cuda_device),
        dtype="fp16",
        kinds=("mean", "contacts"),
        max_length=0,
        token_budget=4096,
    )
    embed_files(request, Console(quiet=True))
    truth = ESM2.from_pretrained(MODEL, device=cuda_device, dtype="fp64").contacts(chosen)
    with EmbeddingReader(request.output) as reader:
        for row, expected in enumerate(truth):
            np.testing.assert_allclose(reader.value(row, "contacts"), expected, rtol=0, atol=4e-3)
