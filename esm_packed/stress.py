"""A seeded checkpoint that is as hard on half precision as a trained ESM-2, and harder where asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from esm_packed.checkpoints import Checkpoint, RandomTensors
from esm_packed.config import ESM2Config

TRAINED_PEAK = 140.0
"""Peak of the second and third largest channel of the trained 650M's residual stream; the largest is 468."""

_CONSTANT = -468.0
_FINAL_NORM_WEIGHT = 0.36
_QUERY_KEY_GAIN = 2.0
_RANDOM_GAIN = 7.0
_ORDINARY_PEAK = 38.0

_SEEDS_RECOGNISED = 100


def stress_checkpoint(config: ESM2Config, seed: int = 0, *, peak: float = TRAINED_PEAK) -> Checkpoint:
    """Weights whose activations imitate the real 650M's, for tests of precision.

    As `random:NAME`, but like a trained model's, one channel of the residual stream jumps to -468 in an early
    layer and stays there for every token. It dominates the output of the final LayerNorm, too (rms near 0.35,
    |max| near 6), which flatters every cosine and relative error. Attention is so sharp that BF16's error of
    residues at 33 layers is near the 2e-2 of trained models (FastPLMs, tests/parity).

    Args:
        config: shape of the model.
        seed: of the weights.
        peak: magnitude that two more channels reach in about one token of a few hundred, in the output of one
            matrix multiplication. FP16 ends at 65504; the weights themselves exceed that from a peak of about
            300,000 on in a model 96 wide, in wider ones later.
    """
    recipe = f"esm-packed stress weights, recipe 1: {config}, seed {seed}, peak {peak:g}"
    return Checkpoint(
        model_name=f"stress:{seed}" + ("" if peak == TRAINED_PEAK else f"@{peak:g}"),
        config=config,
        tensors=StressTensors(config, seed, peak),
        sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        source=recipe,
    )


class StressTensors(RandomTensors):
    """As `RandomTensors`, changed as `stress_checkpoint` says."""

    def __init__(self, config: ESM2Config, seed: int = 0, peak: float = TRAINED_PEAK) -> None:
        super().__init__(config, seed)
        self._peak = peak
        self._jump = f"layers.{config.num_layers // 6}."

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        jumps = name.startswith(self._jump)
        if name.endswith("fc2.bias"):
            tensor[self._constant_channel] = _CONSTANT if jumps else 0.0
        elif name.endswith("fc2.weight"):
            # layers share an ordinary row's peak, measured over all of them; the jump is one layer's alone
            gain = self._peak / _ORDINARY_PEAK * self._config.num_layers**0.5 if jumps else 1.0
            tensor[self._wild_channels] *= gain / _RANDOM_GAIN
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= _QUERY_KEY_GAIN
        elif name == "emb_layer_norm_after.weight":
            tensor[self._constant_channel] = _FINAL_NORM_WEIGHT
        return tensor.half().float()


def seeded_kind(checkpoint: Checkpoint) -> str | None:
    """`random` or `stress` for untrained weights, also when they come from a file; else None.

    Seeds 0 to 99 are recognized by a tensor that both recipes share.
    """
    tensors, config = checkpoint.tensors, checkpoint.config
    for seed in range(_SEEDS_RECOGNISED):
        random = RandomTensors(config, seed)
        if _same(tensors, random, "emb_layer_norm_after.bias"):
            return "random" if _same(tensors, random, "layers.0.self_attn.q_proj.weight") else "stress"
    return None


def _same(stored: Mapping[str, torch.Tensor], seeded: RandomTensors, name: str) -> bool:
    return torch.allclose(stored[name].float(), seeded[name], rtol=1e-2, atol=1e-3)
