"""What a precision mode must keep to: thresholds on the mean embedding of every protein."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """What the mean embedding of every protein must keep to.

    Args:
        relative_l2: at most; of the difference from the reference.
        cosine: at least, with the reference; None asks for nothing.
    """

    relative_l2: float
    cosine: float | None = None


THRESHOLDS = {
    "fp64": Threshold(1e-10),
    "fp32": Threshold(1e-5),
    "tf32": Threshold(5e-3, 0.99999),
    "fp16": Threshold(5e-3, 0.99999),
    "bf16": Threshold(3e-2, 0.9995),
}
