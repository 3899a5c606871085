"""Shapes of CUDA graphs and the batches they are loaded with; recording needs a GPU, see tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esm_packed import ESM2
from esm_packed.alphabet import encode
from esm_packed.graphs import Shape, empty_batch, load
from esm_packed.layouts import LAYOUTS
from esm_packed.packing import PackedBatch, check_packed

BUDGET = 256


def random_batch(num_residues: list[int], budget: int = BUDGET) -> PackedBatch:
    letters = encode("ACDEFGHIKLMNPQRSTVWY")
    rng = np.random.default_rng(num_residues)
    return LAYOUTS["fixed"].lay_out([letters[rng.integers(0, 20, count)] for count in num_residues], budget)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 300))
def test_a_shape_holds_its_batch(num_residues: list[int], budget: int) -> None:
    batch = random_batch(num_residues, budget)
    shape = Shape.of(batch, [1])
    static = empty_batch(shape, batch)
    load(static, batch)
    check_packed(static.input_ids, static.cu_seqlens, static.max_seqlen, torch.device("cpu"))
    assert torch.equal(static.input_ids, batch.input_ids)
    bounds = batch.cu_seqlens.numel()
    assert torch.equal(static.cu_seqlens[:bounds], batch.cu_seqlens)
    assert bounds - 1 <= shape.num_segments < 2 * bounds
    assert batch.max_seqlen <= shape.max_seqlen <= max(64, 2 * batch.max_seqlen)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_loaded_batches_have_the_same_embeddings(attention: str) -> None:
    """One static batch, loaded with one pack after the other, as for replays: nothing stays of the last."""
    model = ESM2.from_pretrained("demo", dtype="fp64", attention=attention)
    batches = [random_batch(lengths) for lengths in ([60, 3, 1], [30, 30, 61, 12], [64], [7] * 25)]
    widest = max((Shape.of(batch, [5]) for batch in batches), key=lambda shape: shape.num_segments)
    static = empty_batch(Shape(BUDGET, widest.num_segments, 128, (5,)), batches[0])
    for batch in batches:
        load(static, batch)
        rows = model.embed_packed(static, [5])[5][batch.segments]
        torch.testing.assert_close(rows, model.embed_packed(batch, [5])[5], rtol=1e-12, atol=1e-13)
