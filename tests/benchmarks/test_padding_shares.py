"""Padding of batches, counted for the page that says when packing pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import padding_shares

PAGE = Path(__file__).parents[2] / "docs" / "packing.md"


def test_a_padded_batch_is_as_long_as_its_longest() -> None:
    lengths, packs = np.array([4, 10, 6]), [np.array([0, 1]), np.array([2])]
    assert padding_shares.batch_sizes("padded_sorted", lengths, packs) == [20, 6]
    assert padding_shares.batch_sizes("first_fit_decreasing", lengths, packs) == [14, 6]


def test_sorting_helps_large_sets_and_packing_every_set() -> None:
    few, many = (padding_shares.padding_share("padded_sorted", "uniref", n, 16_384) for n in (20, 10_000))
    assert few > 5 * many
    assert padding_shares.padding_share("padded_unsorted", "uniref", 20, 16_384) > few
    assert padding_shares.padding_share("first_fit_decreasing", "uniref", 20, 16_384) == 0


def test_the_page_shows_the_table() -> None:
    assert "\n".join(padding_shares.table()) in PAGE.read_text()
