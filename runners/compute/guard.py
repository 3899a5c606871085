"""Checks against FP32: non-finite rows are recomputed, and a sample of the others is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from esm_packed.embedding import embed_in_windows
from esm_packed.model import ESM2
from esm_packed.numerics import is_out_of_memory
from esm_packed.outputs import kind_of
from esm_packed.rescue import Rescue
from esm_packed.runners.state.shard import (
    STATUS_FAILED,
    STATUS_RECOMPUTED,
    Comparison,
    Items,
    ItemStatus,
    Rows,
)
from esm_packed.windows import Windows

TokenIds = npt.NDArray[np.uint8]


class Guard:
    """Recomputes single sequences in FP32.

    Args:
        model: the model whose results are checked.
        names: names of the outputs that are kept.
        in_fp32: loads the model in FP32, called at most once; None if `model` computes in FP32 or better.
        windows: how long proteins are cut.
    """

    def __init__(
        self,
        model: ESM2,
        names: Sequence[str],
        in_fp32: Callable[[], ESM2] | None,
        windows: Windows | None = None,
    ) -> None:
        self._model = model
        self._names = list(names)
        self._rescue = Rescue(in_fp32)
        self._windows = windows

    def rescue(self, rows: Mapping[str, Rows], token_ids: TokenIds, sites: Items | None = None) -> ItemStatus:
        """Replace non-finite outputs of a sequence by FP32 results, or by NaN.

        Args:
            rows: by name, (columns,) or (rows, columns), modified in place.
            token_ids: residues of the sequence.
            sites: sites whose log-probabilities are read.

        Returns:
            The resulting status.
        """
        stored = next(iter(rows.values())).dtype
        rescued, reason = self._rescue.replace(
            rows,
            lambda fp32: self._alone(token_ids, fp32, sites),
            f"dtype {self._model.precision}, stored as {stored}",
        )
        if not rescued and stored == np.float16:
            reason += "; --store-dtype fp32 keeps larger values"
        status = STATUS_RECOMPUTED if rescued else STATUS_FAILED
        return ItemStatus(status, f"the embedding is {reason}")

    def compare(
        self, rows: Mapping[str, Rows], token_ids: TokenIds, sites: Items | None = None
    ) -> Comparison | None:
        """Compare outputs of a sequence with those of the same sequence computed alone in FP32.

        Args:
            rows: by name; the mean of the last layer is compared, or, without a mean, the last output.
            token_ids: residues of the sequence.
            sites: sites whose log-probabilities are read.

        Returns:
            The comparison; None if there is not enough memory.
        """
        try:
            alone = self._alone(token_ids, self._rescue.model or self._model, sites)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        means = [name for name in self._names if kind_of(name) == "mean"]
        name = (means or self._names)[-1]
        truth, row = (each[name].astype(np.float64).ravel() for each in (alone, rows))
        norms = float(np.linalg.norm(row)), float(np.linalg.norm(truth))
        return Comparison(
            cosine=float(row @ truth) / (norms[0] * norms[1]),
            max_error=float(np.abs(row - truth).max()),
            relative_error=float(np.linalg.norm(row - truth)) / norms[1],
        )

    def _alone(self, token_ids: TokenIds, model: ESM2, sites: Items | None) -> dict[str, Rows]:
        return embed_in_windows(model, token_ids, self._names, self._windows, sites)
