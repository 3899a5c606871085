"""Layouts: the same embeddings however sequences are laid out; in one shape, the same bits."""

from __future__ import annotations

from pathlib import Path

import fair_esm_reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packings import random_packing

from esm_packed import ESM2, kernels
from esm_packed.alphabet import PAD_ID, encode
from esm_packed.layouts import LAYOUTS
from esm_packed.outputs import mean_of
from esm_packed.packing import check_packed, fill, pack

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "M", "GS<mask>HMSL<mask>FD", "M<mask>", "ACDEFGHIKLMNPQRSTVWY"]
NUM_ORDERS = 4


def random_proteins(count: int, longest: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    letters = encode("ACDEFGHIKLMNPQRSTVWY")
    return [letters[rng.integers(0, 20, length)] for length in rng.integers(1, longest, count)]


def embed(
    model: ESM2, layout: str, token_ids: list[np.ndarray], packs: list[list[int]], budget: int
) -> np.ndarray:
    last = model.config.num_layers
    model = LAYOUTS[layout].prepare(model)
    rows = np.empty((len(token_ids), model.config.hidden_size), dtype=np.float64)
    for members in packs:
        batch = LAYOUTS[layout].lay_out([token_ids[member] for member in members], budget)
        assert batch.num_sequences == len(members)
        rows[members] = model.embed_packed(batch, [mean_of(last)])[mean_of(last)].numpy()
    return rows


def test_layouts_give_the_same_embeddings() -> None:
    model = ESM2.from_pretrained("demo", dtype="fp64", device="cpu")
    token_ids = [encode(sequence) for sequence in SEQUENCES]
    lengths = [len(ids) + 2 for ids in token_ids]
    rows = {
        name: embed(model, name, token_ids, [m.tolist() for m in layout.plan(lengths, 32)], 32)
        for name, layout in LAYOUTS.items()
    }
    np.testing.assert_allclose(rows["padded"], rows["packed"], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(rows["fixed"], rows["packed"], rtol=1e-12, atol=1e-13)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(0, 500))
def test_filled_packs(num_residues: list[int], missing: int) -> None:
    batch = pack([np.full(count, 5, dtype=np.uint8) for count in num_residues])
    total_tokens = batch.total_tokens + missing
    filled = fill(batch, total_tokens)
    check_packed(filled, torch.device("cpu"))
    assert filled.total_tokens == total_tokens
    assert filled.num_sequences == len(num_residues)
    assert torch.equal(filled.input_ids[: batch.total_tokens], batch.input_ids)
    assert (filled.input_ids[batch.total_tokens :] == PAD_ID).all()
    assert filled.cu_seqlens[:-1][filled.segments].tolist() == batch.cu_seqlens[:-1].tolist()
    if missing:
        with pytest.raises(ValueError, match="total_tokens = "):
            fill(filled, batch.total_tokens)


@pytest.mark.parametrize("num_threads, dtype", [(1, "fp32"), (1, "fp16"), (1, "bf16"), (2, "fp32")])
def test_fixed_layout_gives_the_same_bits_in_any_company(num_threads: int, dtype: str) -> None:
    model = ESM2.from_pretrained("demo", dtype=dtype, device="cpu")
    token_ids = random_proteins(12, 70)
    lengths = [len(ids) + 2 for ids in token_ids]
    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        first, *others = (
            embed(model, "fixed", token_ids, random_packing(lengths, 100, rng, early=0.1), 100)
            for _ in range(NUM_ORDERS)
        )
    finally:
        torch.set_num_threads(threads)
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_other_layouts_do_not_keep_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix multiplication that depends on its shape, as those of GPU libraries do, is made harmless."""
    linear = kernels.linear

    def by_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        weight = weight.to_dense()
        if len(x) % 2:
            return linear(x, weight, bias)
        half = x.shape[1] // 2
        return linear(x[:, :half], weight[:, :half], bias) + x[:, half:] @ weight[:, half:].T

    monkeypatch.setattr("esm_packed.kernels.linear", by_shape)
    model = ESM2.from_pretrained("demo", dtype="fp32", device="cpu")
    token_ids = random_proteins(12, 70)
    lengths = [len(ids) + 2 for ids in token_ids]
    packings = [random_packing(lengths, 101, np.random.default_rng(seed), early=0.1) for seed in range(4)]
    for layout in ("packed", "fixed"):
        rows = [embed(model, layout, token_ids, packs, 101) for packs in packings]
        same = all(np.array_equal(other, rows[0]) for other in rows[1:])
        assert same == (layout == "fixed")


def test_a_sequence_beyond_the_budget_fills_a_multiple_of_it() -> None:
    batch = LAYOUTS["fixed"].lay_out([encode("M" * 50)], 32)
    assert batch.total_tokens == 64
    assert batch.num_sequences == 1
    assert batch.max_seqlen == 52


def test_filled_packs_keep_fair_esms_embeddings(tmp_path: Path) -> None:
    path = fair_esm_reference.write_checkpoint(
        tmp_path / "esm2_small.pt", num_layers=2, num_heads=4, head_dim=16
    )
    truth = fair_esm_reference.run(fair_esm_reference.load(path, torch.float64), SEQUENCES)
    model = ESM2.from_pretrained(path, dtype="fp64", device="cpu")
    rows = embed(model, "fixed", [encode(s) for s in SEQUENCES], [[0, 2, 1], [4, 3]], 64)
    np.testing.assert_allclose(rows, [each["mean"][2] for each in truth], rtol=1e-10, atol=1e-12)
