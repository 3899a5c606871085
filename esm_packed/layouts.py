"""How sequences are laid out for forward passes: packed, packed in one shape, or padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esm_packed.contacts import MOST_PAIRS
from esm_packed.model import ESM2
from esm_packed.outputs import needs_contacts
from esm_packed.packing import PackedBatch, fill, limit_pairs, pack, plan_packs
from esm_packed.padding import pad, padded_attention, plan_padded


@dataclass(frozen=True)
class Layout:
    """A way to lay sequences out.

    Args:
        name: its key in `LAYOUTS`.
        algorithm: what distributes sequences over packs.
        plan: lengths in tokens and token budget to the members of each pack.
        lay_out: residues of sequences and token budget to a batch on the CPU.
        prepare: gives the model that computes such batches, its weights not copied.
    """

    name: str
    algorithm: str
    plan: Callable[[npt.ArrayLike, int], list[npt.NDArray[np.int64]]]
    lay_out: Callable[[Sequence[npt.NDArray[np.uint8]], int], PackedBatch]
    prepare: Callable[[ESM2], ESM2] = lambda model: model

    def packs(
        self, lengths: npt.ArrayLike, token_budget: int, names: Iterable[str]
    ) -> list[npt.NDArray[np.int64]]:
        """Indices of the sequences of each pack, longest first.

        Args:
            lengths: (num_sequences,) tokens of each sequence, BOS and EOS included.
            token_budget: most tokens of a pack; a longer sequence is a pack of its own.
            names: of the outputs; for contacts packs are limited to `contacts.MOST_PAIRS`.
        """
        packs = self.plan(lengths, token_budget)
        return limit_pairs(packs, lengths, MOST_PAIRS) if needs_contacts(names) else packs


def _pack_in_one_shape(token_ids: Sequence[npt.NDArray[np.uint8]], token_budget: int) -> PackedBatch:
    batch = pack(token_ids)
    return fill(batch, -(-batch.total_tokens // token_budget) * token_budget)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("packed", "first-fit decreasing", plan_packs, lambda token_ids, token_budget: pack(token_ids)),
        Layout("fixed", "first-fit decreasing, packs of one size", plan_packs, _pack_in_one_shape),
        Layout(
            "padded",
            "padded, sorted by length",
            plan_padded,
            lambda token_ids, token_budget: pad(token_ids),
            lambda model: model.with_attention(("sdpa, padded", padded_attention)),
        ),
    )
}
"""`fixed` makes a sequence's embedding bit-identical regardless of batch contents.

Every pack is padded to `token_budget` tokens, or to a multiple of it for a single longer sequence. All matrix
multiplications then have one shape, and a row of their result depends only on the same row of the operand,
although the library chooses its algorithm by shape. All other operations work on single tokens or sequences.
"""
