"""Kinds of output, from a FASTA file to the rows on disk, against fair-esm and the definitions.

Contacts have tests of their own, in test_contact_kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fair_esm_reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from proteins import write_fasta

import esm_packed
from esm_packed import ESM2, outputs
from esm_packed.alphabet import encode
from esm_packed.model import PackedOutput
from esm_packed.outputs import is_ragged, output_names
from esm_packed.packing import PackedBatch, pack
from esm_packed.runners.cli.main import main
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_FAILED, STATUS_RECOMPUTED
from esm_packed.windows import Blend, Windows

KINDS = [kind for kind in outputs.KINDS if kind != "contacts"]
NUM_LAYERS = 3
LAYERS = (0, 2, 3)
ALL_KINDS = ("--include", ",".join(KINDS), "--layers", ",".join(map(str, LAYERS)))
LENGTHS = (129, 1, 2, 15, 16, 17, 63, 64, 65, 300, *range(3, 83, 2), 1300, 2000)
ROUNDING = float(np.finfo(np.float32).eps) / 2
LAYOUTS = {"packed": (), "fixed": ("--reproducible",), "padded": ("--disable-packing",)}

Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "esm2_kinds.pt"
    return fair_esm_reference.write_checkpoint(path, num_layers=NUM_LAYERS, num_heads=4, head_dim=16)


@dataclass(frozen=True)
class Fair:
    """fair-esm in FP64 and FP32.

    Args:
        models: by name of the precision.
    """

    models: Mapping[str, Any]

    def outputs(self, sequences: Sequence[str], dtype: str) -> list[Outputs]:
        """All kinds and layers of each sequence on its own, in FP64, from their definitions."""
        found = []
        for sequence, result in zip(
            sequences, fair_esm_reference.run(self.models[dtype], sequences), strict=True
        ):
            logits = result["logits"][1:-1]
            tokens = torch.tensor(fair_esm_reference.ALPHABET.encode(sequence))[:, None]
            log_likelihoods = logits.log_softmax(1).gather(1, tokens)
            columns = [fair_esm_reference.ALPHABET.get_idx(letter) for letter in "LAGVSERTIDPKQNFYMHWC"]
            outputs = {
                "logits": logits[:, columns],
                "logits_all": logits,
                "unmasked_nll": -log_likelihoods.mean(0),
            }
            for layer, rows in result["representations"].items():
                outputs |= {
                    f"mean/{layer}": rows[1:-1].mean(0),
                    f"max/{layer}": rows[1:-1].max(0).values,
                    f"bos/{layer}": rows[0],
                    f"per_residue/{layer}": rows[1:-1],
                }
            found.append({name: values.double().numpy() for name, values in outputs.items()})
        return found


@pytest.fixture(scope="module")
def fair(checkpoint: Path) -> Fair:
    dtypes = {"fp64": torch.float64, "fp32": torch.float32}
    return Fair({name: fair_esm_reference.load(checkpoint, dtype) for name, dtype in dtypes.items()})


@pytest.fixture(scope="module")
def proteins() -> list[str]:
    """Lengths 1 to 2,000, with the letters for residues that are not one of the 20; two are there twice."""
    proteins = fair_esm_reference.random_sequences(LENGTHS, seed=1)
    return [*proteins, proteins[9], proteins[0]]


@pytest.fixture(scope="module")
def expected(fair: Fair, proteins: list[str]) -> tuple[list[Outputs], list[Outputs]]:
    """Of `proteins` in FP32 and in FP64."""
    return fair.outputs(proteins, "fp32"), fair.outputs(proteins, "fp64")


def embed(folder: Path, checkpoint: Path, proteins: Sequence[str], *options: str, code: int = 0) -> Path:
    fasta, output = write_fasta(folder / "in.fasta", proteins), folder / "out.h5"
    arguments = ["embed", str(fasta), "-o", str(output), "--model", str(checkpoint), "--device", "cpu"]
    arguments += ["--token-budget", "512", "--threads", "1", "--quiet", "--force"]
    if "--windows" not in options:
        arguments += ["--max-length", "0"]
    assert main([*arguments, *options]) == code
    return output


def read(output: Path) -> list[Outputs]:
    """All that there is of each sequence."""
    with EmbeddingReader(output) as reader:
        names = output_names(reader.kinds, reader.layers)
        parsed = [(name, *name.partition("/")[::2]) for name in names]
        return [
            {
                name: np.atleast_1d(reader.value(row, kind, int(layer) if layer else None))
                for name, kind, layer in parsed
            }
            for row in range(reader.num_sequences)
        ]


def errors(actual: Sequence[Outputs], truth: Sequence[Outputs]) -> dict[str, float]:
    """By name, the relative L2 error over all sequences, which have the same shapes."""
    found = {}
    for name in actual[0]:
        for one, other in zip(actual, truth, strict=True):
            assert one[name].shape == other[name].shape, name
        difference = [one[name].astype(float) - other[name] for one, other in zip(actual, truth, strict=True)]
        norm = np.linalg.norm(np.concatenate([other[name].ravel() for other in truth]))
        found[name] = float(np.linalg.norm(np.concatenate([each.ravel() for each in difference])) / norm)
    return found


def assert_as_close_as_fair_esm(
    actual: Sequence[Outputs], in_fp32: Sequence[Outputs], truth: Sequence[Outputs], roundings: int = 0
) -> None:
    """The error is at most 1.5 times that of fair-esm in FP32, and so many roundings to FP32."""
    own, theirs = errors(actual, truth), errors([{n: f[n] for n in actual[0]} for f in in_fp32], truth)
    allowed = {name: 1.5 * theirs[name] + roundings * ROUNDING for name in own}
    assert not {name: (own[name], allowed[name]) for name in own if not own[name] <= allowed[name]}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_those_of_fair_esm(
    tmp_path: Path,
    checkpoint: Path,
    proteins: list[str],
    expected: tuple[list[Outputs], list[Outputs]],
    layout: tuple[str, ...],
) -> None:
    output = embed(tmp_path, checkpoint, proteins, *ALL_KINDS, *layout)
    found = read(output)
    assert found[0].keys() == set(output_names(KINDS, LAYERS))
    assert_as_close_as_fair_esm(found, *expected)
    with EmbeddingReader(output) as reader:
        starts, lengths = reader.starts(), reader.column("embedded_lengths")
        assert starts[-2] == starts[9] and starts[-1] == starts[0], "identical sequences share rows"
        assert lengths.tolist() == list(map(len, proteins))
        assert len(reader.values("per_residue", 0)) == lengths[:-2].sum()
    for name, rows in found[-1].items():
        np.testing.assert_array_equal(rows, found[0][name])


def test_masks_and_gaps_are_those_of_fair_esm(checkpoint: Path, fair: Fair) -> None:
    """A FASTA file has none; the model computes them."""
    random = fair_esm_reference.random_sequences([129, 5, *range(20, 60)], 2, "LAGVSERTIDPKQNFYMHWCXBUZO.-")
    random[0] = random[0][:60] + "<mask>" * 50 + random[0][60:]
    sequences = ["<mask>" * 7, "M<mask>", *random]
    batch, names = pack([encode(sequence) for sequence in sequences]), output_names(KINDS, LAYERS)
    model = ESM2.from_pretrained(checkpoint, device="cpu", dtype="fp32")
    outputs = {name: values.numpy() for name, values in model.embed_packed(batch, names).items()}
    found = [
        {name: outputs[name][first:last] if is_ragged(name) else outputs[name][row] for name in names}
        for row, (first, last) in enumerate(batch.residue_bounds.tolist())
    ]
    in_fp32, truth = fair.outputs(sequences, "fp32"), fair.outputs(sequences, "fp64")
    assert_as_close_as_fair_esm(found, in_fp32, truth, roundings=1)  # BOS in layer 0 is one product


def test_fp16_is_what_fp32_is_rounded_to(tmp_path: Path, checkpoint: Path, proteins: list[str]) -> None:
    for store_dtype in ("fp32", "fp16"):
        (tmp_path / store_dtype).mkdir()
        embed(tmp_path / store_dtype, checkpoint, proteins[:20], *ALL_KINDS, "--store-dtype", store_dtype)
    halves, singles = read(tmp_path / "fp16" / "out.h5"), read(tmp_path / "fp32" / "out.h5")
    for half, single in zip(halves, singles, strict=True):
        for name, rows in half.items():
            assert rows.dtype == ("float32" if name == "unmasked_nll" else "float16")
            np.testing.assert_array_equal(rows, single[name].astype(rows.dtype))


def make_not_finite(monkeypatch: pytest.MonkeyPatch, value: float, is_broken: Callable[[ESM2], bool]) -> None:
    """Make one number of each tryptophan's rows `value` in some models."""
    forward = ESM2.forward

    def broken(self: ESM2, batch: PackedBatch, *rest: Any) -> PackedOutput:
        output = forward(self, batch, *rest)
        if not is_broken(self):
            return output
        where = (batch.input_ids == int(encode("W")[0])).nonzero().ravel()

        def spoiled(rows: torch.Tensor) -> torch.Tensor:
            rows = rows.clone()
            rows[where, -5] = value
            return rows

        representations = {layer: spoiled(rows) for layer, rows in output.representations.items()}
        logits = None if output.logits is None else spoiled(output.logits)
        return replace(output, representations=representations, logits=logits)

    monkeypatch.setattr(ESM2, "forward", broken)


WITH_TRYPTOPHAN = ["MKTLLAGVSE", "MKVLW", "MMMRPQ", "WMKTLLAGVSEMKTLLAGVSEMKTLLAGVSEMKTLLAGVSE"]
IS_BROKEN = np.array([False, True, False, True])


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["NaN", "Inf"])
@pytest.mark.parametrize(
    "options",
    [
        ("--include", "mean,per_residue", "--layers", "1,3"),
        ("--include", "max"),
        ("--include", "logits_all"),
        ("--include", "unmasked_nll"),
        ("--include", "per_residue", "--parts", "--store-dtype", "fp16"),
        ("--include", "mean,per_residue", "--windows", "16", "--overlap", "4"),
    ],
    ids=lambda options: " ".join(options),
)
def test_a_residue_that_is_not_finite_is_computed_in_fp32_or_its_protein_fails(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, value: float, options: tuple[str, ...]
) -> None:
    for name in ("sound", "rescued", "failed"):
        (tmp_path / name).mkdir()
    sound = read(embed(tmp_path / "sound", checkpoint, WITH_TRYPTOPHAN, *options))
    make_not_finite(monkeypatch, value, lambda model: model.precision == "bf16")
    output = embed(tmp_path / "rescued", checkpoint, WITH_TRYPTOPHAN, *options, "--dtype", "bf16")
    with EmbeddingReader(output) as reader:
        expected = np.where(IS_BROKEN, STATUS_RECOMPUTED, STATUS_COMPUTED)
        np.testing.assert_array_equal(reader.column("status"), expected)
    for rows, truth, is_rescued in zip(read(output), sound, IS_BROKEN, strict=True):
        for name in truth:
            error = np.linalg.norm(rows[name].astype(float) - truth[name]) / np.linalg.norm(truth[name])
            assert error < (1e-3 if "fp16" in options else 1e-5) if is_rescued else error < 0.1, name

    monkeypatch.undo()
    make_not_finite(monkeypatch, value, lambda model: True)
    output = embed(tmp_path / "failed", checkpoint, WITH_TRYPTOPHAN, *options, code=3)
    with esm_packed.open(output) as embeddings:
        assert list(embeddings.missing) == ["protein1", "protein3"]
        assert "not finite" in embeddings.missing["protein1"]
        assert embeddings.status("protein3") == "failed"
    for rows, truth, has_failed in zip(read(output), sound, IS_BROKEN, strict=True):
        for name in truth:
            if has_failed:
                assert np.isnan(rows[name]).all() and rows[name].shape == truth[name].shape
            else:
                np.testing.assert_allclose(rows[name], truth[name], rtol=1e-4, atol=1e-5)
    assert STATUS_FAILED not in expected


def in_windows(fair: Fair, sequence: str, dtype: str, size: int, overlap: int) -> Outputs:
    """Means and residues as `--windows` defines them, residue by residue."""
    length = len(sequence)
    if length <= size:
        return {
            name: values
            for name, values in fair.outputs([sequence], dtype)[0].items()
            if name.startswith(("mean/", "per_residue/"))
        }
    starts: list[int] = []
    while (start := len(starts) * (size - overlap)) + size < length:
        starts.append(start)
    starts.append(length - size)
    windows = fair.outputs([sequence[start : start + size] for start in starts], dtype)
    outputs: Outputs = {}
    for layer in range(NUM_LAYERS + 1):
        rows = np.zeros((length, windows[0]["bos/0"].shape[0]))
        for residue in range(length):
            total = 0.0
            for start, window in zip(starts, windows, strict=True):
                place = residue - start
                if not 0 <= place < size:
                    continue
                weight = 1.0
                if start > 0:
                    weight = min(weight, (place + 1) / (overlap + 1))
                if start + size < length:
                    weight = min(weight, (size - place) / (overlap + 1))
                rows[residue] += weight * window[f"per_residue/{layer}"][place]
                total += weight
            rows[residue] /= total
        outputs |= {f"per_residue/{layer}": rows, f"mean/{layer}": rows.mean(0)}
    return outputs


@pytest.mark.parametrize("size, overlap, layout", [(40, 9, "packed"), (40, 0, "fixed"), (16, 8, "padded")])
def test_windows_are_blended_as_documented(
    tmp_path: Path, checkpoint: Path, fair: Fair, size: int, overlap: int, layout: str
) -> None:
    step = size - overlap
    lengths = [1, size - 1, size, size + 1, size + step - 1, size + step, size + step + 1, 2 * size, 333]
    proteins = fair_esm_reference.random_sequences([*lengths, *range(size, 3 * size, 3)], seed=3)
    layers = ("--include", "mean,per_residue", "--layers", "0,2,3")
    window = ("--windows", str(size), "--overlap", str(overlap))
    found = read(embed(tmp_path, checkpoint, proteins, *layers, *window, *LAYOUTS[layout]))
    in_fp32, truth = (
        [in_windows(fair, protein, dtype, size, overlap) for protein in proteins]
        for dtype in ("fp32", "fp64")
    )
    assert_as_close_as_fair_esm(found, in_fp32, truth, roundings=1)  # the loop blends in FP64


@pytest.mark.parametrize("fails", [False, True])
def test_windows_that_do_not_fit_into_memory_are_halved_or_their_protein_fails(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    proteins = fair_esm_reference.random_sequences([100, 10, 160, 131], 4, "LAGVSERTIDPKQNFYMH")
    proteins[2] = proteins[2][:70] + "W" + proteins[2][71:]
    options = ("--include", "mean,per_residue", "--windows", "40", "--overlap", "10")
    for name in ("sound", "limited"):
        (tmp_path / name).mkdir()
    sound = read(embed(tmp_path / "sound", checkpoint, proteins, *options))
    forward, sizes = ESM2.forward, []

    def limited(self: ESM2, batch: PackedBatch, *rest: Any) -> PackedOutput:
        sizes.append(batch.num_sequences)
        if batch.total_tokens > 100 or (fails and (batch.input_ids == int(encode("W")[0])).any()):
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, batch, *rest)

    monkeypatch.setattr(ESM2, "forward", limited)
    output = embed(tmp_path / "limited", checkpoint, proteins, *options, code=3 * fails)
    assert max(sizes) > 2 and 1 in sizes
    found = read(output)
    with esm_packed.open(output) as embeddings:
        assert list(embeddings.missing) == ["protein2"] * fails
        if fails:
            assert (
                "40 residues do not fit into the memory of cpu; use smaller" in embeddings.missing["protein2"]
            )
            assert all(np.isnan(rows).all() for rows in found.pop(2).values())
            sound.pop(2)
    assert max(errors(found, sound).values()) < 1e-6


@pytest.mark.parametrize("kind", ["max", "bos", "logits", "logits_all", "unmasked_nll"])
def test_a_protein_in_windows_has_no_other_kinds(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    embed(tmp_path, checkpoint, ["MKT"], "--windows", "16", "--overlap", "4", "--include", kind, code=2)
    assert f"--windows with --include {kind}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--overlap", "4"), "--overlap 4: needs --windows"),
        (("--windows", "16", "--max-length", "0"), "--windows and --max-length cannot be combined"),
    ],
)
def test_options_of_windows_that_do_not_fit(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    embed(tmp_path, checkpoint, ["MKT"], *options, code=2)
    assert message in capsys.readouterr().err


@st.composite
def windows_and_length(draw: st.DrawFn) -> tuple[Windows, int]:
    size = draw(st.integers(2, 60))
    windows = Windows(size, draw(st.integers(0, size // 2)))
    return windows, draw(st.integers(1, 400))


@given(windows_and_length())
def test_windows_cover_a_protein(case: tuple[Windows, int]) -> None:
    windows, length = case
    starts = windows.starts(length)
    assert windows.num_residues(np.array([length, 1])).tolist() == [
        len(starts) * min(windows.size, length),
        1,
    ]
    assert starts[0] == 0
    if length <= windows.size:
        assert starts == [0]
        return
    assert starts[-1] + windows.size == length
    shared = windows.size - np.diff(starts)
    assert (shared >= windows.overlap).all() and (shared < windows.size).all()
    sums = np.zeros(length)
    for start in starts:
        weights = windows.weights(start, length)
        assert weights.shape == (windows.size,) and (weights > 0).all() and (weights <= 1).all()
        sums[start : start + windows.size] += weights
    assert (sums > 0).all()


@given(windows_and_length(), st.randoms())
def test_what_all_windows_agree_on_is_what_is_blended(case: tuple[Windows, int], random: Any) -> None:
    windows, length = case
    starts = windows.starts(length)
    if length <= windows.size:
        return
    residues = np.random.default_rng(length).standard_normal((length, 3)).astype(np.float32)
    blend = Blend(windows, length)
    random.shuffle(starts)
    are_last = [
        blend.add(start, {"per_residue/1": residues[start : start + windows.size]}) for start in starts
    ]
    assert are_last == [False] * (len(starts) - 1) + [True]
    outputs = blend.outputs(["mean/1", "per_residue/1"])
    np.testing.assert_allclose(outputs["per_residue/1"], residues, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["mean/1"], residues.mean(0), rtol=1e-4, atol=1e-6)
