"""Measures how many tokens a pack may hold on a GPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.alphabet import encode
from esm_packed.model import ESM2
from esm_packed.outputs import mean_of
from esm_packed.packing import SPECIAL_TOKENS, pack

PROBE_LENGTH = 510
"""Residues of each sequence used to measure."""

PROBE_SEQUENCES = (4, 16)
MEMORY_SHARE = 0.8
"""Share of the free memory to use; the rest is for fragmentation and packs in flight."""

STEP = 1024


def probe(num_sequences: int) -> list[npt.NDArray[np.uint8]]:
    """`num_sequences` sequences of PROBE_LENGTH residues."""
    return [np.resize(encode("ACDEFGHIKLMNPQRSTVWY"), PROBE_LENGTH)] * num_sequences


def peak_memory(model: ESM2, num_sequences: int) -> int:
    """Peak bytes of GPU memory while embedding `num_sequences` sequences of PROBE_LENGTH residues."""
    batch = pack(probe(num_sequences)).to(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.embed_packed(batch, [mean_of(model.config.num_layers)])
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device)


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch's allocator could provide on a GPU now."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def measured_token_budget(model: ESM2, most: int) -> int:
    """Tokens that fit into the free memory of the model's GPU.

    Two packs of different sizes give the bytes per token; a share of the free memory is divided by that.

    Args:
        model: on its GPU.
        most: tokens beyond which larger packs gain nothing.

    Returns:
        `most` if it fits, else a multiple of 1,024, at least 1,024.
    """
    small, large = (peak_memory(model, count) for count in PROBE_SEQUENCES)
    tokens = (PROBE_SEQUENCES[1] - PROBE_SEQUENCES[0]) * (PROBE_LENGTH + SPECIAL_TOKENS)
    bytes_per_token = max(1.0, (large - small) / tokens)
    fitting = int(MEMORY_SHARE * free_memory(model.device) / bytes_per_token)
    return most if fitting >= most else max(STEP, fitting // STEP * STEP)
