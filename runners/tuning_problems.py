"""What `esm-packed tune` measures: each kernel of ESM-2 at each size, its inputs and candidate settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from esm_packed import kernels
from esm_packed.alphabet import MASK_ID, VOCAB_SIZE
from esm_packed.config import ESM2Config
from esm_packed.kernels import launch, matmul, reference
from esm_packed.kernels.launch import Settings
from esm_packed.model import LAYER_NORM_EPS
from esm_packed.numerics import Precision

LENGTH_QUANTILES = (
    53, 183, 363, 98, 243, 550, 132, 295, 1009, 165, 79, 326, 201, 115, 409, 221, 683, 148, 468, 267
)  # fmt: skip
"""Tokens of proteins as in UniProt, log-normal with a mean of 300 (every 20-quantile), well mixed."""


@dataclass(frozen=True)
class Problem:
    """One entry of the tuned settings: a kernel at a size, in a dtype.

    Args:
        key: of the tuned settings, as `launch.settings_key` makes it.
        precision: the mode it is timed in.
        candidates: settings to try beside the heuristic's.
        arguments: makes what `run` and `reference` take, the same values each time.
        run: launches the kernel.
        reference: the same in plain PyTorch.
        mutated: indices of the arguments that are modified in place.
        input_precision: what FP32 operands are multiplied in.
    """

    key: str
    precision: Precision
    candidates: list[Settings]
    arguments: Callable[[], list[Any]]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    mutated: tuple[int, ...] = ()
    input_precision: str = "ieee"

    def results(self, operation: Callable[..., Any], arguments: list[Any]) -> list[torch.Tensor]:
        """All that `operation`, which is `run` or `reference`, returns and modifies."""
        returned = operation(*arguments)
        modified = [arguments[index] for index in self.mutated]
        if returned is None:
            return modified
        return [*(returned if isinstance(returned, tuple) else (returned,)), *modified]


def _grid(names: str, rows: Iterable[Sequence[int]], **more: Sequence[int]) -> list[Settings]:
    """Every row, its values called `names`, with every choice from `more`."""
    keys = [*names.split(), *more]
    choices = list(itertools.product(*more.values()))
    return [dict(zip(keys, (*row, *choice), strict=True)) for row in rows for choice in choices]


def _tiles(*axes: Sequence[int], least: int, most: int, width: int = 1) -> list[tuple[int, ...]]:
    """Tiles, number of warps last, of items `width` wide that give a thread `least` to `most` elements."""
    return [
        tile
        for tile in itertools.product(*axes)
        if least <= math.prod(tile[:-1]) * width / (32 * tile[-1]) <= most
    ]


_ATTENTION_CANDIDATES = {
    "half": _grid(
        "BLOCK_M BLOCK_N num_warps",
        [
            (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (64, 128, 4), (64, 128, 8),
            (128, 32, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8),
        ],
        num_stages=(2, 3, 4),
    ),
    "tf32": _grid(
        "BLOCK_M BLOCK_N num_warps",
        [
            (32, 32, 4), (64, 32, 4), (64, 32, 8), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 32, 8),
            (128, 64, 8),
        ],
        num_stages=(1, 2, 3),
    ),
    "ieee": _grid(
        "BLOCK_M BLOCK_N num_warps",
        [(16, 16, 4), (32, 16, 4), (32, 16, 8), (32, 32, 4), (32, 32, 8), (64, 16, 8), (64, 32, 8)],
        num_stages=(1, 2),
    ),
}  # fmt: skip
_ATTENTION_CANDIDATES["tf32x3"] = _ATTENTION_CANDIDATES["ieee"]
_GEMM_CANDIDATES = _grid(
    "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages",
    [
        (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (64, 256, 64, 8, 4),
        (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 128, 32, 4, 4), (128, 128, 64, 4, 3),
        (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 2),
        (128, 256, 32, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
    ],
    GROUP_M=(8, 16),
)  # fmt: skip


def sample_lengths(tokens: int) -> list[int]:
    """Lengths of sequences with `tokens` tokens in all, at least 3; the longest first, as packs have them."""
    lengths: list[int] = []
    left = tokens
    for length in itertools.cycle(LENGTH_QUANTILES):
        if left < 3:  # no room for BOS, a residue and EOS
            break
        lengths.append(min(length, left))
        left -= lengths[-1]
    lengths[-1] += left
    return sorted(lengths, reverse=True)


def problems(
    configs: Sequence[ESM2Config], precisions: Sequence[Precision], tokens: int, device: torch.device
) -> list[Problem]:
    """Every kernel at every size and dtype that these models use in these modes, each once."""
    found: dict[str, Problem] = {}
    for config, precision in itertools.product(configs, precisions):
        for problem in _problems_of(config, precision, tokens, device):
            found.setdefault(problem.key, problem)
    return list(found.values())


def _problems_of(
    config: ESM2Config, precision: Precision, tokens: int, device: torch.device
) -> Iterator[Problem]:
    dtype, residual_dtype = precision.dtype, precision.residual_dtype
    hidden_size, ffn_size, head_dim = config.hidden_size, config.ffn_size, config.head_dim
    lengths = sample_lengths(tokens)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    position_ids = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths]).to(device)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(scale).to(dtype)

    def rows(width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return normal(tokens, width, dtype=dtype)

    def embed_arguments() -> list[Any]:
        input_ids = torch.randint(4, VOCAB_SIZE, (tokens,), dtype=torch.int32, device=device)
        input_ids[cu_seqlens[:-1].long()] = 0  # no sequence is all masks
        return [input_ids, cu_seqlens, normal(VOCAB_SIZE, hidden_size), MASK_ID, residual_dtype]

    def norm_arguments(*dtypes: torch.dtype) -> list[Any]:
        inputs = [rows(hidden_size, dtype) for dtype in dtypes]
        return [*inputs, normal(hidden_size), normal(hidden_size), LAYER_NORM_EPS]

    def rotary_arguments() -> list[Any]:
        inv_freq = 10000 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
        angles = torch.outer(torch.arange(max(lengths), device=device), inv_freq)
        return [normal(tokens, 3, config.num_heads, head_dim), angles.cos(), angles.sin(), position_ids]

    def attention_arguments(input_precision: str = "ieee") -> list[Any]:
        query_key_value = normal(tokens, 3, config.num_heads, head_dim).unbind(1)
        return [*query_key_value, cu_seqlens, max(lengths), head_dim**-0.5, input_precision]

    def gelu_arguments() -> list[Any]:
        return [rows(ffn_size), normal(ffn_size, scale=0.1)]

    def gemm_arguments() -> list[Any]:
        weight = normal(ffn_size, hidden_size, scale=hidden_size**-0.5)
        return [rows(hidden_size), weight, normal(ffn_size, scale=0.1)]

    def problem(
        kernel: str,
        size: int,
        candidates: list[Settings],
        arguments: Callable[[], list[Any]],
        *mutated: int,
        operation: str = "",
        dtype: torch.dtype = dtype,
        input_precision: str = "ieee",
    ) -> Problem:
        def seeded() -> list[Any]:
            torch.manual_seed(0)
            return arguments()

        def run(*arguments: Any) -> Any:
            if kernel != "gemm_bias_gelu":
                return getattr(kernels, operation or kernel)(*arguments)
            from esm_packed.kernels import gemm  # imports Triton

            return gemm.gemm_bias_gelu(*arguments)

        plain = matmul.linear_gelu if kernel.endswith("_gelu") else getattr(reference, operation or kernel)
        key = launch.settings_key(kernel, size, dtype)
        return Problem(key, precision, candidates, seeded, run, plain, mutated, input_precision)

    embed_tiles = itertools.product((4, 8, 16), (128, 256, 512), (128,), (128,), (4, 8))
    embeds = _grid("BLOCK_T BLOCK_N BLOCK_S BLOCK_C num_warps", embed_tiles)
    yield problem("embed_tokens", hidden_size, embeds, embed_arguments)

    width = launch.next_power_of_2(hidden_size)
    tiles = _tiles((1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32), width=width, least=4, most=32)
    norms = _grid("BLOCK_T num_warps", tiles)
    for norm_dtype in dict.fromkeys((residual_dtype, dtype)):  # of the layers, and of the LM head
        arguments = partial(norm_arguments, norm_dtype)
        yield problem("layer_norm", hidden_size, norms, arguments, dtype=norm_dtype)
    yield problem("add_layer_norm_", hidden_size, norms, partial(norm_arguments, dtype, residual_dtype), 1)

    width = launch.next_power_of_2(head_dim // 2)
    tiles = _tiles((1, 2, 4, 8), (4, 8, 16, 32), (2, 4, 8), width=width, least=4, most=16)
    yield problem("rotary_qk_", head_dim, _grid("BLOCK_T BLOCK_H num_warps", tiles), rotary_arguments, 0)

    tiles = _tiles((2, 4, 8, 16), (128, 256, 512, 1024), (4, 8), least=8, most=32)
    yield problem("bias_gelu_", ffn_size, _grid("BLOCK_T BLOCK_N num_warps", tiles), gelu_arguments, 0)

    tiles = _tiles((16, 32, 64, 128), (64, 128, 256), (4, 8), least=8, most=64)
    means = _grid("BLOCK_T BLOCK_N num_warps", tiles)
    yield problem("segment_mean", hidden_size, means, lambda: [rows(hidden_size), cu_seqlens])

    if dtype == torch.float32:
        for input_precision in ("tf32",) if precision.tf32 else ("ieee", "tf32x3"):
            yield problem(
                f"packed_attention_{input_precision}",
                head_dim,
                _ATTENTION_CANDIDATES[input_precision],
                partial(attention_arguments, input_precision),
                operation="packed_attention",
                input_precision=input_precision,
            )
        return
    yield problem("packed_attention", head_dim, _ATTENTION_CANDIDATES["half"], attention_arguments)
    yield problem("gemm_bias_gelu", hidden_size, _GEMM_CANDIDATES, gemm_arguments)
    # Last, for by now both of its ways are as fast as they get.
    yield problem("linear_gelu", hidden_size, [{"FUSED": 1}], gemm_arguments)
