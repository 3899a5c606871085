"""Rows come back in the order of the sequences, and are means over residues alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contenders import packages

from esm_packed.alphabet import encode
from esm_packed.numerics import PRECISIONS

SEQUENCES = ["MKV", "M" * 40, "AC", "K" * 25, "LWY"]


def echo(provider: type[Any], forward: Any) -> Any:
    """A provider whose hidden states are the token ids."""
    made: Any = object.__new__(provider)
    made.model = SimpleNamespace(forward_representation=forward, num_layers=1)
    made._forward = forward
    made.token_budget, made.layout = 50, "padded"
    made.precision = PRECISIONS["fp32"]
    return made


@pytest.mark.parametrize(
    ("provider", "forward"),
    [
        (packages.EsmEfficient, lambda tokens, pad_args: tokens[:, None].float()),
        (
            packages.Transformers,
            lambda input_ids, attention_mask: SimpleNamespace(
                last_hidden_state=(input_ids * attention_mask)[:, :, None].float()
            ),
        ),
    ],
    ids=["packed", "padded"],
)
def test_rows_are_means_over_residues_in_order(provider: type[Any], forward: Any) -> None:
    made = echo(provider, forward)
    made.prepare(SEQUENCES)
    assert [index for members in made.members for index in members] != list(range(len(SEQUENCES)))
    assert len(made.members) > 1
    made.run()
    wanted = [encode(sequence).mean() for sequence in SEQUENCES]
    assert made.embeddings().flatten().tolist() == pytest.approx(wanted)


def test_computed_tokens_include_padding() -> None:
    """With 50 tokens a batch: 27 and 42 alone, 5, 5 and 4 together, as 3 rows of 5."""
    made = echo(packages.Transformers, None)
    made.prepare(SEQUENCES)
    assert sorted(tuple(inputs.shape) for inputs, _ in made.inputs) == [(1, 27), (1, 42), (3, 5)]
    assert made.padded_tokens == 27 + 42 + 15
    assert [int(mask.sum()) for _, mask in made.inputs] == [
        sum(len(SEQUENCES[index]) + 2 for index in members) for members in made.members
    ]
    made = echo(packages.EsmEfficient, None)
    made.prepare(SEQUENCES)
    assert made.padded_tokens == sum(len(sequence) + 2 for sequence in SEQUENCES)


def test_tokens_have_both_ends() -> None:
    assert torch.equal(packages.token_ids_with_ends("MA"), torch.tensor([0, 20, 5, 2]))
