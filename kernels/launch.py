"""Launch settings: heuristics, overridden by measurements of `esm-packed tune` on the same GPU model."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

CONFIG_DIRECTORY = Path(__file__).parent / "configs"
"""Directory with a JSON file for each tuned GPU."""

Settings = dict[str, int]
"""Block sizes and other compile-time values of one launch, `num_warps` and `num_stages`."""


def config_path(gpu_name: str) -> Path:
    """Path of the tuned settings of the GPU named `gpu_name`."""
    return CONFIG_DIRECTORY / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu_name).strip('-')}.json"


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def _tuned(device: torch.device, part: str, warn: bool) -> dict[str, Any]:
    """A part of the tuning results for a device; empty if there are none, or with another Triton."""
    if device.type != "cuda":
        return {}
    path = config_path(torch.cuda.get_device_name(device))
    if not path.exists():
        return {}
    tuned: dict[str, Any] = json.loads(path.read_text())
    here = importlib.metadata.version("triton")
    if tuned["triton"].split(".")[:2] != here.split(".")[:2]:
        if warn:
            warnings.warn(
                f"{path} was tuned with Triton {tuned['triton']}, not {here}; rerun `esm-packed tune`",
                stacklevel=3,
            )
        return {}
    found: dict[str, Any] = tuned.get(part, {})
    return found


@cache
def tuned_settings(device: torch.device) -> dict[str, Settings]:
    """Tuned settings of a device, from `KERNEL/SIZE/DTYPE` to settings; empty if none were measured.

    The dictionary is the live one: `esm-packed tune` inserts the settings that it tries.
    """
    return _tuned(device, "settings", warn=True)


@cache
def tuned_attention(device: torch.device) -> dict[str, list[str]]:
    """Attention backends of a device, fastest first, by `attention_key`; empty if none were timed."""
    measured = _tuned(device, "attention", warn=False)  # `tuned_settings` warns about the same file
    return {key: list(entry["order"]) for key, entry in measured.items()}


def attention_key(head_dim: int, dtype: torch.dtype) -> str:
    """The key of `tuned_attention`: `64/float16`."""
    return f"{head_dim}/{dtype_name(dtype)}"


def settings_key(kernel: str, size: int, dtype: torch.dtype) -> str:
    """The key of `tuned_settings`.

    Args:
        kernel: name of the launcher.
        size: hidden_size, or head_dim if the kernel works on heads.
        dtype: dtype of the operands.
    """
    return f"{kernel}/{size}/{dtype_name(dtype)}"


def launch_settings(kernel: str, size: int, tensor: torch.Tensor, heuristic: Settings) -> Settings:
    """The tuned settings for `tensor`'s device and dtype, or `heuristic`; see `settings_key`."""
    tuned = tuned_settings(tensor.device).get(settings_key(kernel, size, tensor.dtype), {})
    tuned = {name: value for name, value in tuned.items() if name in heuristic or name == "num_stages"}
    # Triton announces that fused multiply-adds will be off by default from 3.10 on.
    return {"enable_fp_fusion": True, **heuristic, **tuned}


def grid(names: str, rows: Iterable[Sequence[int]], **more: Sequence[int]) -> list[Settings]:
    """Candidates for tuning: every row, its values named by `names`, with every choice from `more`."""
    keys = [*names.split(), *more]
    choices = list(itertools.product(*more.values()))
    return [dict(zip(keys, (*row, *choice), strict=True)) for row in rows for choice in choices]


def tiles(*axes: Sequence[int], least: int, most: int, width: int = 1) -> list[tuple[int, ...]]:
    """Tiles of items `width` wide with `least` to `most` elements per thread; number of warps last."""
    return [
        tile
        for tile in itertools.product(*axes)
        if least <= math.prod(tile[:-1]) * width / (32 * tile[-1]) <= most
    ]


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 elsewhere, where programs run one after another."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> int:
    """Compute capability of an NVIDIA GPU, 90 for sm_90; 0 for anything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_contiguous(**tensors: torch.Tensor | None) -> None:
    """Check that tensors are contiguous, as the kernels' address arithmetic assumes; None passes.

    Raises:
        ValueError: a tensor has gaps between its elements; the message names the argument.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tensor.stride()} for {tuple(tensor.shape)}"
            )


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()
