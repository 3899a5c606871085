"""What a forward pass keeps alive at once, counted without a GPU: on the meta device, operations opaque.

Each operation then allocates its result and nothing else, as its Triton launcher does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esm_packed import ESM2, kernels
from esm_packed.config import ESM2_MODELS
from esm_packed.numerics import PRECISIONS

OPERATIONS = ("embed_tokens", "linear_rotary", "layer_norm", "add_layer_norm_", "linear_gelu")
TOTAL_TOKENS = 1000


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at once; parameters do not count."""

    def __init__(self, model: ESM2) -> None:
        super().__init__()
        self.peak = 0
        self._known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        return sum(num_bytes for _, num_bytes in self._alive.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.now()
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                storage = StorageWeakRef(result.untyped_storage())
                if storage.cdata not in self._known:
                    self._alive.setdefault(storage.cdata, (storage, result.untyped_storage().nbytes()))
        self.peak = max(self.peak, self.now())
        return results


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D", "esm2_t48_15B_UR50D"])
def test_a_forward_pass_keeps_little_alive(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream, the operand of fc1 and its result, which is four times as wide."""
    for operation in OPERATIONS:
        monkeypatch.setattr(kernels, operation, getattr(torch.ops.esm_packed, operation))
    monkeypatch.setattr(kernels, "linear", torch.nn.functional.linear)
    config, precision = ESM2_MODELS[name], PRECISIONS[dtype]
    with torch.device("meta"):
        model = ESM2(config, precision, ("opaque", torch.ops.esm_packed.packed_attention))
        model.requires_grad_(False)
        input_ids = torch.empty(TOTAL_TOKENS, dtype=torch.int32)
        cu_seqlens = torch.empty(11, dtype=torch.int32)
        model.forward_packed(input_ids, cu_seqlens, 100)  # makes the rotary tables
        with LiveBytes(model) as live:
            model.forward_packed(input_ids, cu_seqlens, 100, [config.num_layers])
    itemsize = precision.dtype.itemsize
    least = TOTAL_TOKENS * config.hidden_size * (4 + itemsize * (1 + 4))
    assert least <= live.peak <= 1.01 * least
