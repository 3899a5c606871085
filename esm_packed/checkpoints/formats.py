"""Every format ESM-2 comes in, read; and fair-esm's format, written.

Files are memory-mapped and nothing is copied: a tensor's bytes are read when it is used. Loading never runs
code from a pickle.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from esm_packed.alphabet import VOCAB_SIZE
from esm_packed.checkpoints.download import (
    Progress,
    contact_regression_path,
    expand_user,
    file_sha256,
    find_or_download,
    read_json,
    shards,
    weight_files,
)
from esm_packed.checkpoints.names import Checkpoint, Stated, canonical, tensor_shapes
from esm_packed.checkpoints.random import random_checkpoint
from esm_packed.config import ESM2_MODELS, LAYER_NORM_EPS, ESM2Config
from esm_packed.errors import CheckpointError
from esm_packed.files import whole_or_nothing
from esm_packed.numerics import is_out_of_memory

logger = logging.getLogger(__name__)

DEMO_FILE = Path(__file__).parents[1] / "demo" / "esm2_demo.pt"

_NAME_SHOWN = 200
"""Characters of a path that is too long."""


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
        return random_checkpoint(name)
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


def _read_checkpoint(path: Path, model_name: str, progress: Progress | None) -> Checkpoint:
    stated = Stated()
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

    config, tensors, unused = canonical(stored, stated, path)
    hashes = {file.name: file_sha256(file, progress) for file in files}
    sha256 = next(iter(hashes.values()))
    if len(hashes) > 1:
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return Checkpoint(model_name, config, tensors, sha256, str(path), unused)


def _not_found(path: Path) -> CheckpointError:
    candidates = [*ESM2_MODELS, "demo"]
    if path.parent.is_dir():
        neighbors = [str(path.parent / file.name) for file in path.parent.iterdir()]
        candidates += [file for file in neighbors if file.endswith((".pt", ".bin", ".safetensors"))]
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
            f"{path} cannot be read: damaged, truncated or not a safetensors file ({error}); get it again"
        ) from error


def _read_torch(path: Path) -> tuple[dict[str, torch.Tensor], Stated | None]:
    """State dict of a fair-esm file or plain `torch.save`, and the settings that a fair-esm file states."""
    data = _torch_load(path)
    stated = None
    if isinstance(data, dict) and "model" in data:
        if "args" in data:
            raise CheckpointError(f"{path} is an ESM-1 or MSA Transformer checkpoint, not an ESM-2")
        if "cfg" in data:
            stated = _read_fair_cfg(data["cfg"], path)
        data = data["model"]
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path} contains {type(data).__name__}, not a checkpoint's named tensors")
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
        # Files older than torch 1.6 are not zip files and cannot be mapped. Namespace, fair-esm's settings,
        # is inert; it is allowed here only. Leaving would also take away a permission that was there before.
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([] if Namespace in allowed else [Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} contains Python objects other than tensors ({named[1]}), but loading never runs "
                "code from a pickle: save the model's state_dict() instead, or use safetensors"
            ) from error
        raise CheckpointError(
            f"{path} is damaged, or contains Python objects other than tensors: get it again, or use "
            "safetensors"
        ) from error
    except Exception as error:  # torch raises half a dozen types for damaged files
        if is_out_of_memory(error):
            raise _too_large(path) from error
        first_line = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read: damaged or truncated ({first_line}); get it again"
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


def _read_fair_cfg(cfg: Any, path: Path) -> Stated:
    model = cfg.get("model") if isinstance(cfg, dict) else None
    values = vars(model) if isinstance(model, Namespace) else model
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: cfg['model'] must be a Namespace, got {type(model).__name__}")
    return Stated(
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


def _read_config_json(path: Path) -> Stated:
    """transformers' config.json, refusing every setting under which the model would not be ESM-2."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}, which transformers writes, cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a configuration")
    # The value that EsmConfig takes for what a file leaves out, and the one ESM-2 has.
    required: tuple[tuple[str, Any, tuple[Any, ...], str], ...] = (
        ("model_type", None, ("esm",), "it is another kind of model"),
        ("is_folding_model", False, (False, None), "it is ESMFold"),
        ("position_embedding_type", "absolute", ("rotary",), "learned positions: an ESM-1b or ESM-1v"),
        ("emb_layer_norm_before", None, (False, None), "a LayerNorm before the layers: an ESM-1b"),
        ("vocab_size", None, (VOCAB_SIZE,), "another alphabet"),
        ("layer_norm_eps", 1e-12, (LAYER_NORM_EPS,), "ESM-2's LayerNorm has 1e-5"),
        ("is_decoder", False, (False, None), "a causal decoder"),
        ("quantization_config", None, (None,), "quantized weights are not supported: use the original"),
    )
    for key, default, accepted, reason in required:
        if (value := config.get(key, default)) not in accepted:
            raise CheckpointError(f"{path}: {key} is {value!r}, not a supported ESM-2 ({reason})")
    return Stated(
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
        raise CheckpointError(f"{path}: {key} must be a positive integer, got {value!r}")
    return value


def _flag(values: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = values.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} must be true or false, got {value!r}")
    return bool(value)


def save_fair_esm(
    model: Checkpoint | tuple[ESM2Config, Mapping[str, torch.Tensor]],
    path: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write fair-esm's two files: `X.pt`, and `X-contact-regression.pt` if there are contact weights.

    Args:
        model: a checkpoint, or a shape and tensors named as in `tensor_shapes`.
        path: `.../esm2*.pt`: fair-esm recognizes ESM-2 by the file's name.
        dtype: convert the weights; None keeps them as they are. Rotary frequencies are never made BF16.

    Raises:
        CheckpointError: fair-esm could not load a file of this name or without a language-model head, or the
            file cannot be written.
    """
    config, tensors = (model.config, model.tensors) if isinstance(model, Checkpoint) else model
    path = Path(path)
    if path.suffix != ".pt" or not path.name.startswith("esm2"):
        raise CheckpointError(f"{path}: fair-esm loads ESM-2 only from files named esm2*.pt")
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
    try:
        # Through a file object: given a path, torch.save writes its name into the file and the bytes differ.
        with whole_or_nothing(path) as temporary, temporary.open("wb") as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
