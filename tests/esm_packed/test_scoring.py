"""Scores of variants: equal to a loop over fair-esm 2.0.0 written from the definition, whatever is packed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import fair_esm_reference
import numpy as np
import numpy.typing as npt
import pytest
import torch

from esm_packed import ESM2
from esm_packed.alphabet import AMINO_ACIDS, encode
from esm_packed.checkpoints import load_checkpoint, save_fair_esm
from esm_packed.outputs import LOG_PROBABILITIES
from esm_packed.packing import PackedBatch, pack
from esm_packed.scoring import Query, optimal_window, plan_queries, pseudo_likelihood

Rows = npt.NDArray[np.floating[Any]]

COLUMNS = [fair_esm_reference.ALPHABET.get_idx(letter) for letter in AMINO_ACIDS]
MASK = fair_esm_reference.ALPHABET.mask_idx


@dataclass(frozen=True)
class Fair:
    """fair-esm in FP64, one protein at a time, and what is held to it in `dtype`, by `tolerance` nats."""

    checkpoint: Path
    dtype: str
    tolerance: float

    def model(self, dtype: str = "") -> ESM2:
        return _load(self.checkpoint, dtype or self.dtype)

    def rows(self, sequence: str, masked: Iterable[int] = (), dtype: torch.dtype = torch.float64) -> Rows:
        """(num_residues, 20) log-probabilities; residue i of the protein is token i + 1, behind BOS."""
        tokens = [fair_esm_reference.ALPHABET.cls_idx]
        tokens += fair_esm_reference.ALPHABET.encode(sequence)
        tokens += [fair_esm_reference.ALPHABET.eos_idx]
        for site in masked:
            tokens[1 + site] = MASK
        fair = _load_fair(self.checkpoint, dtype)
        with fair_esm_reference.faithful(dtype):
            logits = fair(torch.tensor([tokens]))["logits"][0]
        return logits.double().log_softmax(-1)[1:-1, COLUMNS].numpy()

    def masked(self, sequence: str) -> Rows:
        """(num_residues, 20), each residue masked in turn."""
        return _masked(self, sequence)


@cache
def _load(checkpoint: Path, dtype: str) -> ESM2:
    return ESM2.from_pretrained(checkpoint, dtype=dtype, device="cpu")


@cache
def _masked(fair: Fair, sequence: str) -> Rows:
    length = len(fair_esm_reference.ALPHABET.encode(sequence))
    return np.stack([fair.rows(sequence, [site])[site] for site in range(length)])


@cache
def _load_fair(checkpoint: Path, dtype: torch.dtype) -> Any:
    return fair_esm_reference.load(checkpoint, dtype)


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> Fair:
    path = tmp_path_factory.mktemp("checkpoint") / "esm2_seeded.pt"
    fair_esm_reference.write_checkpoint(path, num_layers=2, num_heads=3, head_dim=16)
    return Fair(path, "fp64", 1e-8)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Fair:
    """Of trained weights, whose logits are of ordinary size: FP32 is judged by them."""
    path = tmp_path_factory.mktemp("checkpoint") / "esm2_demo.pt"
    save_fair_esm(load_checkpoint("demo"), path)
    return Fair(path, "fp32", 1e-5)


@pytest.fixture(params=["fair", "demo"], ids=["seeded fp64", "demo fp32"])
def each(request: pytest.FixtureRequest) -> Fair:
    made: Fair = request.getfixturevalue(request.param)
    return made


def proteins() -> list[str]:
    """Beginnings of real ones: with other residues than the 20, of one residue, with masks already there."""
    return ["MQIFXUVKTLTGKTI", "M", "MKTAYIAK<mask><mask>QRQISFVK", "GIVEQCCTSICSLYQLENYCN"]


@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_log_probabilities_are_those_of_fair_esm(each: Fair, token_budget: int) -> None:
    """All copies of all proteins in one pack, or each alone: token dropout is that of each copy."""
    model = each.model()
    for method, truth in (("masked", each.masked), ("wild-type", each.rows)):
        actual = model.log_probabilities(proteins(), method=method, token_budget=token_budget)
        for rows, sequence in zip(actual, proteins(), strict=True):
            assert rows.dtype == (np.float64 if each.dtype == "fp64" else np.float32)
            np.testing.assert_allclose(rows, truth(sequence), rtol=0, atol=each.tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_types_are_within_twice_the_error_of_fair_esm(demo: Fair, dtype: torch.dtype) -> None:
    model = demo.model({torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    sequences = proteins()
    (masked,) = model.log_probabilities(sequences[:1])
    actual = [masked, *model.log_probabilities(sequences, method="wild-type")]
    truth = [demo.masked(sequences[0]), *map(demo.rows, sequences)]
    alone = [demo.rows(sequences[0], [site], dtype)[site] for site in range(len(masked))]
    same_dtype = [np.stack(alone), *(demo.rows(sequence, dtype=dtype) for sequence in sequences)]
    for ours, theirs, expected in zip(actual, same_dtype, truth, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * np.abs(expected).max()
        assert np.abs(ours - expected).max() <= 2 * np.abs(theirs - expected).max() + rounding


def sum_of(mutant: str, rows: Rows) -> float:
    """Score of a mutant such as A24G:K30R, numbered from 1, from (num_residues, 20) log-probabilities."""
    parts = [(part[0], int(part[1:-1]) - 1, part[-1]) for part in mutant.split(":")]
    return sum(
        rows[site, AMINO_ACIDS.index(new)] - rows[site, AMINO_ACIDS.index(old)] for old, site, new in parts
    )


def test_scores_are_differences_at_the_sites(each: Fair) -> None:
    model, protein = each.model(), proteins()[3]
    sites = [[4], [0], [20], [2, 9], [9, 4, 17], [4]]
    mutants = [
        ":".join(f"{protein[s]}{s + 1}{AMINO_ACIDS[AMINO_ACIDS.index(protein[s]) - k]}" for s in some)
        for k, some in enumerate(sites, 1)
    ]
    masked, wild_type = each.masked(protein), each.rows(protein)
    additive = [sum_of(mutant, masked) for mutant in mutants]
    joint = [sum_of(mutant, each.rows(protein, some)) for mutant, some in zip(mutants, sites, strict=True)]
    unmasked = [sum_of(mutant, wild_type) for mutant in mutants]
    allowed = 6 * each.tolerance  # of up to three differences
    np.testing.assert_allclose(model.score(protein, mutants), additive, rtol=0, atol=allowed)
    np.testing.assert_allclose(model.score(protein, mutants, joint=True), joint, rtol=0, atol=allowed)
    actual = model.score(protein, mutants, method="wild-type")
    np.testing.assert_allclose(actual, unmasked, rtol=0, atol=allowed)
    assert np.abs(np.subtract(joint, additive))[3:5].min() > 1e-3
    assert np.abs(np.subtract(unmasked, additive)).min() > 1e-3


def test_scores_of_several_proteins_and_numbering(fair: Fair) -> None:
    model = fair.model()
    one, other = proteins()[3], proteins()[0]
    alone = model.score(one, [f"{one[5]}6W", f"{one[5]}6{one[5]}", f"{one[0]}1C:{one[5]}6W"])
    assert alone[1] == 0
    several = model.score(
        [one, other], [[f"{one[5]}-4W", f"{one[0]}-9C:{one[5]}-4W"], [f"{other[6]}-3A"]], offset=-9
    )
    np.testing.assert_allclose(several[0], alone[[0, 2]], rtol=1e-12)
    np.testing.assert_allclose(several[1], model.score(other, [f"{other[6]}7A"]), rtol=1e-12)
    assert [scores.shape for scores in model.score([one, other], [[], []])] == [(0,), (0,)]


def test_pseudo_likelihood_is_the_sum_over_the_twenty(fair: Fair) -> None:
    sequences = [*proteins(), "XBX"]
    actual = fair.model().pseudo_log_likelihood(sequences)
    for likelihood, sequence in zip(actual[:2], sequences[:2], strict=True):
        rows = fair.masked(sequence)
        terms = [rows[i, AMINO_ACIDS.index(x)] for i, x in enumerate(sequence) if x in AMINO_ACIDS]
        assert likelihood.sum == pytest.approx(sum(terms), abs=1e-7)
        assert likelihood.mean == pytest.approx(np.mean(terms), abs=1e-8)
        assert likelihood.perplexity == pytest.approx(math.exp(-np.mean(terms)))
        assert likelihood.num_scored == len(terms)
    assert [likelihood.num_scored for likelihood in actual] == [13, 1, 16, 21, 0]
    assert math.isnan(actual[4].mean) and math.isnan(actual[4].perplexity) and actual[4].sum == 0


def test_a_perplexity_that_is_no_number_is_infinite() -> None:
    likelihood = pseudo_likelihood(np.full((2, 20), -800.0), encode("MK"))
    assert likelihood == (-1600, -800, math.inf, 2)


@pytest.mark.parametrize("size", [8, 9])
def test_long_proteins_in_windows(fair: Fair, size: int) -> None:
    model, protein = fair.model(), proteins()[3]
    masked, wild_type = np.empty((21, 20)), np.full((21, 20), np.nan)
    off_center = np.full(21, np.inf)
    for site in range(21):
        first = min(max(site - size // 2, 0), 21 - size)
        masked[site] = fair.rows(protein[first : first + size], [site - first])[site - first]
    for first in sorted({*range(0, 21 - size, size - size // 2), 21 - size}):
        rows = fair.rows(protein[first : first + size])
        for place in range(size):
            if abs(place - (size - 1) / 2) < off_center[first + place]:
                off_center[first + place] = abs(place - (size - 1) / 2)
                wild_type[first + place] = rows[place]
    for method, expected in (("masked", masked), ("wild-type", wild_type)):
        (actual,) = model.log_probabilities([protein], method=method, window=size)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-8)
    mutant = f"{protein[6]}7A:{protein[3]}4C"
    around = 5 - size // 2
    rows = fair.rows(protein[around : around + size], [3 - around, 6 - around])
    joint = sum_of(f"{protein[6]}{7 - around}A:{protein[3]}{4 - around}C", rows)
    assert model.score(protein, [mutant], joint=True, window=size)[0] == pytest.approx(joint, abs=1e-8)
    (likelihood,) = model.pseudo_log_likelihood([protein], window=size)
    own = [masked[site, AMINO_ACIDS.index(residue)] for site, residue in enumerate(protein)]
    assert likelihood.sum == pytest.approx(sum(own), abs=1e-7)


@pytest.mark.parametrize(
    ("site", "window"),
    [(0, (0, 10)), (5, (0, 10)), (6, (1, 11)), (14, (9, 19)), (15, (10, 20)), (19, (10, 20))],
)
def test_optimal_window_is_centered_and_ends_with_the_protein(site: int, window: tuple[int, int]) -> None:
    assert optimal_window(20, site, 10) == window
    assert optimal_window(8, min(site, 7), 10) == (0, 8)


def test_queries_are_ordered_and_asked_once() -> None:
    assert plan_queries(20, [7, 3, 7], joint=[[7], [7, 3], (3, 7), []], window=10) == [
        Query(0, 10, (3,), True),
        Query(0, 10, (3, 7), True),
        Query(2, 12, (7,), True),
    ]
    assert plan_queries(20, [19, 8, 0], method="wild-type", window=10) == [
        Query(0, 10, (0,), False),
        Query(5, 15, (8,), False),
        Query(10, 20, (19,), False),
    ]
    assert plan_queries(9, range(9), method="wild-type", window=10) == [Query(0, 9, tuple(range(9)), False)]
    assert plan_queries(9, []) == plan_queries(9, [], method="wild-type") == []
    assert Query(2, 12, (7,), True).num_tokens == 12


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_logits_of_rows_are_those_of_all_tokens(fair: Fair, dtype: str) -> None:
    model = fair.model(dtype)
    batch = pack([encode(sequence) for sequence in proteins()])
    rows = torch.tensor([44, 0, 7, 7, batch.total_tokens - 1])
    computed: list[int] = []
    last = list(model.layers)[-1]
    assert model.lm_head is not None
    hooks = [
        part.register_forward_hook(lambda *call: computed.append(len(call[2])))
        for part in (last.qkv, last.attention_out, last.ffn_norm, last.fc1, last.fc2, model.lm_head)
    ]
    some = model(replace(batch, rows=rows), [0, 1, 2], return_logits=True)
    for hook in hooks:
        hook.remove()
    assert computed == [batch.total_tokens, 5, 5, 5, 5, 5]
    every = model(batch, [0, 1, 2], return_logits=True)
    tolerance = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2e-2}[dtype]
    for actual, expected in (
        (some.logits, every.logits[rows]),
        (some.representations[2], every.representations[2][rows]),
        (some.representations[1], every.representations[1]),
        (some.representations[0], every.representations[0]),
    ):
        assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())
    outputs = model.embed_packed(replace(batch, rows=rows), [LOG_PROBABILITIES])
    log_probabilities = outputs[LOG_PROBABILITIES]
    assert log_probabilities.shape == (5, 20)
    assert log_probabilities.dtype == (torch.float64 if dtype == "fp64" else torch.float32)


def test_triton_kernels_take_the_rows_that_are_left(fair: Fair, triton_device: torch.device) -> None:
    """Token dropout of each copy, and few rows behind the last attention, as kernels."""
    model = ESM2.from_pretrained(fair.checkpoint, dtype="fp32", device=triton_device)
    masked = fair.masked("MKT")
    expected = [sum_of(mutant, masked) for mutant in ("K2A", "M1C:K2W")]
    np.testing.assert_allclose(model.score("MKT", ["K2A", "M1C:K2W"]), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 99]), "rows must be within 0 to 20, got 0 to 99"),
        (torch.tensor([-1]), "got -1 to -1"),
        (torch.tensor([0], dtype=torch.int32), "rows must be a 1-D int64 tensor on cpu that is not empty"),
        (torch.empty(0, dtype=torch.int64), "not empty"),
        (torch.tensor([[1]]), "1-D"),
    ],
)
def test_rows_that_are_not_in_the_batch(fair: Fair, rows: torch.Tensor, message: str) -> None:
    batch = replace(pack([encode("M" * 19)]), rows=rows)
    with pytest.raises(ValueError, match=message):
        fair.model("fp32").embed_packed(batch, [LOG_PROBABILITIES])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("MKT", ["K2A", "K3A"]), ValueError, r"^mutations\[1\]: K3A: residue 3 is T, not K$"),
        ((["MKT"], [["M0A"]]), ValueError, r"^mutations\[0\]\[0\]: M0A: there is no residue 0; .*1 to 3$"),
        (("MKT", ["M1X"]), ValueError, "M1X: X is not one of the 20 amino acids ACDEFGHIKLMNPQRSTVWY"),
        (("MKT", ["M1A:K2A:M1C"]), ValueError, "residue 1 appears twice"),
        (("MKT", ["MA"]), ValueError, "'MA' is not a mutation; write A24G"),
        (("MKT", [""]), ValueError, "'' is not a mutation"),
        (("MKT", "M1A"), TypeError, "mutations is one string; pass a list of them"),
        (("MKT", [1]), TypeError, r"mutations\[0\] is a int; pass strings such as 'A24G'"),
        ((["MKT"], ["M1A"]), TypeError, r"mutations\[0\] is one string"),
        (("MKT", None), TypeError, "^mutations is None; pass a list of strings such as 'A24G'$"),
        ((["MKT", "MK"], [["M1A"]]), ValueError, "1 lists of mutations for 2 sequences"),
        (("MK?", []), ValueError, "sequence: '\\?' at position 3"),
    ],
)
def test_mutations_that_do_not_fit(
    fair: Fair, arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fair.model("fp32").score(*arguments)


def test_arguments_that_cannot_be(fair: Fair) -> None:
    model = fair.model("fp32")
    with pytest.raises(ValueError, match="method 'mutant' is not one of masked, wild-type"):
        model.log_probabilities(["MKT"], method="mutant")
    with pytest.raises(ValueError, match="joint masks the sites of a mutant together; the method wild-type"):
        model.score("MKT", ["M1A"], method="wild-type", joint=True)
    with pytest.raises(ValueError, match="masked together span 3 residues; a window has 2"):
        model.score("MKT", ["M1A:T3A"], joint=True, window=2)
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        model.pseudo_log_likelihood(["MKT"], window=0)
    with pytest.raises(ValueError, match="sites must be within 0 to 2, got -1 to 4"):
        plan_queries(3, [4, -1])


def test_what_is_not_finite_is_named_and_spoils_no_other(fair: Fair) -> None:
    model = ESM2.from_pretrained(fair.checkpoint, dtype="fp32", device="cpu")
    expected = model.score(["MKTAY", "MKWAY"], [["T3A"], ["M1A", "W3A"]])
    batches: list[PackedBatch] = []
    model.register_forward_pre_hook(lambda module, arguments: batches.append(arguments[0]))

    def spoil(module: torch.nn.Module, arguments: Any, normalized: torch.Tensor) -> None:
        normalized[batches[-1].input_ids == int(encode("W")[0])] = torch.nan

    next(iter(model.layers)).attention_norm.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match="^1 of 2 sequences: the log-probabilities are not finite") as told:
        actual = model.score(["MKTAY", "MKWAY"], [["T3A"], ["M1A", "W3A"]])
    assert told[0].filename == __file__
    assert str(told[0].message).endswith(": sequences[1]")
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], [np.nan, expected[1][1]])  # where W is masked, it is not there
