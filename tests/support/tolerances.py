"""One rule for comparing a result with its reference in any precision."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error, formed in FP64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def assert_as_close_as_pytorch(
    actual: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, factor: float = 2.0
) -> None:
    """The maximum error of `actual` is at most `factor` times PyTorch's own in that dtype plus one rounding.

    Args:
        actual: what is tested.
        same_dtype: plain PyTorch in the dtype of `actual`.
        truth: the same computation in a higher precision, on inputs rounded to that dtype.
        factor: how much further than PyTorch `actual` may be.
    """
    assert actual.shape == truth.shape == same_dtype.shape
    assert actual.isfinite().all()
    truth = truth.double()
    error = (actual.double() - truth).abs()
    yardstick = float((same_dtype.double() - truth).abs().max())
    rounding = float(truth.abs().max()) * torch.finfo(actual.dtype).eps / 2
    worst = int(error.argmax())
    assert float(error.max()) <= factor * yardstick + rounding, (
        f"max error {float(error.max()):.3e} at flat index {worst}; "
        f"PyTorch's {yardstick:.3e}, one rounding {rounding:.3e}"
    )
