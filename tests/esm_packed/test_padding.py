"""The padded layout: it computes what packing and fair-esm compute, and pays for its padding."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import fair_esm_reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import relative_error

from esm_packed import ESM2
from esm_packed.alphabet import PAD_ID, encode
from esm_packed.layouts import LAYOUTS
from esm_packed.outputs import layer_of
from esm_packed.padding import pad, plan_padded

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "M", "GS<mask>HMSL<mask>FD", "M<mask>", "ACDEFGHIKLMNPQRSTVWY"]


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 1000))
def test_batches_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_padded(lengths, budget)
    members = [int(member) for batch in batches for member in batch]
    assert sorted(members) == list(range(len(lengths)))
    assert [lengths[member] for member in members] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget
    for batch, following in pairwise(batches):
        assert (len(batch) + 1) * lengths[batch[0]] > budget, f"{following[0]} would have fitted"


def test_rows_are_padded_to_the_longest() -> None:
    batch = pad([encode("MK"), encode("MKTA")])
    assert batch.max_seqlen == 6
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 12, 12]
    assert batch.input_ids[4:6].tolist() == [PAD_ID, PAD_ID]
    assert batch.input_ids[:4].tolist() == [0, *encode("MK"), 2]
    with pytest.raises(ValueError, match="token_ids is empty"):
        pad([])
    with pytest.raises(ValueError, match="token_budget must be positive, got 0"):
        plan_padded([3], 0)


@pytest.mark.parametrize("dtype, gate", [("fp64", 1e-12), ("fp32", 3e-6), ("fp16", 5e-3), ("bf16", 3e-2)])
def test_equal_to_fair_esm_on_each_sequence_alone(tmp_path: Path, dtype: str, gate: float) -> None:
    path = fair_esm_reference.write_checkpoint(
        tmp_path / "esm2_small.pt", num_layers=2, num_heads=4, head_dim=16
    )
    truth = fair_esm_reference.run(fair_esm_reference.load(path, torch.float64), SEQUENCES)
    model = ESM2.from_pretrained(path, dtype=dtype, device="cpu")
    batch = pad([encode(sequence) for sequence in SEQUENCES])
    means = LAYOUTS["padded"].prepare(model).embed_packed(batch, ["mean/0", "mean/1", "mean/2"])
    for name, rows in means.items():
        assert len(rows) == len(SEQUENCES)
        for row, expected in zip(rows, truth, strict=True):
            assert relative_error(row, expected["mean"][layer_of(name)]) <= gate
