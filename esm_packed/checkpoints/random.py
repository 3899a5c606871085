"""Seeded random weights that make activations like a trained model's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from esm_packed.alphabet import PAD_ID
from esm_packed.checkpoints.names import Checkpoint, rounded_inv_freq, tensor_shapes
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.errors import CheckpointError


def random_checkpoint(name: str) -> Checkpoint:
    model, _, seed_text = name.removeprefix("random:").removeprefix("facebook/").partition("@")
    if model not in ESM2_MODELS or not re.fullmatch("[0-9]{0,9}", seed_text):
        raise CheckpointError(
            f"{name!r} should be random:NAME or random:NAME@SEED, with a NAME of {', '.join(ESM2_MODELS)}"
        )
    seed = int(seed_text or 0)
    recipe = f"esm-packed random weights, recipe 1: {model}, seed {seed}"
    return Checkpoint(
        model_name=f"random:{model}" + (f"@{seed}" if seed else ""),
        config=ESM2_MODELS[model],
        tensors=RandomTensors(ESM2_MODELS[model], seed),
        sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        source=recipe,
    )


class RandomTensors(Mapping[str, torch.Tensor]):
    """A complete set of seeded random weights, each made when it is asked for; FP32 holding FP16 values.

    They make activations like a trained model's (measured on the real 650M): a residual stream that grows to
    an rms near 15, with one channel near -340 in every token and two more that reach into the hundreds;
    attention far from uniform; a last layer with rms near 0.3. A freshly initialized model has none of this
    and makes half precision look better than it is.

    Args:
        config: shape of the model.
        seed: a tensor depends on this and its own name only.
    """

    def __init__(self, config: ESM2Config, seed: int = 0) -> None:
        self._config = config
        self._seed = seed
        self._shapes = tensor_shapes(config)
        channels = torch.randperm(config.hidden_size, generator=self._generator("outliers"), device="cpu")
        self._constant_channel, self._wild_channels = channels[0], channels[1:3]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        if name.endswith("inv_freq"):
            return rounded_inv_freq(self._config.head_dim)
        shape = self._shapes[name]
        kind = re.sub(r"^layers\.\d+\.|^contact_head\.", "", name)
        mean, std, outputs_add_up = _RANDOM_WEIGHTS.get(
            kind, (0.0, 1.0, False) if len(shape) == 2 else _OTHER
        )
        if len(shape) == 2 and kind != "embed_tokens.weight":
            std /= shape[1] ** 0.5
        if outputs_add_up:
            std /= self._config.num_layers**0.5
        tensor = self._normal(name, mean, std)
        if kind == "embed_tokens.weight":
            tensor[PAD_ID] = 0.0
        elif kind == "fc2.weight":
            # Activations are positive on average: rows that sum to zero keep that from making tokens alike.
            tensor -= tensor.mean(1, keepdim=True)
            tensor[self._wild_channels] *= 7.0
        elif kind == "fc2.bias":
            tensor[self._constant_channel] = -340.0 / self._config.num_layers
        return tensor.half().float()

    def _normal(self, name: str, mean: float, std: float) -> torch.Tensor:
        """Normal values in blocks that have generators of their own, so that threads share the work."""
        with torch.inference_mode(False):  # whose tensors other threads may not write
            tensor = torch.empty(self._shapes[name], dtype=torch.float32, device="cpu")
        blocks = torch.split(tensor.view(-1), _RANDOM_BLOCK)

        def fill(number: int) -> None:
            blocks[number].normal_(mean, std, generator=self._generator(f"{name} {number}"))

        if len(blocks) == 1:
            fill(0)
        else:
            with ThreadPoolExecutor() as threads:
                list(threads.map(fill, range(len(blocks))))
        return tensor

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:6], "big"))


_RANDOM_BLOCK = 1 << 22
_RANDOM_WEIGHTS = {
    # Mean; standard deviation (of a matrix: of its outputs, for inputs of rms 1); whether layers share it.
    "embed_tokens.weight": (0.0, 0.09, False),
    "self_attn.q_proj.weight": (0.0, 1.6, False),
    "self_attn.k_proj.weight": (0.0, 1.6, False),
    "self_attn.out_proj.weight": (0.0, 5.0, True),
    "self_attn_layer_norm.weight": (1.0, 0.1, False),
    "fc1.bias": (-0.3, 0.2, False),
    "fc2.weight": (0.0, 26.0, True),
    "final_layer_norm.weight": (1.0, 0.1, False),
    "emb_layer_norm_after.weight": (0.27, 0.03, False),
    "lm_head.dense.weight": (0.0, 3.0, False),
    "lm_head.layer_norm.weight": (1.0, 0.1, False),
    "regression.weight": (0.0, 5.0, False),
    "regression.bias": (-3.0, 0.0, False),
}
_OTHER = (0.0, 0.05, False)
