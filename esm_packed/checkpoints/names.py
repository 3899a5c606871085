"""The tensors of a checkpoint: their names and shapes, and those of the model's parameters made of them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from esm_packed.alphabet import VOCAB_SIZE
from esm_packed.checkpoints.download import contact_regression_path
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.errors import CheckpointError

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """An ESM-2 checkpoint, regardless of its format.

    Args:
        model_name: official name, `demo`, `random:NAME`, or the stem of the file.
        config: shape of the model.
        tensors: fair-esm's names without its prefixes, as in `tensor_shapes`, each in the dtype it is stored
            in and backed by its file where the format allows. `lm_head.*` and `contact_head.*` are there only
            if the checkpoint has them; `lm_head.weight` never is: it is `embed_tokens.weight`.
        sha256: of the weight file; of the sorted lines 'name sha256' if there are several; of the recipe if
            the weights are random.
        source: path or recipe, for messages.
        unused: tensors that ESM-2 does not have, such as those of transformers' pooler, `pooler.dense.*`.
    """

    model_name: str
    config: ESM2Config
    tensors: Mapping[str, torch.Tensor]
    sha256: str
    source: str
    unused: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """The files that the checkpoint was read from; none for a generated one."""
        source = Path(self.source)
        try:
            if source.is_dir():
                return [path for path in source.iterdir() if path.is_file()]
            if source.suffix == ".json":  # an index file, with its parts next to it
                return [path for path in source.parent.iterdir() if path.is_file()]
            return [path for path in (source, contact_regression_path(source)) if path.is_file()]
        except OSError:
            return []


def tensor_shapes(config: ESM2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a complete checkpoint."""
    hidden, ffn = config.hidden_size, config.ffn_size
    linears = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkv"}
    linears |= {"self_attn.out_proj": (hidden, hidden), "fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for layer in range(config.num_layers):
        for linear, shape in linears.items():
            shapes[f"layers.{layer}.{linear}.weight"] = shape
            shapes[f"layers.{layer}.{linear}.bias"] = shape[:1]
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"layers.{layer}.{norm}.weight"] = shapes[f"layers.{layer}.{norm}.bias"] = (hidden,)
        shapes[_inv_freq_name(layer)] = (config.head_dim // 2,)
    shapes["emb_layer_norm_after.weight"] = shapes["emb_layer_norm_after.bias"] = (hidden,)
    shapes["lm_head.dense.weight"] = (hidden, hidden)
    shapes["lm_head.dense.bias"] = (hidden,)
    shapes["lm_head.layer_norm.weight"] = shapes["lm_head.layer_norm.bias"] = (hidden,)
    shapes["lm_head.bias"] = (VOCAB_SIZE,)
    shapes["contact_head.regression.weight"] = (1, config.num_layers * config.num_heads)
    shapes["contact_head.regression.bias"] = (1,)
    return shapes


def rounded_inv_freq(head_dim: int) -> torch.Tensor:
    """The rotary frequencies of the official checkpoints: (head_dim / 2,) FP32 holding FP16 values.

    ESM-2 was trained in FP16, and its angles with it: unrounded frequencies are another model.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return (1.0 / 10000.0**exponents).half().float()


def _inv_freq_name(layer: int | str) -> str:
    return f"layers.{layer}.self_attn.rot_emb.inv_freq"


@dataclass(frozen=True)
class Stated:
    """Settings that a checkpoint states in addition to its tensors; None where it states nothing."""

    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    token_dropout: bool = True
    rotary: bool = False
    official_rope_base: bool = True


_SOURCES = {
    "embedding.": ("embed_tokens.",),
    ".attention_norm.": (".self_attn_layer_norm.",),
    ".qkv.": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
    ".attention_out.": (".self_attn.out_proj.",),
    ".ffn_norm.": (".final_layer_norm.",),
    "lm_head.norm.": ("lm_head.layer_norm.",),
    "final_norm.": ("emb_layer_norm_after.",),
    "contact_head.": ("contact_head.regression.",),
}
"""Part of a parameter's name here to what fair-esm calls it; several are laid one below the other."""


def fill_parameter(parameter: torch.Tensor, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy into `parameter` the checkpoint tensors it is made of.

    Args:
        parameter: of the model, modified.
        name: what `ESM2.named_parameters` calls it.
        tensors: fair-esm's names to tensors, as `Checkpoint` holds them.

    Raises:
        KeyError: the checkpoint lacks a tensor.
    """
    sources = [name]
    for ours, theirs in _SOURCES.items():
        if ours in name:
            sources = [name.replace(ours, their) for their in theirs]
            break
    for part, source in zip(parameter.chunk(len(sources)), sources, strict=True):
        part.copy_(tensors[source])


_PREFIX = re.compile(r"^(?:esm\.)?(?:encoder\.)?(?:sentence_encoder\.)?")
_LAYER_KEY = re.compile(r"layer\.(\d+|\*)\.(.+)\.(\w+)")
_LAYER_PARTS = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.self.rotary_embeddings": "self_attn.rot_emb",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
}
_OTHER_NAMES = {
    "embeddings.word_embeddings.weight": "embed_tokens.weight",
    "lm_head.decoder.weight": "lm_head.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "rotary_embeddings.inv_freq": _inv_freq_name("*"),
}
_UNUSED = re.compile(
    # The hub's ESM-2 files carry an unused table of learned positions; fine-tunes carry heads of their own.
    r"embeddings\.position_ids|embeddings\.position_embeddings\.weight|pooler\..*|classifier\..*"
)
_LEARNED_POSITIONS = ("embed_positions.weight", "embeddings.position_embeddings.weight")
_NORM_BEFORE = ("emb_layer_norm_before.weight", "embeddings.layer_norm.weight")


def _fair_name(key: str) -> str:
    """fair-esm's name, without its prefixes, for a fair-esm or transformers name; others stay."""
    name = _PREFIX.sub("", key)
    if (match := _LAYER_KEY.fullmatch(name)) and match[2] in _LAYER_PARTS:
        # transformers 5 saves the layers' LayerNorms as gamma and beta again.
        leaf = {"gamma": "weight", "beta": "bias"}.get(match[3], match[3])
        return f"layers.{match[1]}.{_LAYER_PARTS[match[2]]}.{leaf}"
    return _OTHER_NAMES.get(name, name)


def canonical(
    stored: Mapping[str, torch.Tensor], stated: Stated, path: Path
) -> tuple[ESM2Config, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rename and check every tensor, work out the model's shape, and set apart what ESM-2 does not have."""
    named: dict[str, torch.Tensor] = {}
    stored_as: dict[str, str] = {}
    for key, tensor in stored.items():
        _check_stored(key, tensor, path)
        name = _fair_name(key)
        if name in named and not torch.equal(named[name], tensor):
            raise CheckpointError(f"{path}: {stored_as[name]} and {key} are the same tensor but differ")
        named[name], stored_as[name] = tensor, key

    has_inv_freq = any(name.endswith(".rot_emb.inv_freq") for name in named)
    if any(name in named for name in _NORM_BEFORE) or (
        any(name in named for name in _LEARNED_POSITIONS) and not has_inv_freq and not stated.rotary
    ):
        raise CheckpointError(
            f"{path} is an ESM-1b or ESM-1v: learned positions, or a LayerNorm before the layers"
        )
    unused = {name: named.pop(name) for name in list(named) if _UNUSED.fullmatch(name)}
    if unused:
        logger.info("%s: not used: %s", path, ", ".join(unused))
    _untie(named, path)

    config = _infer_config(named, stated, path)
    if (shared := named.pop(_inv_freq_name("*"), None)) is not None:
        named |= {_inv_freq_name(layer): shared for layer in range(config.num_layers)}
    shapes = tensor_shapes(config)
    for name in filter(named.__contains__, shapes):
        tensor, shown = named[name], stored_as.get(name, name)
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {shown} is stored as {tensor.dtype}: quantized weights are not supported, use the "
                "original checkpoint"
            )
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{path}: {shown} has shape {tuple(tensor.shape)}, in a {_size_text(config)} ESM-2 it is "
                f"{shapes[name]}"
            )
    _settle_inv_freq(named, config, stated, path)
    for head in ("lm_head.", "contact_head."):
        if not any(name.startswith(head) for name in named):
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(head)}
    if surplus := [stored_as.get(name, name) for name in named if name not in shapes]:
        raise CheckpointError(f"{path} has tensors that no {_size_text(config)} ESM-2 has: {_some(surplus)}")
    if missing := [name for name in shapes if name not in named]:
        raise CheckpointError(f"{path} lacks tensors of a {_size_text(config)} ESM-2: {_some(missing)}")
    return config, {name: named[name] for name in shapes}, unused


def _check_stored(key: str, tensor: torch.Tensor, path: Path) -> None:
    """See that a tensor's values are in the file, one by one: its shape alone could claim any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        raise CheckpointError(
            f"{path}: {key} is not a plain tensor ({tensor.layout}, on {tensor.device}): save the model's "
            "state_dict() from the CPU"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {key} has shape {tuple(tensor.shape)} and only {tensor.untyped_storage().nbytes():,} "
            "bytes: save it as a contiguous tensor"
        )


def _untie(named: dict[str, torch.Tensor], path: Path) -> None:
    """Drop the language-model head's copy of the embedding table."""
    output = named.pop("lm_head.weight", None)
    if output is None:
        return
    table = named.setdefault("embed_tokens.weight", output)
    if table is not output and not torch.equal(table, output):
        raise CheckpointError(f"{path}: lm_head.weight is not the embedding table, to which ESM-2 ties it")


def _infer_config(named: Mapping[str, torch.Tensor], stated: Stated, path: Path) -> ESM2Config:
    table = named.get("embed_tokens.weight")
    if table is None or table.ndim != 2:
        raise CheckpointError(
            f"{path} is not an ESM-2: it has no embedding table; it has {_some(list(named))}"
        )
    if table.shape[0] != VOCAB_SIZE:
        raise CheckpointError(f"{path} is not an ESM-2: its alphabet has {table.shape[0]} tokens, not 33")
    hidden_size = stated.hidden_size or table.shape[1]
    layers = [int(match[1]) for name in named if (match := re.match(r"layers\.([0-9]{1,9})\.", name))]
    num_layers = stated.num_layers or max(layers, default=-1) + 1
    if num_layers > len(named):
        raise CheckpointError(
            f"{path} has {len(named)} tensors, too few for the {num_layers} layers it claims"
        )
    num_heads = stated.num_heads
    if num_heads is None:
        frequencies = [tensor for name, tensor in named.items() if name.endswith(".rot_emb.inv_freq")]
        known = [known.num_heads for known in ESM2_MODELS.values() if known.hidden_size == hidden_size]
        if frequencies and frequencies[0].numel():
            num_heads = hidden_size // (2 * frequencies[0].numel())
        elif known:
            num_heads = known[0]
        else:
            raise CheckpointError(
                f"{path} does not say how many attention heads it has: put its config.json next to it, or "
                "save it with its inv_freq buffers"
            )
    try:
        return ESM2Config(num_layers, hidden_size, num_heads, stated.token_dropout)
    except ValueError as error:
        raise CheckpointError(f"{path} is not an ESM-2: {error}") from error


def _settle_inv_freq(named: dict[str, torch.Tensor], config: ESM2Config, stated: Stated, path: Path) -> None:
    """Give every layer the checkpoint's own rotary frequencies, or the official ones where they are lost."""
    names = [_inv_freq_name(layer) for layer in range(config.num_layers)]
    present = [named[name] for name in names if name in named]
    if not present or any(frequencies.dtype == torch.bfloat16 for frequencies in present):
        if not stated.official_rope_base:
            raise CheckpointError(f"{path}: rope_theta is not 10000, and the frequencies are missing")
        lost = "stores its rotary frequencies in BF16" if present else "has no rotary frequencies (inv_freq)"
        warnings.warn(f"{path} {lost}: those of the official checkpoints are used", stacklevel=2)
        named |= dict.fromkeys(names, rounded_inv_freq(config.head_dim))
    elif not all(torch.equal(frequencies, present[0]) for frequencies in present):
        raise CheckpointError(f"{path}: its layers have different rotary frequencies (inv_freq)")


def _size_text(config: ESM2Config) -> str:
    return f"{config.num_layers}-layer, {config.hidden_size}-wide, {config.num_heads}-head"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
