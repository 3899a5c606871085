"""Recomputation in FP32 of sequences with NaN or Inf, for `ESM2.embed` and for runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from esm_packed.numerics import is_out_of_memory

if TYPE_CHECKING:
    from esm_packed.model import ESM2

SEQUENCES_NAMED = 20
"""Sequences that a warning names at most."""

Embeddings = npt.NDArray[np.floating[Any]]


class Rescue:
    """Replaces outputs with NaN or Inf, one sequence at a time.

    Args:
        load: returns the model in FP32; called once, when it is first needed. None if the outputs are already
            in FP32 or better.
    """

    def __init__(self, load: Callable[[], ESM2] | None) -> None:
        self._load = load

    @cached_property
    def model(self) -> ESM2 | None:
        """The model in FP32."""
        return None if self._load is None else self._load()

    def replace(
        self, rows: Mapping[str, Embeddings], compute: Callable[[ESM2], Mapping[str, Embeddings]], where: str
    ) -> tuple[bool, str]:
        """Overwrite `rows` by what FP32 gives, or by NaN if that is not finite either.

        Args:
            rows: outputs of a sequence by name, modified.
            compute: gives the same from a model, for the sequence alone.
            where: what `rows` were not finite in, for the reason.

        Returns:
            Whether `rows` are finite now, and the reason why they are not what they were.
        """
        reason = f"not finite ({where})"
        try:
            if self.model is not None:
                for name, in_fp32 in compute(self.model).items():
                    with np.errstate(over="ignore"):  # too large for FP16 becomes Inf
                        rows[name][...] = in_fp32
                if is_finite(rows):
                    return True, f"{reason}; recomputed in fp32"
                reason += ", nor in fp32"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason += ", and there is not enough memory to compute it in fp32"
        for row in rows.values():
            row[...] = math.nan
        return False, reason


def is_finite(rows: Mapping[str, Embeddings]) -> bool:
    """Whether there is neither NaN nor Inf in any output of `rows`."""
    return all(bool(np.isfinite(row).all()) for row in rows.values())


def named(indices: Sequence[int]) -> str:
    """`sequences[0], sequences[3]`, the first of them if there are many."""
    more = f" and {len(indices) - SEQUENCES_NAMED} more" if len(indices) > SEQUENCES_NAMED else ""
    return ", ".join(f"sequences[{index}]" for index in indices[:SEQUENCES_NAMED]) + more
