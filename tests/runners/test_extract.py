"""`esm-packed extract` against fair-esm: the files of its extract.py, whatever happens on the way."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fair_esm_reference
import pytest
import torch
from esm.data import FastaBatchedDataset
from nursery import DIE_AT_STEP, SLOW, Child, Nursery, wait_until
from proteins import random_proteins, write_fasta

from esm_packed.model import ESM2
from esm_packed.packing import PackedBatch
from esm_packed.runners.cli.main import main
from esm_packed.runners.output.pt_files import FileNames

TOKENS = 4096
SLOW_WRITING = """
import time
from esm_packed.runners.output import pt_files
original_write = pt_files.write_pt
def slow_write(*arguments):
    time.sleep(0.2)
    original_write(*arguments)
pt_files.write_pt = slow_write
"""
NO_COMPUTING = """
def refuse(*arguments):
    raise AssertionError("computed again")
ESM2.embed_packed = refuse
"""


def extract(fasta: Path, folder: Path, *options: str, model: str | Path = "demo") -> int:
    return main(["extract", str(model), str(fasta), str(folder), "--nogpu", "--threads", "1", *options])


def fair_extract(
    checkpoint: Path, fasta: Path, include: Sequence[str], repr_layers: Sequence[int], truncation: int
) -> dict[str, dict[str, Any]]:
    """What fair-esm's scripts/extract.py saves, by label; its 2.0.0 wheel has no such command."""
    model = fair_esm_reference.load(checkpoint, torch.float32)
    dataset = FastaBatchedDataset.from_file(fasta)
    convert = fair_esm_reference.ALPHABET.get_batch_converter(truncation)
    layers = [(layer + model.num_layers + 1) % (model.num_layers + 1) for layer in repr_layers]
    results: dict[str, dict[str, Any]] = {}
    for batch in dataset.get_batch_indices(TOKENS, extra_toks_per_seq=1):
        labels, strings, tokens = convert([dataset[item] for item in batch])
        with torch.no_grad():
            output = model(tokens, repr_layers=layers, return_contacts="contacts" in include)
        representations = output["representations"]
        for row, label in enumerate(labels):
            result = results[label] = {"label": label}
            length = min(truncation, len(strings[row]))
            if "per_tok" in include:
                result["representations"] = {
                    layer: t[row, 1 : length + 1].clone() for layer, t in representations.items()
                }
            if "mean" in include:
                result["mean_representations"] = {
                    layer: t[row, 1 : length + 1].mean(0).clone() for layer, t in representations.items()
                }
            if "bos" in include:
                result["bos_representations"] = {
                    layer: t[row, 0].clone() for layer, t in representations.items()
                }
            if "contacts" in include:
                result["contacts"] = output["contacts"][row, :length, :length].clone()
    return results


def assert_same_content(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    assert found["label"] == expected["label"]
    for key in list(expected)[1:]:
        ours_by_layer, by_layer = (
            each[key] if isinstance(each[key], dict) else {None: each[key]} for each in (found, expected)
        )
        assert set(ours_by_layer) == set(by_layer)
        for layer, tensor in by_layer.items():
            ours = ours_by_layer[layer]
            assert (ours.dtype, ours.shape) == (torch.float32, tensor.shape)
            assert ours.untyped_storage().nbytes() == 4 * tensor.numel()
            assert torch.linalg.norm(ours - tensor) <= 1e-5 * torch.linalg.norm(tensor), (key, layer)


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """All that is in a folder, with what tells a file that was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def listed_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.tsv").open(newline="") as file:
        assert file.readline().startswith("#")
        return list(csv.DictReader(file, delimiter="\t"))


def load(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True)
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("include", "repr_layers", "truncation"),
    [
        (["mean"], None, None),
        (["bos", "per_tok", "mean"], [0, 2, -1], None),
        (["per_tok", "contacts", "bos"], [-2], 100),
        (["contacts"], None, 60),
    ],
)
def test_files_are_those_of_esm_extract(
    include: list[str], repr_layers: list[int] | None, truncation: int | None, tmp_path: Path
) -> None:
    checkpoint = fair_esm_reference.write_checkpoint(
        tmp_path / "esm2_small.pt", num_layers=3, num_heads=2, head_dim=24
    )
    lengths = [1, 2, 3, 300, 50, 1021, 1022, 1023, 1500, 7, 120]
    sequences = fair_esm_reference.random_sequences(lengths, seed=1)
    records = [f">sp|Q{n}|NAME_{n} a protein, no. {n} OS=Homo sapiens \n" for n in range(len(lengths))]
    fasta, lower = tmp_path / "proteins.fasta", tmp_path / "lower.fasta"
    fasta.write_text("".join(f"{r}{s[:60]}\n{s[60:]}\n" for r, s in zip(records, sequences, strict=True)))
    sequences[3] = sequences[3].lower()  # which fair-esm does not read
    lower.write_text("".join(f"{r}{s}\n" for r, s in zip(records, sequences, strict=True)))

    options = ["--include", *include]
    options += ["--repr_layers", *map(str, repr_layers)] if repr_layers else []
    options += ["--truncation_seq_length", str(truncation)] if truncation else []
    folder = tmp_path / "new" / "out"
    assert extract(lower, folder, *options, model=checkpoint) == 0

    expected = fair_extract(checkpoint, fasta, include, repr_layers or [-1], truncation or 1022)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["index.tsv", *(f"{label}.pt" for label in expected)]
    )
    for label, content in expected.items():
        assert_same_content(load(folder / f"{label}.pt"), content)
    assert [(row["label"], row["file"], row["status"]) for row in listed_in(folder)] == [
        (record[1:].strip(), f"{record[1:].strip()}.pt", "computed") for record in records
    ]


def test_every_label_has_a_file_of_its_own(tmp_path: Path) -> None:
    names = {
        "sp|A/B:C": "sp|A%2FB%3AC.pt",
        "tr|A/B:C": None,
        "tr|A%2FB:C": None,  # the one before as it is encoded
        ".hidden": "%2Ehidden.pt",
        "..": "%2E..pt",
        "tab\tin it": "tab%09in it.pt",
        "50% identity.x": "50% identity.x.pt",
        'quoted "name"': 'quoted "name".pt',
        "a" * 200: "a" * 200 + ".pt",
        "b" * 201: None,
        "b" * 202: None,
        "\u00e9" * 150: None,
    }
    fasta, folder = tmp_path / "in.fasta", tmp_path / "out"
    fasta.write_text("".join(f">{label}\nMKV{'A' * n}\n" for n, label in enumerate(names)))
    assert extract(fasta, folder, "--include", "per_tok") == 0

    rows = listed_in(folder)
    assert [row["label"] for row in rows] == list(names)
    assert {row["file"] for row in rows} | {"index.tsv"} == set(files_in(folder))
    assert len(files_in(folder)) == len(names) + 1
    for n, row in enumerate(rows):
        content = load(folder / row["file"])
        assert content["label"] == row["label"]
        assert content["representations"][5].shape[0] == 3 + n
        assert row["file"] == (names[row["label"]] or row["file"])
        assert len(row["file"].encode()) <= 203


def test_names_that_are_alike_are_told_apart() -> None:
    labels = ["abc", "ABC", "Abc", "other", "\u00e9", "e\u0301"]
    sensitive = FileNames([labels[:2], labels[2:]], folds_case=False)
    assert [sensitive.of(label) for label in labels] == [f"{label}.pt" for label in labels]
    folding = FileNames([labels[:2], labels[2:]], folds_case=True)
    names = [folding.of(label) for label in labels]
    assert len({name.casefold() for name in names}) == len(labels)
    assert names[3] == "other.pt"
    assert names[4].removesuffix(".pt")[-16:] != names[5].removesuffix(".pt")[-16:]
    # a label that is what another one's name becomes
    trap = names[0].removesuffix(".pt")
    assert FileNames([[*labels, trap]], folds_case=True).of(trap) != names[0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (">a\nMK<mask>V\n", [], "'<' is not in ESM-2's alphabet"),
        (">\nMKV\n", [], "no ID after '>'"),
        (">a\nMKV\n", ["--repr_layers", "2", "6"], "--repr_layers: layer 6 does not exist"),
        (">a\nMKV\n", ["--repr_layers", "1,2"], "is not a layer"),
        (">a\nMKV\n", ["--include", "max"], "invalid choice: 'max'"),
        (">a\nMKV\n", ["--toks_per_batch", "0"], "not an integer from 1"),
    ],
)
def test_mistakes_leave_no_folder(
    text: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.fasta").write_text(text)
    include = [] if "--include" in options else ["--include", "mean"]
    assert extract(tmp_path / "in.fasta", tmp_path / "out", *include, *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_include_is_required(fasta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract(fasta, fasta.parent / "out") == 2
    assert "--include" in capsys.readouterr().err


def test_repeated_command_says_that_all_is_there(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fasta.parent / "out"
    assert extract(fasta, folder, "--include", "mean") == 0
    said = capsys.readouterr().out
    assert "3 .pt files" in said
    assert "21 residues" in said
    before = files_in(folder)
    assert set(before) == {"a first.pt", "b second.pt", "c.pt", "index.tsv"}

    lost = load(folder / "c.pt")
    (folder / "c.pt").unlink()
    assert extract(fasta, folder, "--include", "mean") == 0
    assert_same_content(load(folder / "c.pt"), lost)
    after = files_in(folder)
    assert {name: after[name] for name in before if name != "c.pt"} == {
        name: before[name] for name in before if name != "c.pt"
    }

    monkeypatch.setattr(ESM2, "embed_packed", None)
    for options in ([], ["--overwrite"]):
        capsys.readouterr()
        assert extract(fasta, folder, "--include", "mean", *options) == 0
        assert capsys.readouterr().out.startswith(f"already complete: {folder} (3 .pt files")
        assert files_in(folder) == after


def test_other_options_are_refused_before_computing(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fasta.parent / "out"
    assert extract(fasta, folder, "--include", "mean") == 0
    before = files_in(folder)
    with monkeypatch.context() as patch:
        patch.setattr(ESM2, "embed_packed", None)
        assert extract(fasta, folder, "--include", "mean", "--repr_layers", "0") == 2
    assert "layers was [5], now [0]" in capsys.readouterr().err
    assert files_in(folder) == before
    assert extract(fasta, folder, "--include", "mean", "--repr_layers", "0", "--overwrite") == 0
    assert set(load(folder / "c.pt")["mean_representations"]) == {0}
    assert set(files_in(folder)) == set(before)


def test_unfinished_run_of_other_options_is_kept(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fasta.parent / "out"

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ESM2, "embed_packed", interrupt)
        assert extract(fasta, folder, "--include", "mean") == 4
        assert "rerun the same command to continue" in capsys.readouterr().err
        assert extract(fasta, folder, "--include", "bos") == 2
        assert "kinds was ['mean'], now ['bos']" in capsys.readouterr().err
    assert extract(fasta, folder, "--include", "bos", "--overwrite") == 0
    assert list(load(folder / "c.pt")) == ["label", "bos_representations"]
    assert set(files_in(folder)) == {"a first.pt", "b second.pt", "c.pt", "index.tsv"}


@pytest.mark.parametrize("name", ["b second.pt", "index.tsv"])
def test_files_of_others_are_left_alone(
    name: str, fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fasta.parent / "out"
    folder.mkdir()
    for each in (name, "notes.pt", "a first"):
        (folder / each).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(ESM2, "embed_packed", None)
        assert extract(fasta, folder, "--include", "mean") == 2
    assert f"{folder / name}: already exists" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        (name, "notes.pt", "a first"), "mine"
    )
    assert extract(fasta, folder, "--include", "mean", "--overwrite") == 0
    assert (folder / "notes.pt").read_text() == (folder / "a first").read_text() == "mine"
    assert [load(folder / row["file"])["label"] for row in listed_in(folder)] == ["a first", "b second", "c"]


def test_file_that_comes_meanwhile_is_left_alone(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, original = fasta.parent / "out", ESM2.embed_packed

    def embed_and_write(self: ESM2, batch: PackedBatch, names: list[str], *rest: Any) -> Any:
        (folder / "b second.pt").write_text("mine")
        return original(self, batch, names, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ESM2, "embed_packed", embed_and_write)
        assert extract(fasta, folder, "--include", "mean") == 2
    assert "b second.pt: already exists" in capsys.readouterr().err
    assert (folder / "b second.pt").read_text() == "mine"
    assert not (folder / "a first.pt").exists()

    monkeypatch.setattr(ESM2, "embed_packed", None)  # what is computed is kept
    assert extract(fasta, folder, "--include", "mean", "--overwrite") == 0
    assert set(files_in(folder)) == {"a first.pt", "b second.pt", "c.pt", "index.tsv"}


def test_the_model_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fair_esm_reference.write_checkpoint(
        tmp_path / "esm2_small.pt", num_layers=1, num_heads=1, head_dim=16
    )
    before = model.read_bytes()
    (tmp_path / "in.fasta").write_text(">esm2_small\nMKV\n")
    options = ["--include", "mean", "--overwrite"]
    assert extract(tmp_path / "in.fasta", tmp_path, *options, model=model) == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_failed_sequences_are_nan_and_reported(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = ESM2.embed_packed

    def fail_one(self: ESM2, batch: PackedBatch, names: list[str], *rest: Any) -> dict[str, torch.Tensor]:
        rows = dict(original(self, batch, names, *rest))
        rows["mean/5"] = rows["mean/5"].masked_fill((batch.cu_seqlens.diff() == 7)[:, None], torch.nan)
        return rows

    monkeypatch.setattr(ESM2, "embed_packed", fail_one)
    folder = fasta.parent / "out"
    for said in ("output", "already complete"):
        assert extract(fasta, folder, "--include", "mean") == 3
        captured = capsys.readouterr()
        assert captured.out.startswith(said)
        assert "1 of 3 sequences are not finite" in captured.err
    assert load(folder / "b second.pt")["mean_representations"][5].isnan().all()
    assert not load(folder / "c.pt")["mean_representations"][5].isnan().any()
    assert [row["status"] for row in listed_in(folder)] == ["computed", "failed", "computed"]
    assert listed_in(folder)[1]["reason"]


def test_records_left_out_are_listed(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a one\nMKV\n>b two\nMK1\n>c\nMMM\n")
    folder = tmp_path / "out"
    assert extract(tmp_path / "in.fasta", folder, "--include", "mean", "--invalid", "skip") == 0
    rows = [(row["label"], row["file"], row["status"]) for row in listed_in(folder)]
    assert rows == [("a one", "a one.pt", "computed"), ("c", "c.pt", "computed"), ("b two", "", "left out")]
    assert "in.fasta, line 4" in listed_in(folder)[2]["reason"]


OPTIONS = ("--include", "per_tok", "mean", "--repr_layers", "0", "-1")


def start(nursery: Nursery, fasta: Path, folder: Path, number: int, *options: str, patch: str = "") -> Child:
    """Extract in a process of its own; each record is a shard."""
    log = fasta.parent / f"{number}.log"
    command = ["extract", "demo", str(fasta), str(folder), "--nogpu", "--threads", "1"]
    job = {
        "arguments": [*command, "--toks_per_batch", "64", *OPTIONS, *options],
        "log": str(log),
        "flops_per_shard": 1.0,
        "patch": patch,
        "changes": {},
    }
    return Child(nursery, nursery.server.start(job), log)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


@pytest.mark.parametrize("options", [pytest.param((), marks=pytest.mark.slow), ("--overwrite",)])  # 2 s
def test_killed_and_repeated(options: tuple[str, ...], nursery: Nursery, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([30] * 12, seed=3))
    undisturbed = tmp_path / "undisturbed"
    child = start(nursery, fasta, undisturbed, 0)
    assert child.wait() == 0, child.output()
    expected = contents_of(undisturbed)
    assert len(expected) == 13
    folder = tmp_path / "out"
    if options:  # of which one is replaced
        folder.mkdir()
        (folder / "protein11.pt").write_text("mine")

    child = start(nursery, fasta, folder, 1, *options, patch=SLOW.format(seconds=0.1))
    wait_until(lambda: len(list(folder.glob(".*.run/shards/*.shard"))) >= 3)
    assert child.kill() == -9
    assert not (folder / "protein0.pt").exists()

    child = start(nursery, fasta, folder, 2, *options, patch=SLOW_WRITING)
    wait_until(lambda: (folder / "protein2.pt").exists())
    assert child.kill() == -9
    assert "continuing: " in child.output()
    written = {name: state for name, state in files_in(folder).items() if name.endswith(".pt")}
    (folder / "protein1.pt").write_bytes(b"")  # as a machine that loses its power may leave it

    child = start(nursery, fasta, folder, 3, *options, patch=NO_COMPUTING)
    assert child.wait() == 0, child.output()
    assert contents_of(folder) == expected
    after = files_in(folder)
    for name in written.keys() - {"protein1.pt", "protein11.pt"}:
        assert after[name] == written[name]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((), 4),
        (("--overwrite",), 4),
        pytest.param((), None, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(("--overwrite",), None, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_killed_at_any_step_and_repeated(
    options: tuple[str, ...], steps: int | None, nursery: Nursery, tmp_path: Path
) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([30] * 3, seed=3))
    new = tmp_path / "new"
    new.mkdir()
    if options:
        (new / "protein1.pt").write_text("mine")
    child = start(nursery, fasta, new, 0, *options, patch=DIE_AT_STEP.format(step=0, only=str(tmp_path)))
    assert child.wait() == 0, child.output()
    expected, total = contents_of(new), int(child.output().rpartition("steps ")[2])
    assert len(expected) == 4
    chosen = range(1, total + 1)
    faults = []
    for step in random.Random(1).sample(chosen, steps) if steps else chosen:
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        (folder / "notes.pt").write_text("mine")
        if options:
            (folder / "protein1.pt").write_text("mine")
        patch = DIE_AT_STEP.format(step=step, only=str(tmp_path))
        child = start(nursery, fasta, folder, step, *options, patch=patch)
        code = child.wait()
        died = child.output().strip().splitlines()[-1]
        again = start(nursery, fasta, folder, step, *options)
        if code not in (-9, 0) or again.wait() != 0:
            faults.append(f"{died}: {again.output()}")
        elif contents_of(folder) != expected | {"notes.pt": b"mine"}:
            faults.append(f"{died}: left {sorted(contents_of(folder))}")
    assert not faults, "\n".join(faults)


def test_two_processes_do_not_disturb_each_other(nursery: Nursery, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([30] * 5, seed=3))
    folder = tmp_path / "out"
    first = start(nursery, fasta, folder, 0, patch=SLOW_WRITING)
    wait_until(lambda: (folder / "protein1.pt").exists())
    second = start(nursery, fasta, folder, 1)
    assert second.wait() == 2, second.output()
    assert "is in use by process" in second.output()
    assert first.wait() == 0, first.output()
    assert len(files_in(folder)) == 6
