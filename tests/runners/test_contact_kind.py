"""`embed --include contacts`: what is stored is fair-esm's contact map, however it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fair_esm_reference
import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from proteins import write_fasta

import esm_packed
from esm_packed import ESM2, layouts, model
from esm_packed.contacts import ContactSums, upper_triangle
from esm_packed.contacts import forward as forward_with_contacts
from esm_packed.errors import UsageError
from esm_packed.packing import PackedBatch
from esm_packed.runners.checks import check_device
from esm_packed.runners.cli.main import main
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state import cut
from esm_packed.runners.state.request import EmbedRequest

LENGTHS = (70, 1, 2, 3, 129, 15, 16, 17, 64)
MAX_LENGTH = 120
LAYOUTS = {"packed": (), "fixed": ("--reproducible",), "padded": ("--disable-packing",)}

Maps = list[npt.NDArray[np.floating[Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "esm2_contacts.pt"
    return fair_esm_reference.write_checkpoint(path, num_layers=2, num_heads=3, head_dim=16)


@pytest.fixture(scope="module")
def proteins() -> list[str]:
    """One is cut at MAX_LENGTH, and two are there twice."""
    proteins = fair_esm_reference.random_sequences(LENGTHS, seed=5)
    return [*proteins, proteins[0], proteins[4]]


@pytest.fixture(scope="module")
def truth(checkpoint: Path, proteins: list[str]) -> dict[str, Maps]:
    """fair-esm's in FP64 and FP32."""
    found = {}
    for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        fair = fair_esm_reference.load(checkpoint, dtype)
        with fair_esm_reference.faithful(dtype):
            found[name] = [
                fair.predict_contacts(
                    torch.tensor([[0, *fair_esm_reference.ALPHABET.encode(protein[:MAX_LENGTH]), 2]])
                )[0].numpy()
                for protein in proteins
            ]
    return found


def embed(
    folder: Path, checkpoint: Path, proteins: Sequence[str], *options: str, code: int = 0, name: str = "out"
) -> Path:
    fasta, output = write_fasta(folder / "in.fasta", proteins), folder / f"{name}.h5"
    arguments = ["embed", str(fasta), "-o", str(output), "--model", str(checkpoint), "--device", "cpu"]
    arguments += ["--threads", "1", "--quiet", "--force"]
    if "--windows" not in options:
        arguments += ["--max-length", str(MAX_LENGTH)]
    assert main([*arguments, "--token-budget", "100", *options]) == code
    return output


def stored(output: Path) -> Maps:
    """Maps of all sequences, by plain h5py."""
    found = []
    with h5py.File(output) as file:
        assert file["contacts"].ndim == 1
        for start, length in zip(file["pair_starts"][:], file["embedded_lengths"][:], strict=True):
            upper = np.triu_indices(length)
            matrix = np.zeros((length, length), file["contacts"].dtype)
            matrix[upper] = file["contacts"][start : start + length * (length + 1) // 2]
            found.append(np.triu(matrix, 1).T + matrix)
    return found


def error(maps: Maps, truth: Maps) -> float:
    """Relative L2 error over all proteins."""
    squares = [(float(((m - t) ** 2).sum()), float((t**2).sum())) for m, t in zip(maps, truth, strict=True)]
    return float(np.sqrt(sum(s for s, _ in squares) / sum(t for _, t in squares)))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_stored_is_fair_esms_map(
    tmp_path: Path,
    checkpoint: Path,
    proteins: list[str],
    truth: dict[str, Maps],
    layout: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, packs = ESM2.forward, []

    def counted(self: ESM2, batch: PackedBatch, *rest: Any) -> model.PackedOutput:
        packs.append(batch.num_sequences)
        return forward(self, batch, *rest)

    monkeypatch.setattr(ESM2, "forward", counted)
    output = embed(tmp_path, checkpoint, proteins, "--include", "mean,contacts", *layout)
    assert sum(packs) == len(LENGTHS), "means and contacts are of one pass"
    assert max(packs) > 1
    maps = stored(output)
    assert error(maps, truth["fp64"]) <= 1.5 * error(truth["fp32"], truth["fp64"])
    assert np.concatenate([each.ravel() for each in truth["fp64"]]).std() > 1e-2
    with esm_packed.open(output) as embeddings:
        for name, each in zip(embeddings.ids, maps, strict=True):
            np.testing.assert_array_equal(embeddings.contacts(name), each)
        means = embeddings.mean()
    with h5py.File(output) as file:
        starts = file["pair_starts"][:]
        assert starts[9] == starts[0] and starts[10] == starts[4], "identical sequences share rows"
        assert "starts" not in file
    alone = embed(tmp_path, checkpoint, proteins, *layout, name="means")
    with esm_packed.open(alone) as embeddings:
        np.testing.assert_array_equal(embeddings.mean(), means)


def test_fp16_is_what_fp32_is_rounded_to(tmp_path: Path, checkpoint: Path, proteins: list[str]) -> None:
    include = ("--include", "contacts")
    singles = stored(embed(tmp_path, checkpoint, proteins, *include))
    halves = stored(embed(tmp_path, checkpoint, proteins, *include, "--store-dtype", "fp16", name="half"))
    for half, single in zip(halves, singles, strict=True):
        np.testing.assert_array_equal(half, single.astype(np.float16))


def test_slices_parts_and_reuse_give_the_same_maps(
    tmp_path: Path, checkpoint: Path, proteins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    include = ("--include", "per_residue,contacts", "--reproducible")
    whole = embed(tmp_path, checkpoint, proteins, *include)
    expected = stored(whole)
    monkeypatch.setitem(cut.FLOPS_PER_SHARD, "cpu", 1.0)
    assert not embed(tmp_path, checkpoint, proteins, *include, "--slice", "1/2", name="slices").exists()
    sliced = embed(tmp_path, checkpoint, proteins, *include, "--slice", "0/2", name="slices")
    parts = embed(tmp_path, checkpoint, proteins, *include, "--parts", name="parts")
    reused = embed(tmp_path, checkpoint, proteins, *include, "--reuse", str(parts), name="reused")
    for output in (sliced, parts, reused):
        for actual, truth in zip(stored(output), expected, strict=True):
            np.testing.assert_array_equal(actual, truth)
    with EmbeddingReader(parts) as reader:
        assert reader.parts
        assert reader.values("contacts").shape == (
            sum(n * (n + 1) // 2 for n in map(len, expected[: len(LENGTHS)])),
        )


def test_packs_are_limited_by_what_contacts_take(
    tmp_path: Path, checkpoint: Path, proteins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored(embed(tmp_path, checkpoint, proteins, "--include", "contacts"))
    init, sizes = ContactSums.__init__, []

    def measured(self: ContactSums, *arguments: Any) -> None:
        init(self, *arguments)
        batch: PackedBatch = arguments[2]
        sizes.append((batch.num_sequences, self._scores.numel()))

    monkeypatch.setattr(ContactSums, "__init__", measured)
    monkeypatch.setattr(layouts, "MOST_PAIRS", 2_000)
    output = embed(tmp_path, checkpoint, proteins, "--include", "contacts", name="limited")
    assert len(sizes) > 3 and any(count > 1 for count, _ in sizes)
    assert all(size <= 2_000 for count, size in sizes if count > 1)
    for actual, truth in zip(stored(output), expected, strict=True):
        np.testing.assert_allclose(actual, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_not_finite_is_computed_in_fp32_or_its_protein_fails(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    proteins = ["MKTLLAGVSE", "MKVLW", "WMKTLLAGVSEMKTLL", "MMMRPQ"]
    sound = stored(embed(tmp_path, checkpoint, proteins, "--include", "contacts"))

    def broken(self: ESM2, batch: PackedBatch, *rest: Any) -> tuple[model.PackedOutput, list[torch.Tensor]]:
        output, maps = forward_with_contacts(self, batch, *rest)
        if fails or self.precision == "bf16":
            for (first, last), each in zip(batch.residue_bounds.tolist(), maps, strict=True):
                if 22 in batch.input_ids[first:last]:  # W
                    each[-1, -1] = torch.nan
        return output, maps

    monkeypatch.setattr(model, "forward_with_contacts", broken)
    options = ("--include", "contacts", "--dtype", "bf16")
    output = embed(tmp_path, checkpoint, proteins, *options, code=3 if fails else 0, name="broken")
    with esm_packed.open(output) as embeddings:
        statuses = [embeddings.status(name) for name in embeddings.ids]
        changed = "failed" if fails else "recomputed"
        assert statuses == ["computed", changed, changed, "computed"]
        for name, truth, status in zip(embeddings.ids, sound, statuses, strict=True):
            if status == "failed":
                assert np.isnan(embeddings.contacts(name)).all()
            else:
                tolerance = 1e-5 if status == "recomputed" else 0.1
                np.testing.assert_allclose(embeddings.contacts(name), truth, atol=tolerance)


def test_contacts_are_compared_with_fp32(tmp_path: Path, checkpoint: Path, proteins: list[str]) -> None:
    options = ("--include", "contacts", "--dtype", "bf16", "--fp32-compare", "3")
    with EmbeddingReader(embed(tmp_path, checkpoint, proteins, *options)) as reader:
        compared = [each.comparison for each in reader.comparisons()]
    assert len(compared) == 3
    assert all(each.cosine > 0.9 and 0 < each.max_error < 0.2 for each in compared)


def test_windows_and_graphs_have_no_contacts(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(tmp_path, checkpoint, ["MKTLLAGVSE"], "--include", "contacts", "--windows", "40", code=2)
    message = "--windows with --include contacts: windows support only mean and per_residue"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
    request = EmbedRequest(
        ("in.fasta",), tmp_path / "out.h5", layout="fixed", cuda_graphs=True, kinds=("mean", "contacts")
    )
    with pytest.raises(UsageError, match="--cuda-graphs cannot be combined with --include contacts"):
        check_device(request, torch.device("cuda"))


def test_a_model_without_contact_regression_is_refused_before_it_computes(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "esm2_other.pt"
    other.write_bytes(checkpoint.read_bytes())
    embed(tmp_path, other, ["MKTLLAGVSE"])
    embed(tmp_path, other, ["MKTLLAGVSE"], "--include", "contacts", code=2, name="contacts")
    assert "put the file NAME-contact-regression.pt next to NAME.pt" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 1, 5, 511, 512, 513, 1100])
def test_the_upper_triangle_is_that_of_numpy(size: int) -> None:
    matrix = torch.arange(size * (size + 3)).view(size, size + 3)[:, 2 : size + 2]
    expected = matrix.numpy()[np.triu_indices(size)]
    np.testing.assert_array_equal(upper_triangle(matrix).numpy(), expected)
