"""Thresholds on the mean embedding of every protein, and the errors that they were derived from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """Limits on the mean embedding of every protein.

    Args:
        relative_l2: largest relative L2 error allowed.
        cosine: smallest cosine with the reference allowed; None sets no limit.
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

DERIVED_FROM = "35 proteins, stress weights in the shape of the 8M model, compared with FP64"
"""What the errors below were measured on; `tests/support/mistakes.py` measures them."""

ERRORS_OF_THE_CORRECT_MODEL = {"fp32": 1.83e-7, "fp16": 1.23e-4, "bf16": 3.03e-3}
"""Worst relative L2 error of a mean embedding, by mode."""

ERRORS_OF_MISTAKES = {
    "sequence boundaries shifted by one token": 1.22e-2,
    "EOS included in the mean": 3.42e-3,
    "rotary angles formed in FP16": 8.91e-4,
    "token dropout left out": 6.41e-4,
    "rotary frequencies recomputed in FP32": 4.83e-4,
    "matrix multiplications in TF32": 7.17e-5,
    "tanh GELU in place of the exact form": 6.05e-5,
}
"""Worst relative L2 error of a mean embedding in FP32, by the mistake made on purpose."""
