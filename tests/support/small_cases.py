"""Arguments of every operation in small, odd shapes, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esm_packed.kernels.cases import CASES, Arguments, Workload

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Widths:
    """Widths of a transformer that need not fit together."""

    hidden_size: int = 48
    num_heads: int = 2
    head_dim: int = 24
    ffn_size: int = 80


SMALL = Widths()


def example(
    name: str,
    lengths: Sequence[int],
    dtype: torch.dtype,
    widths: Widths = SMALL,
    residual_dtype: torch.dtype | None = None,
) -> Arguments:
    """Arguments of a case for a pack, with attention far from uniform, so that a key too many is seen."""
    arguments = CASES[name].arguments(Workload(widths, lengths, CPU), dtype, residual_dtype)
    if "query" in arguments:
        arguments["query"] = arguments["query"] * 2
    return arguments
