"""How many tokens a pack may hold on a GPU: measured, not guessed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.alphabet import encode
from esm_packed.model import ESM2
from esm_packed.packing import SPECIAL_TOKENS, pack

PROBE_LENGTH = 510
"""Residues of the sequences measured with."""

PROBE_SEQUENCES = (4, 16)
MEMORY_SHARE = 0.8
"""Of the memory that is free; the rest is for fragmentation and for packs in flight."""

STEP = 1024


class Meter(Protocol):
    """Memory of a device, in bytes."""

    def peak(self, model: ESM2, num_sequences: int) -> int:
        """Most memory in use while so many sequences of PROBE_LENGTH residues are embedded."""
        ...

    def free(self) -> int:
        """Memory that could be had now."""
        ...


class CudaMeter:
    """The memory of a GPU as PyTorch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self, model: ESM2, num_sequences: int) -> int:
        """See `Meter`."""
        batch = pack(probe(num_sequences)).to(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        model.embed_packed(batch, [model.config.num_layers])
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def free(self) -> int:
        """See `Meter`."""
        reserved = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + reserved


def probe(num_sequences: int) -> list[npt.NDArray[np.uint8]]:
    """So many sequences of PROBE_LENGTH residues."""
    return [np.resize(encode("ACDEFGHIKLMNPQRSTVWY"), PROBE_LENGTH)] * num_sequences


def measured_token_budget(model: ESM2, most: int, meter: Meter | None = None) -> int:
    """Tokens that fit into the free memory of the model's device.

    Two packs of different size give the bytes per token; a share of the free memory is divided by them.

    Args:
        model: on its device.
        most: tokens beyond which larger packs gain nothing.
        meter: of memory; None for that of the model's GPU.

    Returns:
        At most `most`, a multiple of 1,024 from 1,024 on.
    """
    meter = meter or CudaMeter(model.device)
    small, large = (meter.peak(model, count) for count in PROBE_SEQUENCES)
    tokens = (PROBE_SEQUENCES[1] - PROBE_SEQUENCES[0]) * (PROBE_LENGTH + SPECIAL_TOKENS)
    bytes_per_token = max(1.0, (large - small) / tokens)
    fitting = int(MEMORY_SHARE * meter.free() / bytes_per_token)
    return max(STEP, min(most, fitting) // STEP * STEP)
