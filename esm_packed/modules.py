"""The parts of a transformer layer as modules that compute by `esm_packed.kernels`.

Weights have the dtype they are built with, attention the backend. Forward hooks see every part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from esm_packed import kernels
from esm_packed.alphabet import VOCAB_SIZE
from esm_packed.attention import PackedAttention
from esm_packed.config import LAYER_NORM_EPS, ESM2Config
from esm_packed.kernels.matmul import (
    interleave_heads_,
    pack_weight,
    separate_heads_,
    wants_interleaved_heads,
)
from esm_packed.packing import PackedBatch


class Linear(nn.Linear):
    """A linear layer: (total_tokens, in_features) to (total_tokens, out_features)."""

    is_packed = False
    """Whether weights are as `pack` leaves them."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return kernels.linear(hidden_states, self.weight, self.bias)

    def pack(self) -> None:
        """Bring weights into the layout that computes fastest where they are; the old one is not kept."""
        self._set(weight=pack_weight(self.weight))
        self.is_packed = True

    def unpack(self) -> None:
        """Undo `pack`."""
        self._set(**self.unpacked())
        self.is_packed = False

    def unpacked(self) -> dict[str, torch.Tensor]:
        """Weight and bias as they were before `pack`; not copied where they still are."""
        return {"weight": self.weight.to_dense() if self.weight.is_mkldnn else self.weight, "bias": self.bias}

    def _set(self, **parameters: torch.Tensor) -> None:
        for name, values in parameters.items():
            setattr(self, name, nn.Parameter(values, requires_grad=False))

    @contextmanager
    def _unpacked_meanwhile(self) -> Iterator[None]:
        """What goes wrong meanwhile leaves the weights unpacked, which is slower and as right."""
        was_packed = self.is_packed
        if was_packed:
            self.unpack()
        yield
        if was_packed:
            self.pack()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear:
        with self._unpacked_meanwhile():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": values.detach() for name, values in self.unpacked().items()})

    def _load_from_state_dict(self, *arguments: Any) -> None:
        with self._unpacked_meanwhile():
            super()._load_from_state_dict(*arguments)
            # with `assign` they are the caller's, whom reordering in place would surprise
            self._set(weight=self.weight.clone(), bias=self.bias.clone())

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layout can neither be copied nor pickled
        parameters = {
            name: nn.Parameter(values, requires_grad=False) for name, values in self.unpacked().items()
        }
        return self.__dict__ | {"_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.is_packed:
            self.pack()


class LinearGELU(Linear):
    """A linear layer followed by the exact GELU."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return kernels.linear_gelu(hidden_states, self.weight, self.bias)


class QKVProjection(Linear):
    """The projection to queries, keys and values, of which the first two are rotated by their position.

    On a CPU `pack` lets the two halves of each head of queries and keys alternate (`interleave_heads_`).
    Attention does not see it, forward hooks do.
    """

    is_interleaved = False

    def __init__(self, hidden_size: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, 3 * hidden_size, dtype=dtype)
        self.head_dim = head_dim

    def pack(self) -> None:
        if not self.is_interleaved and wants_interleaved_heads(self.weight):
            for rows in (self.weight, self.bias):
                interleave_heads_(rows, self.head_dim)
            self.is_interleaved = True
        super().pack()

    def unpack(self) -> None:
        super().unpack()
        self.is_interleaved = False

    def unpacked(self) -> dict[str, torch.Tensor]:
        parameters = super().unpacked()
        if not self.is_interleaved:
            return parameters
        copies = {
            name: rows.clone() if rows is getattr(self, name) else rows for name, rows in parameters.items()
        }
        for rows in copies.values():
            separate_heads_(rows, self.head_dim)
        return copies

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"is_interleaved": False}

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Project and rotate.

        Args:
            hidden_states: (total_tokens, hidden_size).
            rotary_tables: what `RotaryTables` gives.
            position_ids: (total_tokens,) int32 position of each token in its sequence.

        Returns:
            (total_tokens, 3 * hidden_size), in the order of the weights.
        """
        return kernels.linear_rotary(
            hidden_states, self.weight, self.bias, *rotary_tables, position_ids, self.is_interleaved
        )


class LayerNorm(nn.LayerNorm):
    """LayerNorm, alone or fused with the addition to the residual stream before it."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, LAYER_NORM_EPS, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize (total_tokens, hidden_size) rows.

        Args:
            hidden_states: the rows, or what is added to `residual`.
            residual: the residual stream, modified: `hidden_states` is added, and the sum is normalized.

        Returns:
            (total_tokens, hidden_size) in the dtype of the weights.
        """
        if residual is None:
            return kernels.layer_norm(hidden_states, self.weight, self.bias, self.eps)
        return kernels.add_layer_norm_(hidden_states, residual, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Attention of every sequence with itself, by one backend. Has no weights.

    Args:
        config: shape of the model.
        attend: the backend's function.
    """

    def __init__(self, config: ESM2Config, attend: PackedAttention) -> None:
        super().__init__()
        self.config = config
        self.attend = attend

    def forward(self, qkv: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Attend.

        Args:
            qkv: (total_tokens, 3 * hidden_size), with queries and keys rotated.
            batch: where the sequences begin.

        Returns:
            (total_tokens, hidden_size).
        """
        num_heads, head_dim = self.config.num_heads, self.config.head_dim
        query, key, value = qkv.view(-1, 3, num_heads, head_dim).unbind(1)
        attended = self.attend(query, key, value, batch.cu_seqlens, batch.max_seqlen, head_dim**-0.5)
        return attended.view(-1, self.config.hidden_size)


class LMHead(nn.Module):
    """Predicts each token; the output projection is the embedding table."""

    def __init__(self, config: ESM2Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = LinearGELU(config.hidden_size, config.hidden_size, dtype=dtype)
        self.norm = LayerNorm(config.hidden_size, dtype)
        self.bias = nn.Parameter(torch.empty(VOCAB_SIZE, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return kernels.linear(self.norm(self.dense(hidden_states)), embedding, self.bias)
