"""What is held against FP32: rows that are not finite, and a sample of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from esm_packed.model import ESM2
from esm_packed.numerics import is_out_of_memory
from esm_packed.packing import pack
from esm_packed.rescue import Rescue
from esm_packed.runners.state.shard import (
    STATUS_FAILED,
    STATUS_RECOMPUTED,
    Comparison,
    ItemStatus,
    Rows,
)

TokenIds = npt.NDArray[np.uint8]


class Guard:
    """Recomputes single sequences in FP32.

    Args:
        model: whose results are looked at.
        layers: that are kept.
        in_fp32: loads the model in FP32, called at most once; None where `model` computes in FP32 or better.
    """

    def __init__(self, model: ESM2, layers: Sequence[int], in_fp32: Callable[[], ESM2] | None) -> None:
        self._model = model
        self._layers = list(layers)
        self._rescue = Rescue(in_fp32)

    def rescue(self, rows: Mapping[int, Rows], token_ids: Sequence[TokenIds]) -> dict[int, ItemStatus]:
        """Replace what is not finite by what FP32 gives, or by NaN.

        Args:
            rows: layer to (n, hidden_size), modified.
            token_ids: residues of the n sequences.

        Returns:
            Place among the n to what became of it, for those that were not finite.
        """
        finite = np.ones(len(token_ids), np.bool_)
        for values in rows.values():
            finite &= np.isfinite(values).all(axis=1)
        statuses = {}
        for place in np.flatnonzero(~finite).tolist():
            stored = next(iter(rows.values())).dtype
            rescued, reason = self._rescue.replace(
                {layer: values[place] for layer, values in rows.items()},
                partial(self._alone, token_ids[place]),
                f"dtype {self._model.precision}, stored as {stored}",
            )
            status = STATUS_RECOMPUTED if rescued else STATUS_FAILED
            statuses[place] = ItemStatus(status, f"the embedding is {reason}")
        return statuses

    def compare(self, row: Rows, token_ids: TokenIds) -> Comparison | None:
        """How a row of the last layer compares with the same sequence in FP32 on its own.

        Args:
            row: (hidden_size,).
            token_ids: residues of the sequence.

        Returns:
            None where memory does not suffice.
        """
        try:
            alone = self._alone(token_ids, self._rescue.model or self._model)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        truth, row = alone[self._layers[-1]].astype(np.float64), row.astype(np.float64)
        norms = float(np.linalg.norm(row)), float(np.linalg.norm(truth))
        return Comparison(
            cosine=float(row @ truth) / (norms[0] * norms[1]),
            max_error=float(np.abs(row - truth).max()),
            relative_error=float(np.linalg.norm(row - truth)) / norms[1],
        )

    def _alone(self, token_ids: TokenIds, model: ESM2) -> dict[int, npt.NDArray[np.float32]]:
        """Embeddings by layer of one sequence in a pack of its own."""
        rows_by_layer = model.embed_packed(pack([token_ids]).to(model.device), self._layers)
        return {layer: rows[0].cpu().numpy() for layer, rows in rows_by_layer.items()}
