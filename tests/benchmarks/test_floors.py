"""Floors do all that the model cannot do without: every pack, every layer, every matrix multiplication."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import floors
import pytest
import torch
from contenders.packages import lay_out
from floors import MATMULS, AttentionFloor, MatmulFloor

from esm_packed.model import ESM2

TOKEN_BUDGET = 40
SEQUENCES = ["M" * residues for residues in (30, 7, 25, 18, 3)]


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2.from_pretrained("demo", device="cpu", dtype="fp32")


@pytest.fixture
def pack_tokens() -> list[int]:
    """Tokens of each pack, of which there are several of different sizes."""
    packs = lay_out(SEQUENCES, TOKEN_BUDGET)
    tokens = [batch.total_tokens for _, batch in packs]
    assert sum(tokens) == sum(len(sequence) + 2 for sequence in SEQUENCES)
    assert len(set(tokens)) > 2
    return tokens


@pytest.mark.parametrize("best", [False, True])
def test_matmuls_of_every_pack_and_layer(best: bool, model: ESM2, pack_tokens: list[int]) -> None:
    floor = MatmulFloor(model, TOKEN_BUDGET, best=best)
    floor.prepare(SEQUENCES)
    assert floor.padded_tokens == sum(pack_tokens)
    calls: list[tuple[int, torch.nn.Linear]] = []

    def multiply(states: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor) -> None:
        assert states.shape == (len(out), linear.in_features)
        assert out.shape[1] == linear.out_features
        calls.append((len(states), linear))

    floor.multiply = dict.fromkeys(floor.multiply, multiply)
    floor.run()
    linears = [getattr(layer, name) for layer in model.layers for name in MATMULS]
    assert [(rows, id(linear)) for rows, linear in calls] == [
        (rows, id(linear)) for rows, linear in product(pack_tokens, linears)
    ]
    flops = sum(2 * rows * linear.weight.numel() for rows, linear in calls)
    assert flops == 24 * model.config.num_layers * model.config.hidden_size**2 * sum(pack_tokens)


@pytest.mark.parametrize("multiply", [floors._mm, floors._onednn])
def test_matmuls_multiply(multiply: floors.Multiply, model: ESM2) -> None:
    layer = next(iter(model.layers))
    for name in MATMULS:
        linear = getattr(layer, name)
        states = torch.randn(9, linear.in_features)
        out = torch.empty(9, linear.out_features)
        product_of = multiply(states, linear, out)
        bias = linear.bias if multiply is floors._onednn else 0.0
        torch.testing.assert_close(
            product_of, states @ linear.weight.to_dense().T + bias, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("slow", MATMULS)
def test_the_faster_library_is_taken_for_each(
    slow: str, model: ESM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only the calls move: oneDNN is slower in `slow`, and `torch.mm` in all others."""
    now = 0.0
    monkeypatch.setattr(floors, "time", SimpleNamespace(perf_counter=lambda: now))
    of_weight = {id(getattr(layer, name)): name for layer in model.layers for name in MATMULS}

    def taking(favorite: bool) -> Any:
        def multiply(states: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor) -> None:
            nonlocal now
            now += 1.0 if (of_weight[id(linear)] == slow) == favorite else 2.0

        return multiply

    mm, onednn = taking(True), taking(False)
    monkeypatch.setattr(floors, "_mm", mm)
    monkeypatch.setattr(floors, "_onednn", onednn)
    floor = MatmulFloor(model, TOKEN_BUDGET, best=True)
    floor.prepare(SEQUENCES)
    assert floor.multiply == {name: mm if name == slow else onednn for name in MATMULS}


def test_attention_of_every_pack_and_layer(model: ESM2, pack_tokens: list[int]) -> None:
    floor = AttentionFloor(model, TOKEN_BUDGET)
    assert floor.backend == model.attention_backend
    floor.prepare(SEQUENCES)
    assert floor.padded_tokens == sum(pack_tokens)
    attend, seen = floor.attend, []

    def counted(*arguments: Any) -> torch.Tensor:
        query, key, value, cu_seqlens, max_seqlen, softmax_scale = arguments
        assert query.shape == (int(cu_seqlens[-1]), model.config.num_heads, model.config.head_dim)
        assert query.shape == key.shape == value.shape
        assert max_seqlen == int(cu_seqlens.diff().max())
        assert softmax_scale == model.config.head_dim**-0.5
        seen.append(cu_seqlens.diff().tolist())
        return attend(*arguments)

    floor.attend = counted
    floor.run()
    batches = [batch.cu_seqlens.diff().tolist() for _, batch in lay_out(SEQUENCES, TOKEN_BUDGET)]
    assert seen == [lengths for lengths in batches for _ in range(model.config.num_layers)]
