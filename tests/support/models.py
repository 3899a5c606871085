"""Models of checkpoints in memory, on the CPU."""

from __future__ import annotations

import torch

from esm_packed import ESM2
from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint
from esm_packed.numerics import PRECISIONS, Precision

CPU = torch.device("cpu")


def model_of(checkpoint: Checkpoint, mode: str | Precision) -> ESM2:
    """The model in a precision, or in the one of that name."""
    precision = PRECISIONS[mode] if isinstance(mode, str) else mode
    backend = select_backend("auto", CPU, precision, checkpoint.config.head_dim)
    return ESM2.from_checkpoint(checkpoint, CPU, precision, backend)
