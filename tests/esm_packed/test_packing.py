from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esm_packed.alphabet import BOS_ID, EOS_ID, encode
from esm_packed.packing import default_token_budget, limit_pairs, pack, plan_packs

UNIREF_LENGTHS = Path(__file__).parents[1] / "data" / "uniref_lengths.txt"
"""Residues of 1,000 proteins of UniRef, such as ESM-2 was trained on."""


def first_fit_decreasing(lengths: list[int], token_budget: int) -> list[list[int]]:
    """One sequence at a time, as the textbook has it."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for members in packs:
            if sum(lengths[member] for member in [*members, index]) <= token_budget:
                members.append(index)
                break
        else:
            packs.append([index])
    return packs


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(20, 150))
def test_equals_first_fit_decreasing_one_by_one(lengths: list[int], token_budget: int) -> None:
    packs = plan_packs(lengths, token_budget)
    assert [members.tolist() for members in packs] == first_fit_decreasing(lengths, token_budget)


@pytest.mark.parametrize("token_budget", [4096, 8192, 16384])
def test_reaches_the_lower_bound_on_real_proteins(token_budget: int) -> None:
    residues = np.loadtxt(UNIREF_LENGTHS, dtype=np.int64)
    assert len(residues) == 1000
    lengths = np.minimum(residues, 1022) + 2
    packs = plan_packs(lengths, token_budget)
    assert len(packs) == math.ceil(lengths.sum() / token_budget)
    pack_tokens = [int(lengths[members].sum()) for members in packs]
    assert max(pack_tokens) <= token_budget


def test_a_million_lengths_in_bounded_time() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(5.55, 0.72, 1_000_000)).clip(12, 8001).astype(np.int64)
    start = time.process_time()
    packs = plan_packs(lengths, 16384)
    # Measured 0.2 s on one core; the bound is ten times looser.
    assert time.process_time() - start < 2
    assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(lengths.size))


def test_a_sequence_over_the_budget_is_a_pack_of_its_own() -> None:
    lengths = [50, 300, 50]
    packs = plan_packs(lengths, 100)
    assert [members.tolist() for members in packs] == [[1], [0, 2]]


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 6_000))
def test_packs_of_limited_pairs(lengths: list[int], most_pairs: int) -> None:
    packs = plan_packs(lengths, 100)
    limited = limit_pairs(packs, lengths, most_pairs)
    assert [i for pack in limited for i in pack] == [i for pack in packs for i in pack]
    for members in limited:
        tokens = [lengths[index] for index in members]
        assert len(tokens) == 1 or sum(tokens) * max(tokens) <= most_pairs
    assert len(limited) == len(packs) or any(
        sum(lengths[i] for i in pack) * lengths[pack[0]] > most_pairs for pack in packs
    )


def test_no_sequences_no_packs() -> None:
    assert plan_packs([], 100) == []


@pytest.mark.parametrize(
    "lengths, budget, named",
    [([3, 0], 10, r"lengths\[1\] = 0"), ([3], 0, "token_budget must be positive, got 0")],
)
def test_arguments_that_make_no_sense_are_named(lengths: list[int], budget: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_packs(lengths, budget)


@given(st.lists(st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=30), min_size=1, max_size=20))
def test_pack_lays_sequences_end_to_end(sequences: list[str]) -> None:
    batch = pack([encode(sequence) for sequence in sequences], [f"p{i}" for i in range(len(sequences))])
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == batch.total_tokens == sum(len(sequence) + 2 for sequence in sequences)
    assert batch.max_seqlen == max(len(sequence) + 2 for sequence in sequences)
    assert batch.num_sequences == len(sequences)
    for sequence, start, end in zip(sequences, bounds, bounds[1:], strict=False):
        tokens = batch.input_ids[start:end].tolist()
        assert tokens == [BOS_ID, *encode(sequence).tolist(), EOS_ID]
        assert batch.position_ids[start:end].tolist() == list(range(end - start))


def test_pack_refuses_what_is_no_batch() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        pack([])
    with pytest.raises(ValueError, match=r"token_ids\[1\] has no residues"):
        pack([encode("MK"), encode("")])
    with pytest.raises(ValueError, match="2 sequence_ids for 1 sequences"):
        pack([encode("MK")], ["a", "b"])


@pytest.mark.parametrize("lengths", [[2**31 - 2], [2**30, 2**30 - 4], [2**31 - 5, 1], [2**29] * 16])
def test_more_tokens_than_int32_counts_are_refused(lengths: list[int]) -> None:
    """Views of one residue stand in for the sequences, so that nothing of this size is made."""
    token_ids = [np.broadcast_to(np.uint8(5), length) for length in lengths]
    total = sum(lengths) + 2 * len(lengths)
    assert total >= 2**31
    with pytest.raises(ValueError, match=f"{total} tokens in one pack: cu_seqlens is int32"):
        pack(token_ids)


def test_as_many_tokens_as_int32_counts_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out: list[int] = []

    def concatenate(parts: list[np.ndarray]) -> np.ndarray:
        laid_out.append(sum(map(len, parts)))
        return np.empty(0, np.uint8)

    monkeypatch.setattr(np, "concatenate", concatenate)
    batch = pack([np.broadcast_to(np.uint8(5), length) for length in (2**30, 2**30 - 5)])
    assert laid_out == [2**31 - 1]
    assert batch.cu_seqlens.tolist() == [0, 2**30 + 2, 2**31 - 1]
    assert batch.max_seqlen == 2**30 + 2


@pytest.mark.parametrize(
    ("multiprocessors", "expected"),
    [(132, 33_792), (108, 27_648), (114, 29_184), (58, 29_696), (400, 51_200)],
)
def test_the_default_pack_of_a_gpu_fills_whole_waves(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: int, expected: int
) -> None:
    monkeypatch.setattr("esm_packed.packing.num_multiprocessors", lambda device: multiprocessors)
    assert default_token_budget(torch.device("cuda", 0)) == expected
    assert expected % (128 * multiprocessors) == 0
    assert default_token_budget(torch.device("cpu")) == 1024
