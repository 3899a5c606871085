"""Comparison with FP32, escape hatches, metrics, what deserves a look, and the measured token budget."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fair_esm_reference
import numpy as np
import pytest
import torch
from kept_shards import Shard, mean_arrays, run_pipeline

from esm_packed import ESM2, kernels
from esm_packed.alphabet import encode
from esm_packed.checkpoints import load_checkpoint
from esm_packed.layouts import LAYOUTS
from esm_packed.packing import SPECIAL_TOKENS, pack
from esm_packed.runners import session
from esm_packed.runners.cli import main as cli
from esm_packed.runners.compute import budget, engine, worker
from esm_packed.runners.compute.budget import PROBE_LENGTH, PROBE_SEQUENCES, measured_token_budget
from esm_packed.runners.compute.engine import InProcessEngine
from esm_packed.runners.compute.pipeline import Pipeline
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.session import embed_files
from esm_packed.runners.state.cut import FLOPS_PER_SHARD
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_FAILED, ShardInput
from esm_packed.runners.summary import Summary
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.metrics import StageTimes
from esm_packed.runners.watch.watch import watching

LENGTHS = [5, 60, 3, 44, 90, 17, 1, 33, 72, 21, 38, 64]
SEQUENCES = fair_esm_reference.random_sequences(LENGTHS, seed=3, letters="LAGVSERTIDPKQNFYMHWC")


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(SEQUENCES)))
    return path


def run(fasta: Path, *options: str) -> int:
    arguments = ["embed", str(fasta), "-o", str(fasta.with_name("out.h5")), "--model", "demo"]
    return cli.main([*arguments, "--device", "cpu", "--token-budget", "128", *options])


def reader_of(fasta: Path) -> EmbeddingReader:
    return EmbeddingReader(fasta.with_name("out.h5"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_compared_rows_are_those_of_the_file_and_of_fp32(
    fasta: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1e8)  # several shards
    assert run(fasta, "--dtype", dtype, "--fp32-compare", "5") == 0
    fp32 = ESM2.from_pretrained("demo", dtype="fp32", device="cpu")
    with reader_of(fasta) as reader:
        found = reader.comparisons()
        assert len({each.sequence_id for each in found}) == 5
        for sequence_id, (cosine, max_error, relative_error) in found:
            number = int(sequence_id[1:])
            row = reader.embeddings()[number].astype(np.float64)
            truth = fp32.embed([SEQUENCES[number]])[0].astype(np.float64)
            assert max_error == pytest.approx(np.abs(row - truth).max(), rel=1e-3, abs=1e-7)
            assert relative_error == pytest.approx(
                np.linalg.norm(row - truth) / np.linalg.norm(truth), rel=1e-3, abs=1e-7
            )
            assert cosine == pytest.approx(
                row @ truth / np.linalg.norm(row) / np.linalg.norm(truth), abs=1e-9
            )
            assert (relative_error > 1e-5) == (dtype != "fp32")
    assert "5 sequences: cosine at least " in capsys.readouterr().out


def test_more_to_compare_than_there_is(fasta: Path) -> None:
    assert run(fasta, "--fp32-compare", "100") == 0
    with reader_of(fasta) as reader:
        assert len(reader.comparisons()) == len(SEQUENCES)


def test_a_failed_row_is_not_compared() -> None:
    model = ESM2.from_pretrained("demo", device="cpu")
    original = model.embed_packed

    def spoil(batch, names, *rest):
        rows = original(batch, names, *rest)
        rows["mean/5"][batch.cu_seqlens.diff() == 10 + SPECIAL_TOKENS] = torch.nan
        return rows

    model.embed_packed = spoil  # type: ignore[method-assign]
    shards: list[Shard] = []
    inputs = ShardInput(0, [encode("M" * 10), encode("M" * 11)], compared=[0, 1])
    pipeline = Pipeline(model, arrays=mean_arrays([5], 96), token_budget=64)
    run_pipeline(pipeline, [inputs], lambda number, shard: shards.append(shard), mean_arrays([5], 96))
    assert shards[0].status.tolist() == [STATUS_FAILED, STATUS_COMPUTED]
    assert list(shards[0].comparisons) == [1]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_packing_disabled(fasta: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    assert run(fasta) == 0
    with reader_of(fasta) as reader:
        packed = reader.embeddings()
        assert reader.attributes["disabled"] == ""
    batches: list[Any] = []
    monkeypatch.setattr(worker, "LAYOUTS", {"padded": _Recording(batches), "packed": LAYOUTS["packed"]})
    if how == "environment":
        monkeypatch.setenv("ESM_PACKED_DISABLE_PACKING", "1")
    assert run(fasta) == (0 if how == "option" else 2), "another layout is another run"
    assert run(fasta, "--overwrite", *(["--disable-packing"] if how == "option" else [])) == 0
    assert sum(batch.num_sequences for batch in batches) == len(SEQUENCES)
    with reader_of(fasta) as reader:
        np.testing.assert_allclose(reader.embeddings(), packed, rtol=1e-5, atol=1e-5)
        assert reader.attributes["disabled"] == "packing"
        assert reader.attributes["attention_backend"] == "sdpa, padded"
        assert json.loads(reader.attributes["packing"])["algorithm"] == "padded, sorted by length"


def test_reproducible_keeps_the_bits_in_another_order(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other neighbors, packs and shards: the same rows, even if multiplications depend on their shape."""
    linear = kernels.linear

    def by_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        weight = weight.to_dense()
        part = len(x) % x.shape[1]
        return linear(x[:, :part], weight[:, :part], bias) + x[:, part:] @ weight[:, part:].T

    monkeypatch.setattr("esm_packed.kernels.linear", by_shape)
    rows = {}
    for option in ("--reproducible", "--quiet"):
        for order in (1, -1):
            numbers = range(len(SEQUENCES))[::order]
            fasta.write_text("".join(f">p{number}\n{SEQUENCES[number]}\n" for number in numbers))
            monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1e8 * (2 + order))
            assert run(fasta, option, "--overwrite") == 0
            with reader_of(fasta) as reader:
                rows[option, order] = reader.embeddings()[::order]
    assert np.array_equal(rows["--reproducible", 1], rows["--reproducible", -1])
    assert not np.array_equal(rows["--quiet", 1], rows["--quiet", -1])
    assert run(fasta, "--reproducible", "--disable-packing") == 2
    assert "--reproducible cannot be combined with --disable-packing" in capsys.readouterr().err


def test_cuda_graphs_need_a_gpu(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fasta, "--reproducible", "--cuda-graphs") == 2
    assert "--cuda-graphs needs a GPU" in capsys.readouterr().err
    assert run(fasta, "--cuda-graphs") == 2
    assert "--cuda-graphs needs --reproducible" in capsys.readouterr().err


def test_reproducible_packs_are_not_halved(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*call: object, **options: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ESM2, "embed_packed", out_of_memory)
    for number_of_proteins in (len(SEQUENCES), 1):
        fasta.write_text("".join(f">p{n}\n{SEQUENCES[n]}\n" for n in range(number_of_proteins)))
        assert run(fasta, "--reproducible", "--overwrite") == 2
        assert "a pack of 128 tokens does not fit into the memory of cpu" in capsys.readouterr().err


class _Recording:
    """The padded layout, with a list of what it laid out."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __getattr__(self, name: str) -> object:
        return getattr(LAYOUTS["padded"], name)

    def lay_out(self, token_ids, token_budget):
        self._batches.append(LAYOUTS["padded"].lay_out(token_ids, token_budget))
        return self._batches[-1]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("how", ["option", "environment"])
def test_fp16_disabled(fasta: Path, monkeypatch: pytest.MonkeyPatch, how: str, dtype: str) -> None:
    if how == "environment":
        monkeypatch.setenv("ESM_PACKED_DISABLE_FP16", "1")
    assert run(fasta, "--dtype", dtype, *(["--disable-fp16"] if how == "option" else [])) == 0
    with reader_of(fasta) as reader:
        assert reader.attributes["dtype"] == "fp32"
        assert reader.attributes["disabled"] == "fp16"


@pytest.mark.parametrize(
    ("value", "disabled"),
    [("1", "packing, fp16"), ("True", "packing, fp16"), ("yes", "packing, fp16")]
    + [(value, "") for value in ("0", "false", "No", "")],
)
def test_environment_switches(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, value: str, disabled: str
) -> None:
    monkeypatch.setenv("ESM_PACKED_DISABLE_FP16", value)
    monkeypatch.setenv("ESM_PACKED_DISABLE_PACKING", value)
    assert run(fasta, "--dtype", "fp16") == 0
    with reader_of(fasta) as reader:
        assert reader.attributes["disabled"] == disabled


@pytest.mark.parametrize(
    "variable", ["ESM_PACKED_DISABLE_FP16", "ESM_PACKED_DISABLE_PACKING", "ESM_PACKED_DEBUG"]
)
def test_an_environment_switch_that_is_neither_on_nor_off(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.setenv(variable, "maybe")
    assert run(fasta) == 2
    assert (
        f"esm-packed: error: environment variable {variable}='maybe': set it to 1" in capsys.readouterr().err
    )
    assert not fasta.with_name("out.h5").exists()


def test_metrics(fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm_packed.runners.watch.watch.LOG_SECONDS", 0.0)
    log = tmp_path / "metrics.jsonl"
    assert run(fasta, "--log-json", str(log)) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    packs = len(LAYOUTS["packed"].plan(np.array(LENGTHS) + SPECIAL_TOKENS, 128))
    assert [line["event"] for line in lines] == ["running"] * packs + ["end"]
    done = [line["residues_done"] for line in lines]
    assert done == sorted(done)
    last = lines[-1]
    assert last["residues_done"] == last["residues_total"] == sum(LENGTHS)
    assert last["packing_efficiency"] == pytest.approx((sum(LENGTHS) + 24) / (128 * packs), abs=1e-4)
    worker_line = last["workers"][0]
    assert worker_line["tokens"] == sum(LENGTHS) + SPECIAL_TOKENS * len(LENGTHS)
    assert worker_line["sequences"] == len(LENGTHS)
    assert {"packs_waiting", "results_waiting", "device_memory_bytes", "stage_seconds"} <= worker_line.keys()


def test_a_metrics_file_that_cannot_be_written_is_found_before_work(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fasta, "--log-json", str(tmp_path / "no such folder" / "m.jsonl")) == 2
    assert "--log-json" in capsys.readouterr().err


def test_a_metrics_file_that_fails_later_does_not_end_the_run(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "m.jsonl"

    def spoil(*arguments: Any) -> Any:
        log.unlink()
        log.mkdir()
        return watching(*arguments)

    monkeypatch.setattr(session, "watching", spoil)
    assert run(fasta, "--log-json", str(log)) == 0
    assert capsys.readouterr().err.count("no more metrics are written") == 1


def summary_with(**stages: float) -> Summary:
    return Summary(
        Path("x"),
        "",
        "",
        "fp32",
        "cpu",
        100,
        1,
        1,
        0,
        0,
        0,
        0,
        stages=StageTimes(**stages),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "stages, expected",
    [
        ({"packs": 100, "token_room": 10000, "tokens_in_budget": 8600}, []),
        (
            {"packs": 100, "token_room": 10000, "tokens_in_budget": 8400},
            ["packing warning: packs are only 84% full"],
        ),
        (
            {"packs": 100, "token_room": 10000, "tokens_in_budget": 7900},
            ["packing error: packs are only 79% full"],
        ),
        ({"packs": 120, "overlong_packs": 20, "token_room": 10000, "tokens_in_budget": 8600}, []),
        ({"packs": 10, "token_room": 1000, "tokens_in_budget": 500}, []),
        ({"wall": 100.0, "computing": 81.0}, []),
        ({"wall": 100.0, "computing": 79.0, "reading": 50.0}, ["device idle (mild): it computed only 79%"]),
        ({"wall": 100.0, "computing": 49.0, "writing": 60.0}, ["device idle (critical)"]),
        ({"wall": 5.0, "computing": 1.0}, []),
    ],
)
def test_what_deserves_a_look(stages: dict[str, float], expected: list[str]) -> None:
    found = summary_with(**stages).warnings()
    assert len(found) == len(expected)
    for warning, beginning in zip(found, expected, strict=True):
        assert warning.startswith(beginning)
    if "reading" in stages:
        assert "of the other stages, reading took the longest" in found[0]


@pytest.mark.parametrize(
    "per_token, free, expected",
    [
        (1e5, 10**12, 32768),  # more than is useful fits
        (1e6, 10**10, 7 * 1024),  # 80% of 10 GB at 1 MB a token are 8,000
        (1e6, 10**6, 1024),  # not even that: packs are halved then
        (0.0, 10**10, 32768),
    ],
)
def test_token_budget_is_what_fits_into_the_memory(
    monkeypatch: pytest.MonkeyPatch, per_token: float, free: int, expected: int
) -> None:
    """On a GPU with `free` bytes, of a model of 1 GB that takes `per_token` bytes for each token."""

    def peak_memory(model: ESM2, num_sequences: int) -> int:
        return int(10**9 + per_token * num_sequences * (PROBE_LENGTH + SPECIAL_TOKENS))

    monkeypatch.setattr(budget, "peak_memory", peak_memory)
    monkeypatch.setattr(budget, "free_memory", lambda device: free)
    model = ESM2.from_pretrained("demo", device="cpu")
    assert measured_token_budget(model, 32768) == expected
    if expected == 32768:  # also where whole waves are no multiple of 1,024
        assert measured_token_budget(model, 29_184) == 29_184


def test_the_budget_of_a_gpu_is_whole_waves_as_far_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm_packed.packing.num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(engine, "measured_token_budget", lambda model, most: min(most, model.fitting))
    in_process = InProcessEngine(
        EmbedRequest(("x.fasta",), Path("x.h5")), load_checkpoint("demo"), torch.device("cuda", 0)
    )
    model = SimpleNamespace(fitting=10**6)
    in_process.__dict__["_worker"] = SimpleNamespace(model=model)
    assert in_process.token_budget(measured=True) == 33_792
    model.fitting = 7 * 1024
    assert in_process.token_budget(measured=True) == 7 * 1024
    assert in_process.token_budget(measured=False) == 33_792


def test_what_the_budget_is_measured_with_can_be_embedded() -> None:
    model = ESM2.from_pretrained("demo", device="cpu")
    rows = model.embed_packed(pack(budget.probe(PROBE_SEQUENCES[0])), ["mean/5"])["mean/5"]
    assert rows.shape == (PROBE_SEQUENCES[0], 96)
    assert rows.isfinite().all()


def test_the_same_run_again_takes_the_budget_of_its_output(fasta: Path) -> None:
    request = EmbedRequest((str(fasta),), fasta.with_name("out.h5"), model="demo", device="cpu")
    embed_files(request, Console(quiet=True))
    with reader_of(fasta) as reader:
        assert reader.plan["identity"]["token_budget"] == 1024
    again = embed_files(request, Console(quiet=True))
    assert again.already_complete
