"""The operations of `esm_packed.kernels` with inputs of the model's shapes, for GPU tests and benchmarks.

Every operation comes with the reference that defines it, what plain PyTorch does in its place without waiting
for the device, and the bytes or floating-point operations it cannot do without.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from workloads import token_lengths

from esm_packed import kernels
from esm_packed.alphabet import BOS_ID, EOS_ID, MASK_ID, VOCAB_SIZE
from esm_packed.attention import sdpa_attention
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.kernels import matmul, reference

Arguments = dict[str, Any]
Results = dict[str, torch.Tensor]

EPS = 1e-5
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
ALL_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
HALF_DTYPES = (FLOAT16, BFLOAT16)

MODEL_SIZES: dict[str, ESM2Config] = {name.split("_")[2]: config for name, config in ESM2_MODELS.items()}
"""`8M`, `35M`, `150M`, `650M`, `3B`, `15B` to the model's shape."""


def uniref_lengths(total_tokens: int, seed: int = 0) -> list[int]:
    """Tokens of proteins as long as UniRef's, the last cut so that they make `total_tokens` together."""
    return token_lengths("uniref", total_tokens, seed)


@dataclass(frozen=True)
class Workload:
    """A packed batch in the shape of a model.

    Args:
        config: the model's shape; the number of layers plays no part.
        lengths: tokens of each sequence; zero is allowed at the end.
        device: where tensors are made.
        max_seqlen: 0 for that of the longest sequence.
        seed: of the random tensors.
    """

    config: ESM2Config
    lengths: Sequence[int]
    device: torch.device
    max_seqlen: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.max_seqlen:
            object.__setattr__(self, "max_seqlen", max(self.lengths))

    @property
    def total_tokens(self) -> int:
        """Rows of every activation."""
        return sum(self.lengths)

    @property
    def num_sequences(self) -> int:
        """Sequences, empty ones included."""
        return len(self.lengths)

    @property
    def sum_of_squares(self) -> int:
        """Pairs of tokens that attend to each other."""
        return sum(length * length for length in self.lengths)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """(num_sequences + 1,) int32."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return torch.from_numpy(bounds).to(self.device)

    @cached_property
    def sequence(self) -> torch.Tensor:
        """(total_tokens,) int64 index of each token's sequence."""
        return torch.from_numpy(np.repeat(np.arange(self.num_sequences), self.lengths)).to(self.device)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """(total_tokens,) int32."""
        positions = [np.arange(length, dtype=np.int32) for length in self.lengths]
        return torch.from_numpy(np.concatenate(positions)).to(self.device)

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """(total_tokens,) int32: BOS, residues of which one in twenty is masked, EOS."""
        rng = np.random.default_rng(self.seed)
        ids = rng.integers(4, 24, self.total_tokens)
        ids[rng.random(self.total_tokens) < 0.05] = MASK_ID
        bounds = np.concatenate([[0], np.cumsum(self.lengths)])
        filled = np.asarray(self.lengths) > 0
        ids[bounds[:-1][filled]] = BOS_ID
        ids[bounds[1:][filled] - 1] = EOS_ID
        return torch.from_numpy(ids.astype(np.int32)).to(self.device)

    @cached_property
    def rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (max_seqlen, head_dim / 2) FP32 each."""
        half = self.config.head_dim // 2
        inv_freq = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=self.device) / half)
        positions = torch.arange(self.max_seqlen, dtype=torch.float64, device=self.device)
        angles = torch.outer(positions, inv_freq)
        return angles.cos().float(), angles.sin().float()

    def randn(self, *shape: int, dtype: torch.dtype, number: int = 0, scale: float = 1.0) -> torch.Tensor:
        """Normal values, the same for the same `number`."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + number)
        values = torch.randn(*shape, dtype=torch.float32, device=self.device, generator=generator)
        return values.mul_(scale).to(dtype)


@dataclass(frozen=True)
class Operation:
    """One launcher.

    Args:
        name: of the launcher, with what tells it from others of that name.
        reference: plain PyTorch with the launcher's arguments, in FP64 too.
        inputs: makes arguments for a workload and a dtype.
        plain: makes, for a workload, what PyTorch offers instead; it must not wait for the device.
        ours: finds the launcher; called late, for some need Triton.
        mutates: arguments modified in place.
        dtypes: of the operands.
        num_bytes: bytes that must move through memory, None where arithmetic is the limit.
        num_flops: floating-point operations, for the others.
        max_error: relative L2 error that is the arithmetic's own (TF32), 0 for that of the dtype.
    """

    name: str
    reference: Callable[..., Any]
    inputs: Callable[[Workload, torch.dtype], Arguments]
    plain: Callable[[Workload], Callable[..., Any]]
    ours: Callable[[], Callable[..., Any]]
    mutates: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    num_bytes: Callable[[Workload, torch.dtype], int] | None = None
    num_flops: Callable[[Workload], int] | None = None
    max_error: float = 0.0
    extra: Arguments = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def arguments(self, workload: Workload, dtype: torch.dtype) -> Arguments:
        """What the launcher is called with."""
        return self.inputs(workload, dtype) | self.extra


def with_copies(arguments: Arguments, names: Iterable[str]) -> Arguments:
    """The same arguments, those called `names` in memory of their own."""
    return arguments | {name: arguments[name].clone() for name in names}


def in_fp64(arguments: Arguments) -> Arguments:
    """The same values in FP64."""
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else torch.float64
        if isinstance(value, torch.dtype)
        else value
        for name, value in arguments.items()
    }


def call(function: Callable[..., Any], arguments: Arguments, mutates: Iterable[str] = ()) -> Results:
    """Call `function`, and name all that it wrote: what it returns, and what it modified."""
    returned = function(**arguments)
    if not isinstance(returned, tuple):
        returned = () if returned is None else (returned,)
    results = {f"out{index}": tensor for index, tensor in enumerate(returned)}
    return results | {name: arguments[name] for name in mutates}


def truth_of(operation: Operation, arguments: Arguments) -> Results:
    """The FP64 reference on the same values, which are left as they are."""
    return call(operation.reference, in_fp64(arguments), operation.mutates)


def relative_errors(actual: Results, truth: Results) -> dict[str, float]:
    """Relative L2 error of every floating-point result, formed in FP64.

    Raises:
        AssertionError: a result of integers or booleans is not that of `truth`, or one is not finite.
    """
    errors = {}
    for name, expected in truth.items():
        tensor = actual[name]
        if not tensor.is_floating_point():
            assert torch.equal(tensor, expected), f"{name} differs from the reference"
            continue
        assert tensor.isfinite().all(), f"{name} is not finite"
        errors[name] = float((tensor.double() - expected).norm() / expected.norm())
    return errors


def _embed_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    weight = w.randn(VOCAB_SIZE, w.config.hidden_size, dtype=dtype)
    return {
        "input_ids": w.input_ids,
        "cu_seqlens": w.cu_seqlens,
        "weight": weight,
        "mask_id": MASK_ID,
        "out_dtype": FLOAT32,
    }


def _plain_embed(w: Workload) -> Callable[..., Any]:
    sequence, lengths = w.sequence, w.cu_seqlens.diff()

    def embed(
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        weight: torch.Tensor,
        mask_id: int,
        out_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.arange(input_ids.numel(), dtype=torch.int32, device=weight.device)
        is_mask = input_ids == mask_id
        num_masked = torch.zeros(lengths.numel(), device=weight.device).index_add_(
            0, sequence, is_mask.float()
        )
        scale = reference.TRAINED_KEEP_RATIO / (1 - num_masked / lengths)
        scale = scale[sequence].masked_fill(is_mask, 0)
        embeddings = F.embedding(input_ids, weight) * scale[:, None]
        return embeddings.to(out_dtype), tokens - cu_seqlens[:-1][sequence]

    return embed


def _rotary_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    cos, sin = w.rotary_tables
    qkv = w.randn(w.total_tokens, 3, w.config.num_heads, w.config.head_dim, dtype=dtype)
    return {"qkv": qkv, "cos": cos, "sin": sin, "position_ids": w.position_ids}


def _rotary_packed_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    arguments = _rotary_inputs(w, dtype)
    del arguments["position_ids"]
    return arguments | {"cu_seqlens": w.cu_seqlens}


def _plain_rotary_packed(w: Workload) -> Callable[..., Any]:
    position_ids = w.position_ids

    def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        reference.rotary_qk_(qkv, cos, sin, position_ids)

    return rotate


def _rotary_bytes(w: Workload, dtype: torch.dtype) -> int:
    tables = 2 * 4 * w.max_seqlen * w.config.head_dim // 2
    return 4 * w.total_tokens * w.config.hidden_size * dtype.itemsize + 4 * w.total_tokens + tables


def _norm_parameters(w: Workload, dtype: torch.dtype) -> Arguments:
    hidden_size = w.config.hidden_size
    weight = w.randn(hidden_size, dtype=dtype, number=10, scale=0.2) + 1
    return {"weight": weight, "bias": w.randn(hidden_size, dtype=dtype, number=11), "eps": EPS}


def _layer_norm_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    states = w.randn(w.total_tokens, w.config.hidden_size, dtype=dtype, scale=3)
    return {"hidden_states": states} | _norm_parameters(w, dtype)


def _add_layer_norm_inputs(
    residual_dtype: torch.dtype | None,
) -> Callable[[Workload, torch.dtype], Arguments]:
    def inputs(w: Workload, dtype: torch.dtype) -> Arguments:
        shape = (w.total_tokens, w.config.hidden_size)
        residual = w.randn(*shape, dtype=residual_dtype or dtype, number=1, scale=15)
        return {"delta": w.randn(*shape, dtype=dtype), "residual": residual} | _norm_parameters(w, dtype)

    return inputs


def _elements(w: Workload, width: int = 1) -> int:
    return w.total_tokens * w.config.hidden_size * width


def _gelu_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    states = w.randn(w.total_tokens, w.config.ffn_size, dtype=dtype)
    return {"hidden_states": states, "bias": w.randn(w.config.ffn_size, dtype=dtype, number=1, scale=0.3)}


def _plain_gelu_(hidden_states: torch.Tensor, bias: torch.Tensor) -> None:
    hidden_states.copy_(F.gelu(hidden_states + bias))


def _fc1_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    hidden_size, ffn_size = w.config.hidden_size, w.config.ffn_size
    return {
        "hidden_states": w.randn(w.total_tokens, hidden_size, dtype=dtype),
        "weight": w.randn(ffn_size, hidden_size, dtype=dtype, number=1, scale=hidden_size**-0.5),
        "bias": w.randn(ffn_size, dtype=dtype, number=2, scale=0.3),
    }


def plain_linear_gelu(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """fc1 as PyTorch users write it."""
    return F.gelu(F.linear(hidden_states, weight, bias))


def separate_linear_gelu(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """fc1 as a library's matrix multiplication and our bias + GELU."""
    out = F.linear(hidden_states, weight)
    kernels.bias_gelu_(out, bias)
    return out


def _attention_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    qkv = w.randn(w.total_tokens, 3, w.config.num_heads, w.config.head_dim, dtype=dtype)
    query, key, value = qkv.unbind(1)
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens": w.cu_seqlens,
        "max_seqlen": w.max_seqlen,
        "softmax_scale": w.config.head_dim**-0.5,
    }


def _plain_attention(w: Workload) -> Callable[..., Any]:
    def attend(*, input_precision: str = "ieee", **arguments: Any) -> torch.Tensor:
        return sdpa_attention(**arguments)

    return attend


def _pooling_inputs(w: Workload, dtype: torch.dtype) -> Arguments:
    states = w.randn(w.total_tokens, w.config.hidden_size, dtype=dtype) + 0.5
    return {"hidden_states": states, "cu_seqlens": w.cu_seqlens}


def _plain_segment_mean(w: Workload) -> Callable[..., Any]:
    sequence = w.sequence
    is_residue = (w.position_ids > 0) & (w.position_ids < (w.cu_seqlens.diff()[sequence] - 1))
    weight = is_residue.float()[:, None]

    def pool(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(cu_seqlens) - 1, hidden_states.shape[1], device=hidden_states.device)
        return sums.index_add_(0, sequence, hidden_states.float() * weight) / (cu_seqlens.diff() - 2)[:, None]

    return pool


def _plain_check_numerics(w: Workload) -> Callable[..., Any]:
    sequence, num_sequences = w.sequence, w.num_sequences

    def check(hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        finite = hidden_states.isfinite()
        largest = hidden_states.abs().where(finite, 0).amax(1).float()
        max_abs = largest.new_zeros(num_sequences).scatter_reduce_(0, sequence, largest, "amax")
        bad = torch.zeros(num_sequences, dtype=torch.int32, device=hidden_states.device)
        return max_abs, bad.index_add_(0, sequence, (~finite).any(1).int()) > 0

    return check


def _always(function: Callable[..., Any]) -> Callable[[Workload], Callable[..., Any]]:
    return lambda workload: function


def _of_gemm(name: str) -> Callable[[], Callable[..., Any]]:
    def find() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module("esm_packed.kernels.gemm"), name)
        return function

    return find


def _attention(name: str, dtypes: tuple[torch.dtype, ...], precision: str, max_error: float) -> Operation:
    return Operation(
        name,
        reference.packed_attention,
        _attention_inputs,
        _plain_attention,
        lambda: kernels.packed_attention,
        dtypes=dtypes,
        num_flops=lambda w: 4 * w.config.hidden_size * w.sum_of_squares,
        max_error=max_error,
        extra={"input_precision": precision},
    )


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "embed_tokens",
            reference.embed_tokens,
            _embed_inputs,
            _plain_embed,
            lambda: kernels.embed_tokens,
            num_bytes=lambda w, dtype: _elements(w, 4) + 8 * w.total_tokens,
        ),
        Operation(
            "rotary_qk_",
            reference.rotary_qk_,
            _rotary_inputs,
            _always(reference.rotary_qk_),
            lambda: kernels.rotary_qk_,
            mutates=("qkv",),
            num_bytes=_rotary_bytes,
        ),
        Operation(
            "rotary_qk_packed_",
            reference.rotary_qk_packed_,
            _rotary_packed_inputs,
            _plain_rotary_packed,
            lambda: kernels.rotary_qk_packed_,
            mutates=("qkv",),
            num_bytes=_rotary_bytes,
        ),
        Operation(
            "layer_norm",
            reference.layer_norm,
            _layer_norm_inputs,
            _always(reference.layer_norm),
            lambda: kernels.layer_norm,
            num_bytes=lambda w, dtype: _elements(w, 2 * dtype.itemsize),
        ),
        Operation(
            "add_layer_norm_",
            reference.add_layer_norm_,
            _add_layer_norm_inputs(FLOAT32),
            _always(reference.add_layer_norm_),
            lambda: kernels.add_layer_norm_,
            mutates=("residual",),
            num_bytes=lambda w, dtype: _elements(w, 2 * dtype.itemsize + 8),
        ),
        Operation(
            "add_layer_norm_half_residual_",
            reference.add_layer_norm_,
            _add_layer_norm_inputs(None),
            _always(reference.add_layer_norm_),
            lambda: kernels.add_layer_norm_,
            mutates=("residual",),
            dtypes=HALF_DTYPES,
            num_bytes=lambda w, dtype: _elements(w, 4 * dtype.itemsize),
        ),
        Operation(
            "bias_gelu_",
            reference.bias_gelu_,
            _gelu_inputs,
            _always(_plain_gelu_),
            lambda: kernels.bias_gelu_,
            mutates=("hidden_states",),
            num_bytes=lambda w, dtype: _elements(w, 8 * dtype.itemsize),
        ),
        Operation(
            "gemm_bias_gelu",
            matmul.linear_gelu,
            _fc1_inputs,
            _always(plain_linear_gelu),
            _of_gemm("gemm_bias_gelu"),
            dtypes=HALF_DTYPES,
            num_flops=lambda w: 8 * w.total_tokens * w.config.hidden_size**2,
        ),
        _attention("packed_attention", ALL_DTYPES, "ieee", 0.0),
        _attention("packed_attention_tf32", (FLOAT32,), "tf32", 5e-3),
        _attention("packed_attention_tf32x3", (FLOAT32,), "tf32x3", 1e-5),
        Operation(
            "segment_mean",
            reference.segment_mean,
            _pooling_inputs,
            _plain_segment_mean,
            lambda: kernels.segment_mean,
            num_bytes=lambda w, dtype: (
                _elements(w, dtype.itemsize) + 4 * w.num_sequences * w.config.hidden_size
            ),
        ),
        Operation(
            "check_numerics",
            reference.check_numerics,
            _pooling_inputs,
            _plain_check_numerics,
            lambda: kernels.check_numerics,
            num_bytes=lambda w, dtype: _elements(w, dtype.itemsize),
        ),
    )
}


def operation_dtypes() -> list[tuple[Operation, torch.dtype]]:
    """Every operation in every dtype it serves."""
    return [(operation, dtype) for operation in OPERATIONS.values() for dtype in operation.dtypes]
