"""The plain-PyTorch operations against fair-esm's formulas and SDPA, in FP64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from esm.rotary_embedding import apply_rotary_pos_emb
from tolerances import assert_as_close_as_pytorch, relative_error

from esm_packed import kernels
from esm_packed.kernels import matmul, reference

LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129]
HEAD_DIMS = [16, 24, 32, 64, 128]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MASK_ID = 32


def cu_seqlens_of(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [5], [4] * 300, [700, 3, 3]], ids=["mixed", "one", "short", "long"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_tokens_scales_each_sequence_by_its_own_masks(lengths: list[int], dtype: torch.dtype) -> None:
    weight = torch.randn(33, 40, dtype=torch.float64).to(dtype)
    input_ids = torch.randint(4, 33, (sum(lengths),), dtype=torch.int32)
    input_ids[torch.rand(sum(lengths)) < 0.3] = MASK_ID
    cu_seqlens = cu_seqlens_of(lengths)
    input_ids[cu_seqlens[:-1]] = 0

    embeddings, position_ids = kernels.embed_tokens(input_ids, cu_seqlens, weight, MASK_ID, dtype)
    assert embeddings.dtype == dtype
    assert position_ids.dtype == torch.int32
    assert torch.equal(position_ids, torch.cat([torch.arange(length) for length in lengths]))
    for ids, rows in zip(input_ids.split(lengths), embeddings.split(lengths), strict=True):
        masked_share = float((ids == MASK_ID).double().mean())
        expected = weight.double()[ids] * (1 - 0.15 * 0.8) / (1 - masked_share)
        expected[ids == MASK_ID] = 0
        assert relative_error(rows, expected) <= 2 * torch.finfo(dtype).eps

    plain, _ = kernels.embed_tokens(input_ids, cu_seqlens, weight, None, dtype)
    assert torch.equal(plain, weight[input_ids])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary_is_that_of_fair_esm_and_spares_values(
    head_dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    table_dtype = reference.statistics_dtype(dtype)
    inv_freq = 1 / 10000 ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(max(LENGTHS), dtype=torch.float64), inv_freq)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS]).int()
    qkv = torch.randn(sum(LENGTHS), 3, 4, head_dim, dtype=torch.float64).to(dtype)

    def rotated_by_fair_esm(dtype: torch.dtype) -> Any:
        tables = torch.cat((angles, angles), -1)[position_ids]
        query_key = qkv[:, :2].to(dtype).permute(1, 2, 0, 3)
        rotated = apply_rotary_pos_emb(
            query_key.flatten(0, 1), tables.cos().to(dtype)[None], tables.sin().to(dtype)[None]
        )
        return rotated.view(2, 4, -1, head_dim).permute(2, 0, 1, 3)

    tables = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
    actual = qkv.clone()
    if interleaved:
        matmul.interleave_heads_(actual.flatten(1).T, head_dim)
        reference.rotary_qk_interleaved_(actual, *tables, position_ids)
        matmul.separate_heads_(actual.flatten(1).T, head_dim)
    else:
        kernels.rotary_qk_(actual, *tables, position_ids)
    assert torch.equal(actual[:, 2], qkv[:, 2])
    if dtype == torch.float64:
        assert relative_error(actual[:, :2], rotated_by_fair_esm(dtype)) <= 1e-15
    else:
        assert_as_close_as_pytorch(
            actual[:, :2], rotated_by_fair_esm(dtype), rotated_by_fair_esm(torch.float64)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 32])
def test_rotary_gives_the_same_bits_with_any_number_of_threads(head_dim: int, dtype: torch.dtype) -> None:
    """A token's bits do not depend on where the work is divided, nor on the tokens before it."""
    qkv = torch.randn(4099, 3, 5, head_dim).to(dtype)
    angles = torch.rand(300, head_dim // 2) * 100
    position_ids = torch.arange(4099, dtype=torch.int32) % 300

    def rotated(first: int, num_threads: int) -> torch.Tensor:
        torch.set_num_threads(num_threads)
        rows = qkv[first:].clone()
        reference.rotary_qk_interleaved_(rows, angles.cos(), angles.sin(), position_ids[first:])
        return rows

    before = torch.get_num_threads()
    try:
        expected = rotated(0, 1)
        for num_threads in (2, 3, 5, 7):
            for first in (0, 1, 7):
                assert torch.equal(rotated(first, num_threads), expected[first:])
    finally:
        torch.set_num_threads(before)


def test_interleaved_heads_that_do_not_lie_end_to_end_are_refused() -> None:
    angles, position_ids = torch.rand(9, 12), torch.arange(4, dtype=torch.int32)
    apart = torch.randn(4, 3, 3, 24)[:, :, :2]
    with pytest.raises(RuntimeError, match="view"):
        reference.rotary_qk_interleaved_(apart, angles.cos(), angles.sin(), position_ids)


@pytest.mark.parametrize("hidden_size", [320, 480, 640, 1280, 2560, 5120])
@pytest.mark.parametrize(
    "dtype, residual_dtype",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_add_layer_norm(hidden_size: int, dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    residual = torch.randn(9, hidden_size).mul(20).to(residual_dtype)
    delta, weight, bias = (
        torch.randn(9, hidden_size).to(dtype),
        torch.randn(hidden_size),
        torch.randn(hidden_size),
    )
    weight, bias = weight.to(dtype), bias.to(dtype)
    total = residual.double() + delta.double()
    expected = F.layer_norm(total, (hidden_size,), weight.double(), bias.double(), 1e-5)
    same_dtype = F.layer_norm(total.to(dtype), (hidden_size,), weight, bias, 1e-5)

    actual = kernels.add_layer_norm_(delta, residual, weight, bias, 1e-5)
    assert actual.dtype == dtype
    assert torch.equal(residual, total.to(residual_dtype))
    assert_as_close_as_pytorch(actual, same_dtype, expected)

    plain = kernels.layer_norm(residual, weight, bias, 1e-5)
    rounded = residual.double()
    expected = F.layer_norm(rounded, (hidden_size,), weight.double(), bias.double(), 1e-5)
    same_dtype = F.layer_norm(rounded.to(dtype), (hidden_size,), weight, bias, 1e-5)
    assert_as_close_as_pytorch(plain, same_dtype, expected)


def test_sums_near_the_fp16_limit_do_not_overflow_in_the_norm() -> None:
    residual = torch.full((2, 320), 60000.0, dtype=torch.float16)
    residual[:, ::2] = -60000
    weight, bias = torch.ones(320, dtype=torch.float16), torch.zeros(320, dtype=torch.float16)
    normalized = kernels.add_layer_norm_(torch.zeros_like(residual), residual, weight, bias, 1e-5)
    assert torch.equal(normalized.abs(), torch.ones_like(normalized))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_max_leaves_out_bos_and_eos(dtype: torch.dtype) -> None:
    lengths = [length + 2 for length in LENGTHS]
    hidden_states = torch.randn(sum(lengths), 24).to(dtype)
    cu_seqlens = cu_seqlens_of(lengths)
    hidden_states[cu_seqlens[:-1]] = float("inf")
    hidden_states[cu_seqlens[1:] - 1] = float("nan")
    maxima = kernels.segment_max(hidden_states, cu_seqlens)
    assert maxima.dtype == reference.statistics_dtype(dtype)
    for rows, maximum in zip(hidden_states.split(lengths), maxima, strict=True):
        assert torch.equal(maximum, rows[1:-1].to(maximum.dtype).sort(0).values[-1])


def test_segment_max_is_nan_where_a_residue_is_and_minus_infinity_without_residues() -> None:
    hidden_states = torch.randn(9, 4)
    hidden_states[3, 1] = float("nan")
    maxima = kernels.segment_max(hidden_states, torch.tensor([0, 0, 7, 9, 9], dtype=torch.int32))
    assert maxima[[0, 2, 3]].isneginf().all()
    assert maxima[1].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_mean_leaves_out_bos_and_eos(dtype: torch.dtype) -> None:
    lengths = [length + 2 for length in LENGTHS]
    hidden_states = torch.randn(sum(lengths), 24).to(dtype)
    cu_seqlens = cu_seqlens_of(lengths)
    hidden_states[cu_seqlens[:-1]] = float("inf")
    hidden_states[cu_seqlens[1:] - 1] = float("nan")
    means = kernels.segment_mean(hidden_states, cu_seqlens)
    assert means.dtype == reference.statistics_dtype(dtype)
    for rows, mean in zip(hidden_states.split(lengths), means, strict=True):
        assert relative_error(mean, rows[1:-1].double().mean(0)) <= 4 * torch.finfo(means.dtype).eps


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packed_attention_is_sdpa_of_each_sequence(head_dim: int) -> None:
    query, key, value = torch.randn(3, sum(LENGTHS), 4, head_dim, dtype=torch.float64)
    actual = reference.packed_attention(query, key, value, cu_seqlens_of(LENGTHS), max(LENGTHS), 0.3)
    splits = (tensor.split(LENGTHS) for tensor in (query, key, value))
    for rows, *alone in zip(actual.split(LENGTHS), *splits, strict=True):
        q, k, v = (tensor.transpose(0, 1) for tensor in alone)
        expected = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        assert relative_error(rows, expected.transpose(0, 1)) <= 1e-14


@pytest.mark.parametrize("tile", [1, 1000, 1 << 30])
def test_attention_maps_are_summed_as_if_they_were_held(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAP_TILE", tile)
    lengths = [*LENGTHS, 0, 2, 1]
    query, key = torch.randn(2, sum(lengths), 4, 16, dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64)
    before = torch.randn(sum(lengths), max(lengths) - 2, dtype=torch.float64)
    scores = before.clone()
    sums = reference.add_attention_maps_(
        query, key, weight, scores, cu_seqlens_of(lengths), max(lengths), 0.3
    )
    added = scores - before
    for rows, added_to, sum_of, q, k in zip(
        lengths, *(tensor.split(lengths) for tensor in (added, sums, query, key)), strict=True
    ):
        maps = torch.einsum("qhd,khd->hqk", q, k).mul(0.3).softmax(-1)[:, 1:-1, 1:-1]
        expected_scores, expected_sums = torch.zeros_like(added_to), torch.zeros_like(sum_of)
        if rows > 2:
            expected_scores[1:-1, : rows - 2] = torch.einsum("hij,h->ij", maps, weight)
            expected_sums[1:-1] = (maps.sum(1) + maps.sum(2)).T
        torch.testing.assert_close(added_to, expected_scores, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sum_of, expected_sums, rtol=1e-12, atol=1e-14)


def test_an_empty_sequence_has_no_mean_and_disturbs_no_other() -> None:
    hidden_states = torch.randn(7, 4)
    means = kernels.segment_mean(hidden_states, torch.tensor([0, 0, 7, 7], dtype=torch.int32))
    assert means[[0, 2]].isnan().all()
    torch.testing.assert_close(means[1], hidden_states[1:-1].mean(0))
