"""How large and how small activations get in each layer, against what FP16 can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from esm_packed import kernels
from esm_packed.attention import PackedAttention
from esm_packed.model import ESM2

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14

RESIDUAL = "residual stream"
OPERATIONS = {
    "LayerNorm": ("attention_norm", "ffn_norm"),
    "query, key, value": ("qkv",),
    "attention": ("attend",),
    "attention output": ("attention_out",),
    "GELU": ("fc1",),
    "feed-forward output": ("fc2",),
}
"""What an FP16 forward pass stores in FP16, and the parts of `model.Layer` that compute it."""

_RECORDED = ("linear", "linear_gelu", "layer_norm", "add_layer_norm_")


class Activations:
    """Largest magnitude, and share below FP16's smallest normal number, by layer and operation.

    Args:
        model: whose forward passes `recorded` looks at.
    """

    def __init__(self, model: ESM2) -> None:
        self._model = model
        self._totals: dict[tuple[str, int], torch.Tensor] = {}
        parts = {part: operation for operation, parts in OPERATIONS.items() for part in parts}
        self._of_weight = {
            id(getattr(layer, part).weight): (operation, number)
            for number, layer in enumerate(model.layers, 1)
            for part, operation in parts.items()
            if part != "attend"
        }
        self._last = model.config.num_layers
        self._of_weight[id(model.final_norm.weight)] = ("LayerNorm", self._last)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Look at what the operations of the model return while the block runs.

        The weights are arguments of functions, not modules that are called, so that no hook of torch's would
        see anything: the functions are replaced, and tell the layer by its weight.
        """
        originals = {name: getattr(kernels, name) for name in _RECORDED}
        attend = self._model.attend
        try:
            for name, original in originals.items():
                setattr(kernels, name, self._wrapped(original, 2 if name == "add_layer_norm_" else 1))
            self._model.attend = self._attend_in_turn(attend)
            yield
        finally:
            for name, original in originals.items():
                setattr(kernels, name, original)
            self._model.attend = attend

    def add_residual(self, representations: Mapping[int, torch.Tensor]) -> None:
        """Count the residual stream as `ESM2.forward_packed` returns it, before its last layer."""
        for layer, hidden_states in representations.items():
            if layer < self._last:
                self._add(RESIDUAL, layer, hidden_states)

    def max_abs(self, operation: str, layer: int) -> float | None:
        """Largest magnitude in one of `OPERATIONS`, layers from 1, or `RESIDUAL`, from 0; None if unseen."""
        totals = self._totals.get((operation, layer))
        return None if totals is None else float(totals[0])

    def subnormal_share(self, operation: str, layer: int) -> float | None:
        """Share of the values that FP16 holds as subnormal numbers, with fewer than 11 bits, or as zero."""
        totals = self._totals.get((operation, layer))
        return None if totals is None else float(totals[1] / totals[2])

    def layers_of(self, operation: str) -> Iterable[int]:
        """The layers in which an operation was seen, ascending."""
        return sorted(layer for name, layer in self._totals if name == operation)

    def _wrapped(self, original: Any, weight_position: int) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            if (place := self._of_weight.get(id(arguments[weight_position]))) is not None:
                self._add(*place, result)
            if arguments[weight_position] is self._model.final_norm.weight:
                self._add(RESIDUAL, self._last, arguments[1])
            return result

        return operation

    def _attend_in_turn(self, attend: PackedAttention) -> PackedAttention:
        layer = 0

        def recorded(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            cu_seqlens: torch.Tensor,
            max_seqlen: int,
            softmax_scale: float,
        ) -> torch.Tensor:
            nonlocal layer
            attended = attend(query, key, value, cu_seqlens, max_seqlen, softmax_scale)
            layer = layer % self._last + 1
            self._add("attention", layer, attended)
            return attended

        return recorded

    def _add(self, operation: str, layer: int, values: torch.Tensor) -> None:
        magnitude = values.abs()
        small = ((magnitude < FP16_SMALLEST_NORMAL) & (magnitude > 0)).sum()
        seen = torch.stack(
            [magnitude.max().double(), small.double(), small.new_tensor(magnitude.numel()).double()]
        )
        totals = self._totals.setdefault((operation, layer), torch.zeros_like(seen))
        totals[0] = torch.maximum(totals[0], seen[0])
        totals[1:] += seen[1:]
