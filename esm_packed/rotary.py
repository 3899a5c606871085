"""Rotary position embedding (Su et al. 2021): the angles of every position, and their tables."""

from __future__ import annotations

import torch
from torch import nn

MIN_POSITIONS = 1026
"""Tables begin with room for what ESM-2 was trained on, so that they seldom grow."""


class RotaryTables(nn.Module):
    """Cosine and sine of position x frequency, grown when a longer sequence comes.

    Args:
        head_dim: width of an attention head; half as many frequencies.
        dtype: of angles and tables, FP32 or FP64.

    Attributes:
        inv_freq: (head_dim / 2,) frequencies, read from the checkpoint.
    """

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inv_freq: torch.Tensor = nn.Buffer(torch.empty(head_dim // 2, dtype=dtype), persistent=False)
        self.cos: torch.Tensor = nn.Buffer(torch.empty(0, dtype=dtype), persistent=False)
        self.sin: torch.Tensor = nn.Buffer(torch.empty(0, dtype=dtype), persistent=False)
        self._outgrown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, max_seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of cosines and sines, each (at least max_seqlen, head_dim / 2)."""
        if len(self.cos) < max_seqlen:
            # A captured CUDA graph may still read the tables it was captured with.
            self._outgrown.append((self.cos, self.sin))
            size = max(max_seqlen, 2 * len(self.cos), MIN_POSITIONS)
            positions = torch.arange(size, dtype=self.inv_freq.dtype, device=self.inv_freq.device)
            angles = torch.outer(positions, self.inv_freq)
            self.cos, self.sin = angles.cos(), angles.sin()
        return self.cos, self.sin
