"""Attention over packed sequences: the backends, and the choice among those that are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from esm_packed import kernels
from esm_packed.errors import UserError
from esm_packed.kernels import dispatch, launch
from esm_packed.kernels.reference import packed_attention
from esm_packed.numerics import Precision


class PackedAttention(Protocol):
    """The function of a backend: each sequence attends to itself, in both directions.

    Args:
        query, key, value: (total_tokens, num_heads, head_dim). Queries and keys have one order of dimensions
            within a head, which need not be the checkpoint's.
        cu_seqlens: (num_sequences + 1,) int32.
        max_seqlen: tokens of the longest sequence, at least; the row length where sequences are padded.
        softmax_scale: factor on the scores, head_dim^-0.5 in ESM-2.

    Returns:
        (total_tokens, num_heads, head_dim), contiguous.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        softmax_scale: float,
        /,
    ) -> torch.Tensor: ...


HALF_TYPES = (torch.float16, torch.bfloat16)

_HOW_TO_INSTALL = {
    "flash_attn": "pip install --no-build-isolation flash-attn",
    "flash_attn_interface": "build it from the directory hopper of github.com/Dao-AILab/flash-attention",
    "fa3_fwd_interface": "pip install fa3-fwd",
    "flash_attn.cute": "pip install flash-attn-4",
    "triton": "pip install triton (on Linux)",
}
"""By module. flash-attn's build imports torch, so pip must not isolate it."""


class BackendError(UserError, ValueError):
    """The attention backend is not installed, or does not support this device, dtype or head_dim."""


@dataclass(frozen=True)
class Backend:
    """An attention backend.

    Args:
        name: what `--attention` calls it.
        obstacle: returns why it does not support (device, dtype, head_dim), or None if it does.
        load: imports what it needs and returns the function for a precision mode.
    """

    name: str
    obstacle: Callable[[torch.device, torch.dtype, int], str | None]
    load: Callable[[Precision], PackedAttention]


_KEYS_AT_ONCE = 16
"""With AVX-512, torch's attention in BF16 takes the keys beyond a multiple of this one by one."""

_MAX_SINGLE_KEYS = 4
"""Up to this remainder, and up to a 64th of all keys, that costs less than added keys and a mask."""


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
) -> torch.Tensor:
    """`scaled_dot_product_attention` on views of the packed tensors, a run of equal lengths in one call.

    On a CPU this is faster than padding, a block-diagonal mask, nested tensors and FlexAttention. It reads
    `cu_seqlens` back from the device, which on a GPU costs one synchronization per layer.
    """
    lengths = cu_seqlens.diff().tolist()
    num_heads, head_dim = query.shape[1:]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    start = 0
    for length, run in groupby(lengths):
        if length == 0:
            continue
        count = sum(1 for _ in run)
        end = start + count * length
        shape = (count, length, num_heads, head_dim)
        keys, values = extend_keys(key[start:end].view(shape), value[start:end].view(shape))
        is_extended = keys.shape[1] > length
        mask = torch.arange(keys.shape[1], device=keys.device)[None] < length if is_extended else None
        attended = F.scaled_dot_product_attention(
            query[start:end].view(shape).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            scale=softmax_scale,
        )
        out[start:end].view(shape).copy_(attended.transpose(1, 2))
        start = end
    return out


def extend_keys(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add zeros behind keys and values, for the caller to mask, where attention is faster with them.

    Args:
        keys, values: (num_sequences, length, num_heads, head_dim).

    Returns:
        The same, with a length that may be greater.
    """
    length = keys.shape[1]
    gains = (  # FP16 and FP32 do not
        keys.dtype == torch.bfloat16
        and keys.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
    if not gains or length % _KEYS_AT_ONCE <= max(_MAX_SINGLE_KEYS, length / 64):
        return keys, values
    added = (0, 0, 0, 0, 0, -length % _KEYS_AT_ONCE)
    return F.pad(keys, added), F.pad(values, added)


def _load_triton(precision: Precision) -> PackedAttention:
    return partial(kernels.packed_attention, input_precision="tf32" if precision.tf32 else "ieee")


def _load_varlen(precision: Precision) -> PackedAttention:
    varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return lambda query, key, value, cu_seqlens, max_seqlen, softmax_scale: varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=softmax_scale
    )


def _load_flash(module: str, precision: Precision) -> PackedAttention:
    """`flash_attn_varlen_func` of one of the FlashAttention packages; they share the arguments used here."""
    flash_attn_varlen_func: Any = importlib.import_module(module).flash_attn_varlen_func
    if module == "flash_attn":
        _warn_of_old_flash_attn()

    def attended(out: Any) -> torch.Tensor:
        # Flash-attention 3 and 4 return (out, lse) in some versions.
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return lambda query, key, value, cu_seqlens, max_seqlen, softmax_scale: attended(
        flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=softmax_scale,
        )
    )


def _warn_of_old_flash_attn() -> None:
    version = importlib.metadata.version("flash-attn")
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (2, 6):
        warnings.warn(
            f"flash-attn {version} was released for torch 2.3 and older, and has not been checked with torch "
            f"{torch.__version__}: upgrade it ({_HOW_TO_INSTALL['flash_attn']} --upgrade), or use "
            "attention 'varlen', which is part of torch",
            stacklevel=2,
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _flash_obstacle(
    module: str | None, dtypes: tuple[torch.dtype, ...], capabilities: tuple[int, ...] | None
) -> Callable[[torch.device, torch.dtype, int], str | None]:
    """Obstacles of the FlashAttention family: `capabilities` are the major compute capabilities served."""

    def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        if dtype not in dtypes:
            names = " and ".join(str(served).removeprefix("torch.") for served in dtypes)
            return f"it computes in {names}, not in {str(dtype).removeprefix('torch.')}"
        if head_dim % 8 or head_dim > 256:
            return f"head_dim {head_dim} is not a multiple of 8 up to 256"
        major = torch.cuda.get_device_capability(device)[0]
        if major < 8 or (capabilities is not None and major not in capabilities):
            return f"{torch.cuda.get_device_name(device)} (sm_{major}x) is not supported"
        if module is not None and not _installed(module):
            return f"the module {module} is not installed: {_HOW_TO_INSTALL[module]}"
        return None

    return obstacle


def _triton_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" and device.type not in dispatch.TRITON_DEVICES:
        return f"it runs on CUDA devices, not on {device.type}"
    if not dispatch.TRITON_DEVICES:
        return f"Triton is not installed: {_HOW_TO_INSTALL['triton']}"
    if dtype == torch.float64:
        return "it computes in float16, bfloat16 and float32, not in float64"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        gpu = f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
        return f"on {gpu} it runs out of registers and would be slow, it needs sm_80 or newer"
    return None


def _always(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "flash3",
            _flash_obstacle("flash_attn_interface", HALF_TYPES, (9,)),
            partial(_load_flash, "flash_attn_interface"),
        ),
        Backend(
            "fa3_fwd",
            _flash_obstacle("fa3_fwd_interface", (torch.bfloat16,), (9,)),
            partial(_load_flash, "fa3_fwd_interface"),
        ),
        Backend(
            "flash4",
            _flash_obstacle("flash_attn.cute", HALF_TYPES, (9, 10)),
            partial(_load_flash, "flash_attn.cute"),
        ),
        Backend("varlen", _flash_obstacle(None, HALF_TYPES, None), _load_varlen),
        Backend(
            "flash2", _flash_obstacle("flash_attn", HALF_TYPES, None), partial(_load_flash, "flash_attn")
        ),
        Backend("triton", _triton_obstacle, _load_triton),
        Backend("sdpa", _always, lambda precision: sdpa_attention),
        Backend("reference", _always, lambda precision: packed_attention),
    )
}

WAITING_BACKENDS = ("sdpa", "reference")
"""They read `cu_seqlens` back from the device, so that no CUDA graph can hold them."""

AUTO_ORDER = ("flash3", "varlen", "flash2", "triton", "sdpa")
"""The others run only when named: `fa3_fwd` and `flash4` are unproven here, `reference` is slow."""


def _auto_order(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """First the backends that tuning timed on this GPU, as it ranked them, then the others."""
    timed = launch.tuned_attention(device).get(launch.attention_key(head_dim, dtype), [])
    return [*(name for name in timed if name in BACKENDS), *AUTO_ORDER]


def select_backend(
    name: str, device: torch.device, precision: Precision, head_dim: int
) -> tuple[str, PackedAttention]:
    """The attention backend `name`, or with `auto` the first that serves; FP64 takes the reference.

    `auto` follows what `esm-packed tune` timed on this GPU for head_dim and dtype, and else a fixed order.

    Returns:
        The name of the backend chosen, and its function.

    Raises:
        BackendError: `name` is unknown or unavailable; the message gives the reason and the alternatives.
    """
    dtype = precision.dtype
    if name == "auto":
        if dtype == torch.float64:
            return "reference", packed_attention
        order = _auto_order(device, dtype, head_dim)
        name = next(name for name in order if BACKENDS[name].obstacle(device, dtype, head_dim) is None)
    elif name not in BACKENDS:
        raise BackendError(f"attention {name!r} is not known; choose from auto, {', '.join(BACKENDS)}")
    obstacle = BACKENDS[name].obstacle(device, dtype, head_dim)
    if obstacle is not None:
        serving = [other for other in BACKENDS if BACKENDS[other].obstacle(device, dtype, head_dim) is None]
        raise BackendError(f"attention {name!r} is unavailable: {obstacle}; choose from {', '.join(serving)}")
    return name, BACKENDS[name].load(precision)
