"""Verdicts: whether a precision mode passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esm_packed.reports.validation.errors import PathResult, finite_max, finite_min
from esm_packed.reports.validation.thresholds import Threshold

CLASSICAL_NOTE = (
    "The classical test, cosine >= 0.999 for 99% of the proteins and >= 0.995 for all, is shown but does not "
    "decide: it does not separate right from wrong models. EOS in the mean, recomputed rotary frequencies, "
    "angles in FP16 and tanh GELU all pass it."
)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one mode, over all its paths.

    Args:
        mode: precision mode.
        threshold: limits that decide.
        passed: whether every protein is within `threshold` on every path.
        num_failed: proteins outside `threshold` on at least one path.
        num_nonfinite: proteins with NaN or Inf in their embedding on at least one path; these fail.
        worst_path, worst_protein: path and number of the protein with the largest error, among the failures
            if there are any.
        worst_relative_l2: largest of the finite embeddings; None if none is finite.
        worst_cosine: smallest of the finite embeddings; None if none is finite.
        classical: whether every path passes the classical test of `CLASSICAL_NOTE`.
    """

    mode: str
    threshold: Threshold
    passed: bool
    num_failed: int
    num_nonfinite: int
    worst_path: str
    worst_protein: int
    worst_relative_l2: float | None
    worst_cosine: float | None
    classical: bool


def judge(mode: str, paths: Sequence[PathResult], threshold: Threshold) -> Verdict:
    """The verdict on `mode` from all its paths, at least one."""
    relative_l2 = torch.stack([path.means.relative_l2 for path in paths])
    cosine = torch.stack([path.means.cosine for path in paths])
    nonfinite = ~relative_l2.isfinite()
    # written so that NaN fails
    kept = relative_l2 <= threshold.relative_l2
    if threshold.cosine is not None:
        kept &= cosine >= threshold.cosine
    errors = torch.where(nonfinite, float("inf"), relative_l2)
    worst = int(errors.where(~kept | kept.all(), -1.0).argmax())
    path, protein = divmod(worst, relative_l2.shape[1])
    return Verdict(
        mode=mode,
        threshold=threshold,
        passed=bool(kept.all()),
        num_failed=int((~kept).any(0).sum()),
        num_nonfinite=int(nonfinite.any(0).sum()),
        worst_path=paths[path].path,
        worst_protein=protein,
        worst_relative_l2=finite_max(relative_l2),
        worst_cosine=finite_min(cosine),
        classical=all(passes_classical_pair(path.means.cosine) for path in paths),
    )


def passes_classical_pair(cosine: torch.Tensor) -> bool:
    """Whether cosine is >= 0.999 for 99% of the proteins and >= 0.995 for all."""
    return bool((cosine >= 0.999).double().mean() >= 0.99) and bool((cosine >= 0.995).all())
