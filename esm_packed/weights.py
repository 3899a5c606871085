"""Checkpoints: every format ESM-2 comes in, read into fair-esm's names; and fair-esm's format, written.

Files are memory-mapped and nothing is copied: a tensor's bytes are read when it is used. Loading never runs
code from a pickle.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from esm_packed.alphabet import PAD_ID, VOCAB_SIZE
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.download import (
    CheckpointError,
    Progress,
    contact_regression_path,
    expand_user,
    file_sha256,
    find_or_download,
    read_json,
    shards,
    weight_files,
)
from esm_packed.numerics import is_out_of_memory

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "RandomTensors",
    "load_checkpoint",
    "rounded_inv_freq",
    "save_fair_esm",
    "tensor_shapes",
]

logger = logging.getLogger(__name__)

DEMO_FILE = Path(__file__).parent / "demo" / "esm2_demo.pt"

_NAME_SHOWN = 200
"""Characters of a path that is too long."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """An ESM-2 checkpoint, whatever its format was.

    Args:
        model_name: official name, `demo`, `random:NAME`, or the stem of the file.
        config: shape of the model.
        tensors: fair-esm's names without its prefixes, as in `tensor_shapes`, each in the dtype it is stored
            in and backed by its file where the format allows. `lm_head.*` and `contact_head.*` are there only
            if the checkpoint has them; `lm_head.weight` never is: it is `embed_tokens.weight`.
        sha256: of the weight file; of the sorted lines 'name sha256' if there are several; of the recipe if
            the weights are random.
        source: path or recipe, for messages.
    """

    model_name: str
    config: ESM2Config
    tensors: Mapping[str, torch.Tensor]
    sha256: str
    source: str


def load_checkpoint(name_or_path: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Find and open a checkpoint.

    Args:
        name_or_path: an ESM-2 name (also as `facebook/NAME`; downloaded if not on this machine), `demo`,
            `random:NAME` or `random:NAME@SEED`, a fair-esm `.pt` file, a `.safetensors` or `.bin` file, the
            `.index.json` of a sharded one, or a transformers directory. Names win over files: a file that is
            called like a model is `./NAME`.
        progress: told about bytes downloaded and hashed.

    Raises:
        CheckpointError: not found, damaged, or not an ESM-2 this package can run.

    Warns:
        UserWarning: the rotary frequencies are missing or stored in BF16, and the official ones stand in.
    """
    name = str(name_or_path)
    if name.startswith("random:"):
        return _random_checkpoint(name)
    if name == "demo":
        return _read_checkpoint(DEMO_FILE, "demo", progress)
    official = name.removeprefix("facebook/")
    if official in ESM2_MODELS:
        return _read_checkpoint(find_or_download(official, progress), official, progress)
    path = expand_user(name)
    try:
        is_directory = path.is_dir()
        if not is_directory and not path.is_file():
            raise _not_found(path)
    except OSError as error:  # such as a name longer than the file system allows
        shown = name if len(name) <= _NAME_SHOWN else f"{name[:_NAME_SHOWN]}..."
        raise CheckpointError(f"{shown}: {error.strerror}") from error
    return _read_checkpoint(path, path.resolve().name if is_directory else path.stem, progress)


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
class _Stated:
    """What a checkpoint says about itself beside its tensors; None where it says nothing."""

    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    token_dropout: bool = True
    rotary: bool = False
    official_rope_base: bool = True


def _read_checkpoint(path: Path, model_name: str, progress: Progress | None) -> Checkpoint:
    stated = _Stated()
    if path.is_dir():
        files = weight_files(path)
        stated = _read_config_json(path / "config.json")
    elif path.name.endswith(".index.json"):
        files = shards(path)
        stated = _read_config_json(path.parent / "config.json")
    else:
        files = (path,)
        if _is_esm_config(path.parent / "config.json") and path.suffix != ".pt":
            stated = _read_config_json(path.parent / "config.json")

    stored: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            stored |= _read_safetensors(file)
        else:
            weights, cfg = _read_torch(file)
            stored |= weights
            stated = cfg or stated
    regression = contact_regression_path(path)
    if path.suffix == ".pt" and regression.is_file():
        stored |= _read_torch(regression)[0]

    config, tensors = _canonical(stored, stated, path)
    hashes = {file.name: file_sha256(file, progress) for file in files}
    sha256 = next(iter(hashes.values()))
    if len(hashes) > 1:
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return Checkpoint(model_name, config, tensors, sha256, str(path))


def _not_found(path: Path) -> CheckpointError:
    candidates = [*ESM2_MODELS, "demo"]
    if path.parent.is_dir():
        neighbours = [str(path.parent / file.name) for file in path.parent.iterdir()]
        candidates += [file for file in neighbours if file.endswith((".pt", ".bin", ".safetensors"))]
    near = difflib.get_close_matches(str(path).removeprefix("facebook/"), candidates, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"the models are {', '.join(ESM2_MODELS)} and demo"
    )
    return CheckpointError(f"{path} is neither a file nor a directory nor the name of a model; {hint}")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        AttributeError,
        KeyError,
        MemoryError,
    ) as error:
        if is_out_of_memory(error):
            raise _too_large(path) from error
        raise CheckpointError(
            f"{path} cannot be read, it is damaged, cut short or no safetensors file ({error}): get it again"
        ) from error


def _read_torch(path: Path) -> tuple[dict[str, torch.Tensor], _Stated | None]:
    """State dict of a fair-esm file or plain `torch.save`, and what a fair-esm file says about itself."""
    data = _torch_load(path)
    stated = None
    if isinstance(data, dict) and "model" in data:
        if "args" in data:
            raise CheckpointError(f"{path} is an ESM-1 or MSA Transformer checkpoint, not an ESM-2")
        if "cfg" in data:
            stated = _read_fair_cfg(data["cfg"], path)
        data = data["model"]
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path} holds {type(data).__name__}, not a checkpoint's named tensors")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is {type(value).__name__}, not a tensor; expected fair-esm's layout "
                "{'cfg': ..., 'model': state_dict}, or a state_dict"
            )
    return {name: value.detach() for name, value in data.items()}, stated


def _torch_load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip and _is_compressed(path):
            raise CheckpointError(
                f"{path} is a compressed archive, which cannot be mapped into memory and which torch.save "
                "never writes: load it and save it again with torch.save, or get the original"
            )
        # Files older than torch 1.6 are no zip archives and cannot be mapped. Namespace, fair-esm's settings,
        # is inert; it is allowed here only. Leaving would also take away a permission that was there before.
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([] if Namespace in allowed else [Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds Python objects besides tensors ({named[1]}), and loading never runs code from "
                "a pickle: save the model's state_dict() instead, or use safetensors"
            ) from error
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors: get it again, or use safetensors"
        ) from error
    except Exception as error:  # torch raises half a dozen types for damaged files
        if is_out_of_memory(error):
            raise _too_large(path) from error
        first_line = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read, it is damaged or cut short ({first_line}): get it again"
        ) from error


def _too_large(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} does not fit into the memory that this process may use")


def _is_compressed(path: Path) -> bool:
    """Whether an archive holds other bytes than its entries do: mapped into memory, they would be garbage."""
    with zipfile.ZipFile(path) as archive:
        return any(
            entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
            for entry in archive.infolist()
        )


def _read_fair_cfg(cfg: Any, path: Path) -> _Stated:
    model = cfg.get("model") if isinstance(cfg, dict) else None
    values = vars(model) if isinstance(model, Namespace) else model
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: cfg['model'] should be a Namespace, it is {type(model).__name__}")
    return _Stated(
        num_layers=_size(values, "encoder_layers", path),
        hidden_size=_size(values, "encoder_embed_dim", path),
        num_heads=_size(values, "encoder_attention_heads", path),
        token_dropout=_flag(values, "token_dropout", True, path),
        rotary=True,
    )


def _is_esm_config(path: Path) -> bool:
    try:
        return bool(read_json(path)["model_type"] == "esm")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_config_json(path: Path) -> _Stated:
    """transformers' config.json, refusing every setting under which the model would not be ESM-2."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}, which transformers writes, cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no configuration")
    # The value that EsmConfig takes for what a file leaves out, and the one ESM-2 has.
    required: tuple[tuple[str, Any, tuple[Any, ...], str], ...] = (
        ("model_type", None, ("esm",), "it is another kind of model"),
        ("is_folding_model", False, (False, None), "it is ESMFold"),
        ("position_embedding_type", "absolute", ("rotary",), "learned positions: an ESM-1b or ESM-1v"),
        ("emb_layer_norm_before", None, (False, None), "a LayerNorm before the layers: an ESM-1b"),
        ("vocab_size", None, (VOCAB_SIZE,), "another alphabet"),
        ("layer_norm_eps", 1e-12, (1e-5,), "ESM-2's LayerNorm has 1e-5"),
        ("is_decoder", False, (False, None), "a causal decoder"),
        ("quantization_config", None, (None,), "quantised weights are not supported: use the original"),
    )
    for key, default, accepted, reason in required:
        if (value := config.get(key, default)) not in accepted:
            raise CheckpointError(f"{path}: {key} is {value!r}, not ESM-2 as this package runs it ({reason})")
    return _Stated(
        num_layers=_size(config, "num_hidden_layers", path),
        hidden_size=_size(config, "hidden_size", path),
        num_heads=_size(config, "num_attention_heads", path),
        token_dropout=_flag(config, "token_dropout", False, path),
        rotary=True,
        official_rope_base=config.get("rope_theta", 10000.0) == 10000.0,
    )


def _size(values: Mapping[str, Any], key: str, path: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {key} should be a positive number, it is {value!r}")
    return value


def _flag(values: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = values.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} should be true or false, it is {value!r}")
    return bool(value)


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


def _canonical(
    stored: Mapping[str, torch.Tensor], stated: _Stated, path: Path
) -> tuple[ESM2Config, dict[str, torch.Tensor]]:
    """Rename and check every tensor, and work out the model's shape."""
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
    unused = [name for name in named if _UNUSED.fullmatch(name)]
    for name in unused:
        del named[name]
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
                f"{path}: {shown} is stored as {tensor.dtype}: quantised weights are not supported, use the "
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
    return config, {name: named[name] for name in shapes}


def _check_stored(key: str, tensor: torch.Tensor, path: Path) -> None:
    """See that a tensor's values are in the file, one by one: its shape alone could claim any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        raise CheckpointError(
            f"{path}: {key} is no plain tensor ({tensor.layout}, on {tensor.device}): save the model's "
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


def _infer_config(named: Mapping[str, torch.Tensor], stated: _Stated, path: Path) -> ESM2Config:
    table = named.get("embed_tokens.weight")
    if table is None or table.ndim != 2:
        raise CheckpointError(f"{path} is no ESM-2: it has no embedding table; it has {_some(list(named))}")
    if table.shape[0] != VOCAB_SIZE:
        raise CheckpointError(f"{path} is no ESM-2: its alphabet has {table.shape[0]} tokens, not 33")
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
                f"{path} does not say how many attention heads it has: put its config.json beside it, or "
                "save it with its inv_freq buffers"
            )
    try:
        return ESM2Config(num_layers, hidden_size, num_heads, stated.token_dropout)
    except ValueError as error:
        raise CheckpointError(f"{path} is no ESM-2: {error}") from error


def _settle_inv_freq(named: dict[str, torch.Tensor], config: ESM2Config, stated: _Stated, path: Path) -> None:
    """Give every layer the checkpoint's own rotary frequencies, or the official ones where they are lost."""
    names = [_inv_freq_name(layer) for layer in range(config.num_layers)]
    present = [named[name] for name in names if name in named]
    if not present or any(frequencies.dtype == torch.bfloat16 for frequencies in present):
        if not stated.official_rope_base:
            raise CheckpointError(f"{path}: rope_theta is not 10000, and the frequencies are missing")
        lost = "stores its rotary frequencies in BF16" if present else "has no rotary frequencies (inv_freq)"
        warnings.warn(f"{path} {lost}: those of the official checkpoints are used", stacklevel=5)
        named |= dict.fromkeys(names, rounded_inv_freq(config.head_dim))
    elif not all(torch.equal(frequencies, present[0]) for frequencies in present):
        raise CheckpointError(f"{path}: its layers have different rotary frequencies (inv_freq)")


def _size_text(config: ESM2Config) -> str:
    return f"{config.num_layers}-layer, {config.hidden_size}-wide, {config.num_heads}-head"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _random_checkpoint(name: str) -> Checkpoint:
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
    attention far from uniform; a last layer with rms near 0.3. A freshly initialised model has none of this
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


def save_fair_esm(
    model: Checkpoint | tuple[ESM2Config, Mapping[str, torch.Tensor]],
    path: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write fair-esm's two files: `X.pt`, and `X-contact-regression.pt` if there are contact weights.

    Args:
        model: a checkpoint, or a shape and tensors named as in `tensor_shapes`.
        path: `.../esm2*.pt`: fair-esm recognises ESM-2 by the file's name.
        dtype: convert the weights; None keeps them as they are. Rotary frequencies are never made BF16.

    Raises:
        CheckpointError: fair-esm could not load a file of this name or without a language-model head, or the
            file cannot be written.
    """
    config, tensors = (model.config, model.tensors) if isinstance(model, Checkpoint) else model
    path = Path(path)
    if path.suffix != ".pt" or not path.name.startswith("esm2"):
        raise CheckpointError(f"{path}: fair-esm loads an ESM-2 only from a file named esm2....pt")
    if "lm_head.bias" not in tensors:
        raise CheckpointError("fair-esm's format has a language-model head, which this checkpoint lacks")

    trunk: dict[str, torch.Tensor] = {}
    contact_head: dict[str, torch.Tensor] = {}
    for name in tensor_shapes(config):
        if name.startswith("contact_head."):
            if name in tensors:
                contact_head[name] = _writable(tensors[name], dtype)
            continue
        keep = name.endswith("inv_freq") and dtype == torch.bfloat16
        prefix = "encoder." if name.startswith("lm_head.") else "encoder.sentence_encoder."
        trunk[prefix + name] = _writable(tensors[name], None if keep else dtype)
    trunk["encoder.lm_head.weight"] = trunk["encoder.sentence_encoder.embed_tokens.weight"]
    cfg = Namespace(
        encoder_layers=config.num_layers,
        encoder_embed_dim=config.hidden_size,
        encoder_attention_heads=config.num_heads,
        token_dropout=config.token_dropout,
    )
    _save({"cfg": {"model": cfg}, "model": trunk}, path)
    if contact_head:
        _save({"model": contact_head}, contact_regression_path(path))
    else:
        logger.warning("%s: no contact-regression weights to write; fair-esm will ask for them", path)


def _writable(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """In `dtype`, and owning its storage: torch.save writes the whole storage under a view."""
    tensor = tensor.to(dtype or tensor.dtype).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _save(data: Any, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.part")
    try:
        # Through a file object: given a path, torch.save writes its name into the file and the bytes differ.
        with temporary.open("wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
