import gzip
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peak_memory
import pytest
import torch
from nursery import names_in
from programs import run_python

from esm_packed.alphabet import encode
from esm_packed.errors import UsageError
from esm_packed.kernels import matmul
from esm_packed.model import ESM2
from esm_packed.outputs import mean_of
from esm_packed.packing import pack
from esm_packed.runners import product, session
from esm_packed.runners.input.fasta import InputError, ReadOptions
from esm_packed.runners.output.layout import StoredProblem
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.session import embed_files
from esm_packed.runners.state.cut import FLOPS_PER_SHARD
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import plan_hash
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.shard import STATUS_FAILED
from esm_packed.runners.summary import Summary
from esm_packed.runners.watch.console import Console

MODEL = "demo"
DATA = Path(__file__).parents[1] / "data"
LENGTHS = [5, 80, 1, 41, 90, 41, 7, 60, 3, 41, 70, 25]


@pytest.fixture(scope="session")
def model() -> ESM2:
    return ESM2.from_pretrained(MODEL, device="cpu")


@pytest.fixture(scope="session")
def sequences() -> dict[str, str]:
    rng = np.random.default_rng(0)
    return {
        f"protein{number}": "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWCXBUZO"), length))
        for number, length in enumerate(LENGTHS)
    }


def to_fasta(sequences: dict[str, str]) -> str:
    return "".join(f">{name} a description\n{sequence}\n" for name, sequence in sequences.items())


@pytest.fixture
def fasta(tmp_path, sequences) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text(to_fasta(sequences))
    return path


def request_for(*inputs: Path | str, **changes) -> EmbedRequest:
    output = Path(next(path for path in inputs if path != "-")).parent / "out.h5"
    request = EmbedRequest(tuple(map(str, inputs)), output, model=MODEL, device="cpu", token_budget=128)
    return replace(request, **changes)


def run(*inputs: Path | str, **changes) -> tuple[Summary, EmbeddingReader]:
    request = request_for(*inputs, **changes)
    summary = embed_files(request, Console(quiet=True))
    return summary, EmbeddingReader(request.output)


def one_by_one(model: ESM2, sequences: dict[str, str], layer: int) -> np.ndarray:
    return torch.cat(
        [
            model.embed_packed(pack([encode(sequence)]), [mean_of(layer)])[mean_of(layer)]
            for sequence in sequences.values()
        ]
    ).numpy()


def test_rows_come_in_input_order_and_equal_each_sequence_alone(fasta, sequences, model):
    summary, reader = run(fasta)
    assert reader.sequence_ids() == list(sequences)
    assert reader.column("lengths").tolist() == LENGTHS
    assert not reader.column("truncated").any()
    assert not reader.column("status").any()
    expected = one_by_one(model, sequences, 5)
    np.testing.assert_allclose(reader.embeddings(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert summary.num_sequences == len(LENGTHS)
    assert summary.stages.residues == summary.num_residues == sum(LENGTHS)
    assert summary.stages.tokens == sum(LENGTHS) + 2 * len(LENGTHS)
    assert summary.stages.overlong_packs == 0
    assert 0.5 < summary.stages.packing_efficiency <= 1
    assert names_in(fasta.parent) == ["in.fasta", "out.h5"]


@pytest.mark.parametrize("flops_per_shard", [1.0, 1.5e8, 4e8], ids=["a record each", "few", "two"])
def test_shards_change_nothing(fasta, sequences, model, monkeypatch, flops_per_shard):
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", flops_per_shard)
    _, reader = run(fasta)
    assert reader.sequence_ids() == list(sequences)
    expected = one_by_one(model, sequences, 5)
    np.testing.assert_allclose(reader.embeddings(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_layers(fasta, sequences, model):
    _, reader = run(fasta, layers=(-1, 0, 5, 3))
    assert reader.layers == [0, 5, 3]
    for layer in (0, 3, 5):
        expected = one_by_one(model, sequences, layer)
        bound = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(reader.embeddings(layer), expected, rtol=1e-5, atol=bound)
    np.testing.assert_array_equal(reader.embeddings(), reader.embeddings(3))


def test_truncation_is_flagged_and_uses_the_first_residues(fasta, sequences, model):
    summary, reader = run(fasta, max_length=50)
    expected = one_by_one(model, {name: sequence[:50] for name, sequence in sequences.items()}, 5)
    np.testing.assert_allclose(reader.embeddings(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert reader.column("lengths").tolist() == LENGTHS
    assert reader.column("embedded_lengths").tolist() == [min(length, 50) for length in LENGTHS]
    assert reader.column("truncated").tolist() == [length > 50 for length in LENGTHS]
    assert summary.num_truncated == sum(length > 50 for length in LENGTHS)


def test_default_length_is_1022_and_0_is_the_whole(tmp_path, without_computing):
    (tmp_path / "in.fasta").write_text(">long\n" + "MK" * 550 + "\n")
    _, reader = run(tmp_path / "in.fasta")
    assert reader.column("embedded_lengths").tolist() == [1022]
    summary, reader = run(tmp_path / "in.fasta", max_length=0, overwrite=True)
    assert reader.column("embedded_lengths").tolist() == [1100]
    assert (summary.stages.packs, summary.stages.tokens) == (1, 1102)
    assert "1 of them a single longer sequence" in "\n".join(summary.lines(verbose=True))


def test_gzip_stdin_and_several_files_are_one_input(tmp_path, fasta, sequences, monkeypatch):
    text = to_fasta(sequences).encode()
    half = text.index(b">protein6")
    (tmp_path / "a.gz").write_bytes(gzip.compress(text[:half]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text[half:])))
    _, pieces = run(tmp_path / "a.gz", "-", output=tmp_path / "pieces.h5")
    _, whole = run(fasta)
    assert pieces.sequence_ids() == list(sequences)
    np.testing.assert_allclose(pieces.embeddings(), whole.embeddings(), rtol=1e-5, atol=1e-6)
    assert pieces.plan["input_names"] == [str(tmp_path / "a.gz"), "-"]


def test_standard_input_is_not_needed_again(tmp_path, fasta, sequences, monkeypatch):
    text = to_fasta(sequences).encode()

    def pipe(content: bytes) -> io.BytesIO:
        stream = io.BytesIO(content)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        return stream

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out.h5"
    with pytest.raises(InputError, match="no input files; give FASTA"):
        run(fasta, inputs=(), output=output)
    with monkeypatch.context() as patch:
        patch.setattr(ESM2, "embed_packed", interrupt)
        pipe(text)
        with pytest.raises(KeyboardInterrupt):
            run(fasta, inputs=("-",), output=output)
    pipe(text + b">more\nMKV\n")
    with pytest.raises(UsageError, match=r"inputs was .* bytes with sha256 .* now "):
        run(fasta, inputs=("-",), output=output)
    rest = pipe(text)
    _, reader = run(fasta, inputs=(), output=output)
    assert rest.tell() == 0
    assert reader.plan["input_names"] == ["-"]
    _, whole = run(fasta, output=tmp_path / "whole.h5")
    np.testing.assert_array_equal(reader.embeddings(), whole.embeddings())


def test_left_out_renamed_and_replaced_records_are_accounted_for(tmp_path, without_computing):
    path = tmp_path / "in.fasta"
    path.write_text(">a\nMKT\n>b\nMK1\n>a\nMKL\n>c\nMKV\n")
    summary, reader = run(path, read=ReadOptions(invalid="skip", duplicates="first"))
    assert reader.sequence_ids() == ["a", "c"]
    assert [(problem.sequence_id, problem.file, problem.line) for problem in reader.problems()] == [
        ("b", str(path), 4),
        ("a", str(path), 5),
    ]
    assert (summary.num_left_out, summary.num_duplicates) == (2, 1)

    summary, reader = run(path, read=ReadOptions(invalid="x", duplicates="rename"), overwrite=True)
    assert reader.sequence_ids() == ["a", "b", "a__2", "c"]
    assert (summary.num_replaced, summary.num_duplicates, summary.num_left_out) == (1, 1, 0)


def test_what_was_changed_is_named_in_the_output_the_summary_and_the_log(tmp_path, without_computing):
    path, log = tmp_path / "in.fasta", tmp_path / "log.jsonl"
    path.write_text(
        ">long\nMKTMKT*\n>a\nMK1\n>a\nM-K*\n>plain\nMKV\n"
        + "".join(f">stop{number}\nMK{'L' * (number % 3)}*\n" for number in range(6))
    )
    rules = ReadOptions(invalid="x", gaps="drop", duplicates="rename")
    summary, reader = run(path, read=rules, max_length=4, log_json=log)
    assert reader.column("modified").tolist() == [4, 1, 14, 0, *[4] * 6]
    assert reader.column("truncated").tolist() == [True, *[False] * 9]
    stops = ["long", "a__2", *(f"stop{number}" for number in range(6))]
    expected = {
        "truncated": ["long"],
        "residues replaced": ["a"],
        "gaps dropped": ["a__2"],
        "trailing stop dropped": stops,
        "renamed": ["a__2"],
    }
    assert summary.changed == {change: (len(ids), ids[:5]) for change, ids in expected.items()}
    shown = [(line[:20].strip(), line[20:]) for line in summary.lines()]
    lines = dict(shown)
    assert lines["truncated"].endswith(": 'long'")
    assert lines["replaced"].endswith(": 'a'")
    assert lines["gaps dropped"] == "1 sequence with gaps: 'a__2'"
    assert lines["duplicates"].endswith(": 'a__2'")
    first = shown.index(("stops dropped", "8 sequences ending in *:"))
    assert shown[first + 1] == ("", "'long', 'a__2', 'stop0', 'stop1', 'stop2', ...")
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    changed = [(line["sequence_id"], line["changes"]) for line in logged if line["event"] == "changed"]
    assert changed == [
        (name, [change for change, ids in expected.items() if name in ids])
        for name in ("long", "a", *stops[1:])
    ]


def test_attributes_state_what_ran(fasta, model, without_computing):
    _, reader = run(fasta)
    attributes = reader.attributes
    assert attributes["model_name"] == model.model_name
    assert attributes["model_sha256"] == model.model_sha256
    assert attributes["dtype"] == "fp32"
    assert attributes["attention_backend"] == model.attention_backend
    assert attributes["matmul"] == matmul.describe(model.device, model.dtype)
    assert json.loads(attributes["packing"])["token_budget"] == 128
    assert json.loads(attributes["versions"])["torch"] == torch.__version__
    assert attributes["plan_hash"] == plan_hash(reader.plan["identity"])


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_other_precisions(fasta, dtype):
    _, reader = run(fasta, dtype=dtype)
    _, reference = run(fasta, output=fasta.parent / "reference.h5")
    assert reader.attributes["dtype"] == dtype
    assert reader.embeddings().dtype == np.float32
    # one residue alone amplifies rounding a hundredfold, in any precision
    rows = np.array(LENGTHS) > 1
    expected = reference.embeddings()[rows]
    error = np.linalg.norm(reader.embeddings()[rows] - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if dtype == "fp64" else 3e-2)


def test_stored_as_fp16(fasta):
    _, half = run(fasta, store_dtype="fp16")
    _, full = run(fasta, output=fasta.parent / "full.h5")
    np.testing.assert_array_equal(half.embeddings(), full.embeddings().astype(np.float16))


def test_what_is_not_finite_becomes_a_failed_row(fasta, model, monkeypatch):
    original = ESM2.embed_packed

    def spoil_length_90(self, batch, names, *rest):
        rows = original(self, batch, names, *rest)
        rows["mean/3"][batch.cu_seqlens.diff() == 92, 5] = torch.inf
        return rows

    monkeypatch.setattr(ESM2, "embed_packed", spoil_length_90)
    summary, reader = run(fasta, layers=(3, 5))
    row = LENGTHS.index(90)
    assert summary.num_failed == 1
    assert np.flatnonzero(reader.column("status")).tolist() == [row]
    assert reader.column("status")[row] == STATUS_FAILED
    for layer in (3, 5):
        assert np.flatnonzero(np.isnan(reader.embeddings(layer)).any(axis=1)).tolist() == [row]
        assert np.isnan(reader.embeddings(layer)[row]).all()
    reason = "the embedding is not finite (dtype fp32, stored as float32)"
    assert reader.problems() == [StoredProblem(f"protein{row}", "", 0, reason)]


def test_too_large_for_fp16_storage_is_a_failed_row(fasta, model, monkeypatch):
    original = ESM2.embed_packed
    monkeypatch.setattr(
        ESM2, "embed_packed", lambda *call: {name: 1e6 * rows for name, rows in original(*call).items()}
    )
    summary, reader = run(fasta, store_dtype="fp16")
    assert summary.num_failed == len(LENGTHS)
    assert all("--store-dtype fp32 keeps" in problem.reason for problem in reader.problems())


def test_the_same_run_again_is_already_complete(fasta, without_computing):
    run(fasta)
    before = (fasta.parent / "out.h5").stat()
    summary, _ = run(fasta)
    assert summary.already_complete
    assert (fasta.parent / "out.h5").stat().st_mtime_ns == before.st_mtime_ns

    moved = fasta.rename(fasta.with_name("moved.fasta"))
    assert run(moved)[0].already_complete


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (3,)},
        {"max_length": 10},
        {"token_budget": 600},
        {"store_dtype": "fp16"},
        {"dtype": "fp64"},
        {"read": ReadOptions(gaps="drop")},
    ],
)
def test_an_output_of_another_run_is_kept(fasta, changes, without_computing):
    run(fasta)
    before = (fasta.parent / "out.h5").read_bytes()
    with pytest.raises(UsageError, match=r"other input or options \(.* was .*\); use --overwrite"):
        run(fasta, **changes)
    assert (fasta.parent / "out.h5").read_bytes() == before
    summary, _ = run(fasta, overwrite=True, **changes)
    assert not summary.already_complete


def test_changed_input_is_another_run(fasta, without_computing):
    run(fasta)
    fasta.write_text(fasta.read_text().replace(">protein0", ">Protein0"))
    with pytest.raises(UsageError, match="other input"):
        run(fasta)


def test_output_through_a_link_replaces_its_target(fasta, tmp_path, without_computing):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.h5").symlink_to("elsewhere/real.h5")
    run(fasta)
    assert (tmp_path / "out.h5").is_symlink()
    assert names_in(tmp_path / "elsewhere") == ["real.h5"]


def test_a_failed_run_is_continued(fasta, sequences, model, monkeypatch):
    """What was finished before the failure is not computed again, and the file is the same."""
    _, uninterrupted = run(fasta, output=fasta.parent / "reference.h5")
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    original, calls = ESM2.embed_packed, []

    def fail_at_the_sixth(self, batch, names, *rest):
        calls.append(batch.num_sequences)
        if len(calls) == 6:
            raise RuntimeError("broken")
        return original(self, batch, names, *rest)

    monkeypatch.setattr(ESM2, "embed_packed", fail_at_the_sixth)
    with pytest.raises(RuntimeError, match="broken"):
        run(fasta)
    assert names_in(fasta.parent) == ["in.fasta", "out.h5.run", "reference.h5"]
    finished = names_in(fasta.parent / "out.h5.run" / "shards")
    assert len(finished) >= 3

    calls[:] = [0] * 6
    _, reader = run(fasta)
    assert len(calls) - 6 == len(LENGTHS) - len(finished)
    assert reader.sequence_ids() == uninterrupted.sequence_ids()
    assert names_in(fasta.parent) == ["in.fasta", "out.h5", "reference.h5"]


def test_an_unfinished_run_of_other_options_is_kept(fasta, model, monkeypatch):
    def fail(*call):
        raise RuntimeError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(ESM2, "embed_packed", fail)
        with pytest.raises(RuntimeError, match="broken"):
            run(fasta)
    with pytest.raises(UsageError, match=r"max_length was 1022, now 10.*--overwrite"):
        run(fasta, max_length=10)
    run(fasta, max_length=10, overwrite=True)
    assert names_in(fasta.parent) == ["in.fasta", "out.h5"]


def stop_before_merging(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run of which all shards are finished."""
    with monkeypatch.context() as stopped:
        stopped.setattr(product, "merge_run", lambda *call, **options: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            run(fasta)


def notes_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what is said from now on."""
    notes: list[str] = []
    monkeypatch.setattr(Console, "note", lambda console, text: notes.append(text))
    return notes


@pytest.mark.parametrize("name", ["tokens.bin", "names.bin", "records.bin", "first_same.bin"])
def test_a_damaged_index_is_made_again_by_the_same_command(fasta, model, monkeypatch, name):
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    _, undamaged = run(fasta, output=fasta.parent / "reference.h5")
    stop_before_merging(fasta, monkeypatch)
    run_folder = fasta.parent / "out.h5.run"
    (run_folder / "shards" / "00004.shard").unlink()
    content = bytearray((run_folder / "index" / name).read_bytes())
    content[len(content) // 4] ^= 1
    (run_folder / "index" / name).write_bytes(content)
    notes = notes_of(monkeypatch)
    _, reader = run(fasta)
    assert any(f"{name}: damaged" in note for note in notes)
    assert reader.sequence_ids() == undamaged.sequence_ids()
    np.testing.assert_array_equal(reader.embeddings(), undamaged.embeddings())


def test_shards_whose_plan_is_gone_are_not_dropped_in_silence(fasta, model, monkeypatch):
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    stop_before_merging(fasta, monkeypatch)
    (fasta.parent / "out.h5.run" / "plan.json").unlink()
    shards = list((fasta.parent / "out.h5.run" / "shards").iterdir())
    notes = notes_of(monkeypatch)
    run(fasta)
    assert any(f"removed {len(shards)} shards of the abandoned run" in note for note in notes)


@pytest.mark.parametrize("damage", ["cut short", "altered", "another shard", "gone"])
def test_a_damaged_shard_is_computed_again(fasta, model, monkeypatch, damage):
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)
    _, undamaged = run(fasta, output=fasta.parent / "reference.h5")
    stop_before_merging(fasta, monkeypatch)
    shard = fasta.parent / "out.h5.run" / "shards" / "00004.shard"
    content = bytearray(shard.read_bytes())
    if damage == "cut short":
        shard.write_bytes(content[:-200])
    elif damage == "altered":
        content[17 * 4] ^= 1  # of the embedding
        shard.write_bytes(content)
    elif damage == "another shard":
        shutil.copy(shard.with_name("00003.shard"), shard)
    else:
        shard.unlink()
    calls = []
    original = ESM2.embed_packed

    def count(self, batch, names, *rest):
        calls.append(batch.num_sequences)
        return original(self, batch, names, *rest)

    monkeypatch.setattr(ESM2, "embed_packed", count)
    _, reader = run(fasta)
    assert calls == [1]
    assert reader.embeddings().tobytes() == undamaged.embeddings().tobytes()


def test_a_second_process_is_refused(fasta, model):
    directory = RunDirectory((fasta.parent / "out.h5").resolve())
    directory.make()
    with directory.claim(), pytest.raises(UsageError, match="is in use by process"):
        run(fasta)
    assert names_in(fasta.parent) == ["in.fasta", "out.h5.run"]
    run(fasta)
    assert names_in(fasta.parent) == ["in.fasta", "out.h5"]


def test_identical_sequences_are_computed_once(fasta, sequences, model, monkeypatch):
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 8e7)
    copies = {
        f"copy{number}": sequence for number, sequence in enumerate(sequences.values()) if number % 3 == 0
    }
    fasta.write_text(to_fasta(sequences | copies))
    summary, reader = run(fasta)
    assert summary.num_identical == len(copies)
    assert summary.stages.sequences == len(sequences)
    rows = dict(zip(reader.sequence_ids(), reader.embeddings(), strict=True))
    for number in range(0, len(sequences), 3):
        np.testing.assert_array_equal(rows[f"copy{number}"], rows[f"protein{number}"])


def test_a_copy_of_a_failed_row_fails_too_in_whatever_shard_it_is(fasta, sequences, monkeypatch):
    original = ESM2.embed_packed

    def spoil_length_90(self, batch, names, *rest):
        rows = original(self, batch, names, *rest)
        rows["mean/5"][batch.cu_seqlens.diff() == 92] = torch.nan
        return rows

    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.0)  # each record is a shard
    monkeypatch.setattr(ESM2, "embed_packed", spoil_length_90)
    failed = LENGTHS.index(90)
    copied = sequences[f"protein{failed}"]
    fasta.write_text(to_fasta(sequences | {"sound": sequences["protein0"], "copy": copied}))
    summary, reader = run(fasta)
    rows = [failed, len(sequences) + 1]
    assert np.flatnonzero(reader.column("status")).tolist() == rows
    assert reader.column("status")[rows].tolist() == [STATUS_FAILED, STATUS_FAILED]
    assert np.isnan(reader.embeddings()[rows]).all()
    assert summary.num_failed == 2
    assert [problem.sequence_id for problem in reader.problems()] == [f"protein{failed}", "copy"]


def test_the_sequences_compared_with_fp32_are_the_same_every_time(fasta, monkeypatch):
    """Also in a run that was stopped: a shard that is computed again compares the same ones."""
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 2e7)
    samples = []
    for name in ("one.h5", "two.h5"):
        _, reader = run(fasta, output=fasta.parent / name, dtype="bf16", fp32_compare=5)
        samples.append([comparison.sequence_id for comparison in reader.comparisons()])
    assert samples[0] == samples[1]
    assert len(set(samples[0])) == 5
    assert samples[0] != [f"protein{number}" for number in range(5)], "no sample, only the first"


def test_out_of_memory_halves_the_pack(fasta, model, monkeypatch):
    original = ESM2.embed_packed

    def limited(self, batch, names, *rest):
        if batch.total_tokens > 85:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch, names, *rest)

    _, unlimited = run(fasta, output=fasta.parent / "reference.h5")
    monkeypatch.setattr(ESM2, "embed_packed", limited)
    summary, reader = run(fasta)
    assert summary.stages.num_halved > 0
    assert summary.num_failed == 1
    failed = LENGTHS.index(90)
    assert np.flatnonzero(reader.column("status") == STATUS_FAILED).tolist() == [failed]
    assert "90 residues do not fit into the memory" in reader.problems()[0].reason
    kept = np.arange(len(LENGTHS)) != failed
    np.testing.assert_allclose(reader.embeddings()[kept], unlimited.embeddings()[kept], rtol=1e-4, atol=1e-5)


def test_what_overflows_in_half_precision_is_recomputed(fasta, sequences, model, monkeypatch):
    original = ESM2.embed_packed

    def overflow(self, batch, names, *rest):
        rows = original(self, batch, names, *rest)
        if self.precision == "fp16":
            rows["mean/5"][batch.cu_seqlens.diff() == 92, 5] = torch.inf
        return rows

    monkeypatch.setattr(ESM2, "embed_packed", overflow)
    summary, reader = run(fasta, dtype="fp16")
    row = LENGTHS.index(90)
    assert summary.num_recomputed == 1
    assert reader.column("status").tolist() == [int(number == row) for number in range(len(LENGTHS))]
    expected = one_by_one(model, {"": sequences[f"protein{row}"]}, 5)[0]
    np.testing.assert_allclose(reader.embeddings()[row], expected, rtol=1e-5, atol=1e-5)
    assert reader.problems()[0].sequence_id == f"protein{row}"


def test_input_is_checked_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load_checkpoint", lambda *call, **options: pytest.fail("model loaded"))
    (tmp_path / "in.fasta").write_text(">a\nMK1\n")
    with pytest.raises(InputError):
        run(tmp_path / "in.fasta")
    assert names_in(tmp_path) == ["in.fasta"]


def test_real_proteins_fill_the_packs(tmp_path, monkeypatch, without_computing):
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1e30)  # one shard, or each has a part-filled pack on a CPU
    shutil.copy(DATA / "mycoplasma_every_16th.fasta", tmp_path / "in.fasta")
    summary, reader = run(tmp_path / "in.fasta", token_budget=3200)
    assert reader.num_sequences == 30
    assert summary.stages.packing_efficiency > 0.98


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "numbers, more_mib",
    # 16 MiB more on an idle machine, 36 once on a busy one
    [((50_000, 250_000), 44), pytest.param((100_000, 600_000), 32, marks=pytest.mark.slow)],  # 12 s
)
def test_memory_does_not_grow_with_the_input(tmp_path, numbers, more_mib):
    done = run_python(Path(peak_memory.__file__), tmp_path, *map(str, numbers))
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < more_mib * 1024, f"kB for so many records: {few} for {numbers[0]}, {many}"
