"""How large and how small activations get in each layer, against what FP16 can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esm_packed.model import ESM2

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14

RESIDUAL = "residual stream"
OPERATIONS = {
    "LayerNorm": ("attention_norm", "ffn_norm"),
    "query, key, value": ("qkv",),
    "attention": ("attention",),
    "attention output": ("attention_out",),
    "GELU": ("fc1",),
    "feed-forward output": ("fc2",),
}
"""Activations that an FP16 forward pass stores in FP16, and the parts of `model.Layer` that compute them."""


class Activations:
    """Largest magnitude, and share below FP16's smallest normal number, by layer and operation.

    Args:
        model: whose forward passes `recorded` looks at.
    """

    def __init__(self, model: ESM2) -> None:
        self._model = model
        self._totals: dict[tuple[str, int], torch.Tensor] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Look at what the operations of the model return while the block runs."""
        layers, final_norm = list(self._model.layers), self._model.final_norm
        norms = [*(layer.attention_norm for layer in layers), final_norm]
        with ExitStack() as hooks:
            for number, layer in enumerate(layers, 1):
                for operation, parts in OPERATIONS.items():
                    for part in parts:
                        hooks.enter_context(self._output_of(getattr(layer, part), operation, number))
            hooks.enter_context(self._output_of(final_norm, "LayerNorm", len(layers)))
            for number, norm in enumerate(norms):
                # the last argument is the residual stream, which is added to before the hook is called
                hooks.enter_context(
                    norm.register_forward_hook(
                        lambda norm, inputs, output, number=number: self._add(RESIDUAL, number, inputs[-1])
                    )
                )
            yield

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

    def _output_of(self, module: nn.Module, operation: str, layer: int) -> RemovableHandle:
        return module.register_forward_hook(
            lambda module, inputs, output: self._add(operation, layer, output)
        )

    def _add(self, operation: str, layer: int, values: torch.Tensor) -> None:
        magnitude = values.abs()
        small = ((magnitude < FP16_SMALLEST_NORMAL) & (magnitude > 0)).sum()
        seen = torch.stack(
            [magnitude.max().double(), small.double(), small.new_tensor(magnitude.numel()).double()]
        )
        totals = self._totals.setdefault((operation, layer), torch.zeros_like(seen))
        totals[0] = torch.maximum(totals[0], seen[0])
        totals[1:] += seen[1:]
