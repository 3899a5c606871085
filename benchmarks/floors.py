"""Floors of the forward pass: its matrix multiplications and its attention, alone.

They run on the packs of esm-packed and the model's own weights, with random activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from weakref import WeakKeyDictionary

import torch
from contenders.packages import lay_out

from esm_packed.attention import PackedAttention, select_backend
from esm_packed.model import ESM2, Layer

MATMULS = ("qkv", "attention_out", "fc1", "fc2")

Multiply = Callable[[torch.Tensor, torch.nn.Linear, torch.Tensor], object]

_dense: WeakKeyDictionary[torch.nn.Linear, torch.Tensor] = WeakKeyDictionary()
_packed: WeakKeyDictionary[torch.nn.Linear, torch.Tensor] = WeakKeyDictionary()


def _mm(states: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor) -> object:
    if linear not in _dense:
        _dense[linear] = linear.weight.to_dense()
    return torch.mm(states, _dense[linear].T, out=out)


def _onednn(states: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor) -> object:
    if linear not in _packed:
        weight = linear.weight.to_dense()
        _packed[linear] = torch.ops.mkldnn._reorder_linear_weight(weight, len(states))
    return torch.ops.mkldnn._linear_pointwise(states, _packed[linear], linear.bias, "none", [], "")


class MatmulFloor:
    """All matrix multiplications: `torch.mm` into preallocated memory, or the faster of it and oneDNN."""

    def __init__(self, model: ESM2, token_budget: int, *, best: bool) -> None:
        self.model = model
        self.token_budget = token_budget
        self.best = best
        self.multiply: dict[str, Multiply] = dict.fromkeys(MATMULS, _mm)

    @property
    def backend(self) -> str:
        """Which function each matrix multiplication runs through."""
        return ", ".join(f"{name}: {multiply.__name__[1:]}" for name, multiply in self.multiply.items())

    @torch.inference_mode()
    def prepare(self, sequences: Sequence[str]) -> None:
        packs = lay_out(sequences, self.token_budget)
        self.num_rows = [batch.total_tokens for _, batch in packs]
        self.padded_tokens = sum(self.num_rows)
        linears = [getattr(next(iter(self.model.layers)), name) for name in MATMULS]
        most, like = max(self.num_rows), self.model.embedding.weight
        self.states = {width: torch.randn_like(like.new_empty(most, width)) for width in _widths(linears, 1)}
        self.outputs = {width: like.new_empty(most, width) for width in _widths(linears, 0)}
        if self.best:
            self.multiply = {name: self._faster(name) for name in MATMULS}

    @torch.inference_mode()
    def run(self) -> None:
        for num_rows in self.num_rows:
            for layer in self.model.layers:
                for name, multiply in self.multiply.items():
                    self._one(multiply, layer, name, num_rows)

    def _one(self, multiply: Multiply, layer: Layer, name: str, num_rows: int) -> None:
        linear: torch.nn.Linear = getattr(layer, name)
        out_features, in_features = linear.weight.shape
        multiply(self.states[in_features][:num_rows], linear, self.outputs[out_features][:num_rows])

    def _faster(self, name: str) -> Multiply:
        """The faster in three interleaved trials, over all layers of one pack."""
        seconds: dict[Multiply, list[float]] = {_mm: [], _onednn: []}
        for multiply, layer in product(seconds, self.model.layers):
            self._one(multiply, layer, name, max(self.num_rows))
        for _ in range(3):
            for multiply, measured in seconds.items():
                start = time.perf_counter()
                for layer in self.model.layers:
                    self._one(multiply, layer, name, max(self.num_rows))
                measured.append(time.perf_counter() - start)
        return min(seconds, key=lambda multiply: min(seconds[multiply]))


def _widths(linears: Sequence[torch.nn.Linear], dimension: int) -> set[int]:
    return {linear.weight.shape[dimension] for linear in linears}


class AttentionFloor:
    """The attention backend of every layer on random queries, keys and values laid out as in the model."""

    def __init__(self, model: ESM2, token_budget: int) -> None:
        self.config = model.config
        self.like = model.embedding.weight
        self.token_budget = token_budget
        self.attend: PackedAttention
        self.backend, self.attend = select_backend(
            model.attention_backend, model.device, model.precision_mode, self.config.head_dim
        )

    @torch.inference_mode()
    def prepare(self, sequences: Sequence[str]) -> None:
        self.batches = [batch for _, batch in lay_out(sequences, self.token_budget)]
        self.padded_tokens = sum(batch.total_tokens for batch in self.batches)
        most = max(batch.total_tokens for batch in self.batches)
        shape = (most, 3, self.config.num_heads, self.config.head_dim)
        self.qkv = torch.randn_like(self.like.new_empty(shape))

    @torch.inference_mode()
    def run(self) -> None:
        scale = self.config.head_dim**-0.5
        for batch in self.batches:
            query, key, value = self.qkv[: batch.total_tokens].unbind(1)
            for _ in range(self.config.num_layers):
                self.attend(query, key, value, batch.cu_seqlens, batch.max_seqlen, scale)
