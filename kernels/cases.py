"""One example of every launcher: its inputs, minimum bytes and operations, and candidates for tuning.

Tests, benchmarks, `esm-packed tune` and the table of compiled kernels use `CASES`. A new kernel needs a file,
an operation in `kernels`, an entry here and a test.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Protocol

import torch

from esm_packed import kernels
from esm_packed.kernels import launch
from esm_packed.kernels.launch import Settings
from esm_packed.kernels.reference import statistics_dtype

Arguments = dict[str, Any]
Results = dict[str, torch.Tensor]

VOCAB_SIZE, MASK_ID = 33, 32
EPS = 1e-5
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
HALF_DTYPES = (FLOAT16, BFLOAT16)
ALL_DTYPES = (*HALF_DTYPES, FLOAT32)


class Shape(Protocol):
    """Widths of a transformer, as in `ESM2Config`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...


@dataclass(frozen=True)
class Workload:
    """A packed batch with the shape of a model.

    Args:
        shape: widths of the model.
        lengths: tokens of each sequence; zero is allowed.
        device: where tensors are created.
        max_seqlen: 0 for the length of the longest sequence.
        seed: seed of the random tensors.
    """

    shape: Shape
    lengths: Sequence[int]
    device: torch.device
    max_seqlen: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.max_seqlen:
            object.__setattr__(self, "max_seqlen", max(self.lengths, default=0))

    @property
    def total_tokens(self) -> int:
        """Number of rows of every activation."""
        return sum(self.lengths)

    @property
    def num_sequences(self) -> int:
        """Number of sequences, empty ones included."""
        return len(self.lengths)

    @property
    def sum_of_squares(self) -> int:
        """Number of pairs of tokens that attend to each other."""
        return sum(length * length for length in self.lengths)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """(num_sequences + 1,) int32."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def sequence(self) -> torch.Tensor:
        """(total_tokens,) int64 index of each token's sequence."""
        index = torch.arange(self.num_sequences)
        return index.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64)).to(self.device)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """(total_tokens,) int32."""
        tokens = torch.arange(self.total_tokens, dtype=torch.int32, device=self.device)
        return tokens - self.cu_seqlens[self.sequence]

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """(total_tokens,) int32: residues, of which one in five is masked, between BOS (0) and EOS (2)."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(4, 24, (self.total_tokens,), generator=generator, dtype=torch.int32)
        ids[torch.rand(self.total_tokens, generator=generator) < 0.2] = MASK_ID
        bounds = self.cu_seqlens.cpu().long()
        filled = bounds.diff() > 0
        ids[bounds[:-1][filled]] = 0
        ids[bounds[1:][filled] - 1] = 2
        return ids.to(self.device)

    @cached_property
    def rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (max_seqlen, head_dim / 2) FP32."""
        half = self.shape.head_dim // 2
        inv_freq = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=self.device) / half)
        positions = torch.arange(self.max_seqlen, dtype=torch.float64, device=self.device)
        angles = torch.outer(positions, inv_freq)
        return angles.cos().float(), angles.sin().float()

    def randn(
        self, *shape: int, dtype: torch.dtype, number: int = 0, scale: float = 1.0, mean: float = 0.0
    ) -> torch.Tensor:
        """Normal values, the same for the same `number`."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + number)
        values = torch.randn(*shape, dtype=torch.float32, device=self.device, generator=generator)
        return values.mul_(scale).add_(mean).to(dtype)

    def rows(
        self, dtype: torch.dtype, number: int = 0, scale: float = 1.0, mean: float = 0.0
    ) -> torch.Tensor:
        """(total_tokens, hidden_size) normal values."""
        shape = (self.total_tokens, self.shape.hidden_size)
        return self.randn(*shape, dtype=dtype, number=number, scale=scale, mean=mean)


@dataclass(frozen=True)
class Case:
    """One launcher.

    Args:
        name: name of the launcher, and of its kernel in the tuned settings.
        module: submodule of `esm_packed.kernels` that contains it.
        inputs: creates arguments for a workload, the dtype of the operands, and that of the residual stream.
        num_bytes: minimum bytes of memory traffic, for the same.
        num_flops: floating-point operations, if these and not the bytes are the limit.
        operation: the operation in `kernels` that runs it; `name` by default.
        direct: call the launcher, bypassing an operation that may choose another.
        chooses: the operation chooses among launchers with their own cases.
        dtypes: dtypes of the operands.
        streams: the residual stream is among the arguments or results.
        residual_dtype: default dtype of that stream; None: that of the operands.
        input_precision: precision of products of FP32 operands; None if torch's switches determine it.
        max_error: relative L2 error inherent in the arithmetic (TF32), 0 for that of the dtype.
        since: oldest compute capability that runs it, 80 for sm_80.
        size: the width by which it is tuned, an attribute of `Shape`.
        launches: number of Triton kernels that one call launches.
        tuned_by_stream: it is tuned by the dtype of the residual stream, not by that of the operands.
        candidates: creates settings to try in addition to the heuristic's, from its module, a shape and a
            dtype; None if nothing is tuned, or another case takes its place.
        reference: plain PyTorch with the same arguments, also in FP64; the operation's own.
    """

    name: str
    module: str
    inputs: Callable[[Workload, torch.dtype, torch.dtype], Arguments]
    num_bytes: Callable[[Workload, torch.dtype, torch.dtype], int]
    num_flops: Callable[[Workload], int] | None = None
    operation: str = ""
    direct: bool = False
    chooses: bool = False
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    streams: bool = False
    residual_dtype: torch.dtype | None = None
    input_precision: str | None = None
    max_error: float = 0.0
    since: int = 75
    size: str = "hidden_size"
    launches: int = 1
    tuned_by_stream: bool = False
    candidates: Callable[[Any, Shape, torch.dtype], list[Settings]] | None = None
    reference: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        if not self.operation:
            object.__setattr__(self, "operation", self.name)
        object.__setattr__(self, "reference", inspect.unwrap(getattr(kernels, self.operation)))

    def __str__(self) -> str:
        return self.name

    @property
    def function(self) -> Callable[..., Any]:
        """Our function; looked up lazily, as a launcher needs Triton."""
        owner, name = (self.launchers, self.name) if self.direct else (kernels, self.operation)
        function: Callable[..., Any] = getattr(owner, name)
        return function

    @property
    def launchers(self) -> Any:
        """The submodule; needs Triton."""
        return importlib.import_module(f"esm_packed.kernels.{self.module}")

    @property
    def mutates(self) -> tuple[str, ...]:
        """Names of the arguments modified in place."""
        schema = getattr(torch.ops.esm_packed, self.operation).default._schema
        return tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)

    def arguments(
        self, workload: Workload, dtype: torch.dtype, residual_dtype: torch.dtype | None = None
    ) -> Arguments:
        """Arguments of the launcher."""
        return self.inputs(workload, dtype, residual_dtype or self.residual_dtype or dtype)

    def bytes(self, workload: Workload, dtype: torch.dtype) -> int:
        """Minimum bytes that one launch moves."""
        return self.num_bytes(workload, dtype, self.residual_dtype or dtype)

    def results(self, function: Callable[..., Any], arguments: Arguments) -> Results:
        """Call `function`; return its results by name, both returned and modified in place."""
        returned = function(**arguments)
        if not isinstance(returned, tuple):
            returned = () if returned is None else (returned,)
        results = {f"out{index}": tensor for index, tensor in enumerate(returned)}
        return results | {name: arguments[name] for name in self.mutates}

    def copied(self, arguments: Arguments) -> Arguments:
        """The same arguments, with copies of those that are modified."""
        return arguments | {name: arguments[name].clone() for name in self.mutates}

    def truth(self, arguments: Arguments, dtype: torch.dtype | None = torch.float64) -> Results:
        """Results of the reference on copies of `arguments`, with floats in `dtype` if given."""

        def copied(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(dtype if value.is_floating_point() else None, copy=True)
            return dtype if dtype and isinstance(value, torch.dtype) else value

        return self.results(self.reference, {name: copied(value) for name, value in arguments.items()})

    def settings_key(self, shape: Shape, dtype: torch.dtype, residual_dtype: torch.dtype) -> str:
        """Key of its settings in the tuned settings."""
        tuned_dtype = residual_dtype if self.tuned_by_stream else dtype
        return launch.settings_key(self.name, getattr(shape, self.size), tuned_dtype)


def _embed_tokens(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    return {
        "input_ids": w.input_ids,
        "cu_seqlens": w.cu_seqlens,
        "weight": w.randn(VOCAB_SIZE, w.shape.hidden_size, dtype=dtype),
        "mask_id": MASK_ID,
        "out_dtype": residual_dtype,
    }


def _rotary_qk(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    cos, sin = w.rotary_tables
    qkv = w.randn(w.total_tokens, 3, w.shape.num_heads, w.shape.head_dim, dtype=dtype)
    return {"qkv": qkv, "cos": cos, "sin": sin, "position_ids": w.position_ids}


def _rotary_qk_packed(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    arguments = _rotary_qk(w, dtype, residual_dtype)
    del arguments["position_ids"]
    return arguments | {"cu_seqlens": w.cu_seqlens}


def _rotary_bytes(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> int:
    tables = 2 * 4 * w.max_seqlen * w.shape.head_dim // 2
    return _elements(w) * 4 * dtype.itemsize + 4 * w.total_tokens + tables


def _attention(
    w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype, input_precision: str
) -> Arguments:
    qkv = w.randn(w.total_tokens, 3, w.shape.num_heads, w.shape.head_dim, dtype=dtype)
    query, key, value = qkv.unbind(1)
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens": w.cu_seqlens,
        "max_seqlen": w.max_seqlen,
        "softmax_scale": w.shape.head_dim**-0.5,
        "input_precision": input_precision,
    }


def _attention_maps(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    arguments = _attention(w, dtype, residual_dtype, "ieee")
    sums = statistics_dtype(dtype)
    weight = w.randn(w.shape.num_heads, dtype=sums, number=1)
    scores = w.randn(w.total_tokens, max(w.max_seqlen - 2, 0), dtype=sums, number=2)
    shared = {name: arguments[name] for name in ("cu_seqlens", "max_seqlen", "softmax_scale")}
    query, key = arguments["query"], arguments["key"]
    return {"query": query, "key": key, "weight": weight, "scores": scores} | shared


def _attention_maps_bytes(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> int:
    return 2 * _elements(w) * dtype.itemsize + 8 * w.sum_of_squares + 4 * w.total_tokens * w.shape.num_heads


def _norm_parameters(w: Workload, dtype: torch.dtype) -> Arguments:
    hidden_size = w.shape.hidden_size
    weight = w.randn(hidden_size, dtype=dtype, number=10, scale=0.2, mean=1)
    return {"weight": weight, "bias": w.randn(hidden_size, dtype=dtype, number=11), "eps": EPS}


def _layer_norm(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    return {"hidden_states": w.rows(residual_dtype, scale=5, mean=1)} | _norm_parameters(w, dtype)


def _add_layer_norm(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    residual = w.rows(residual_dtype, number=1, scale=20)
    return {"delta": w.rows(dtype, scale=5), "residual": residual} | _norm_parameters(w, dtype)


def _bias_gelu(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    states = w.randn(w.total_tokens, w.shape.ffn_size, dtype=dtype, scale=3)
    return {"hidden_states": states, "bias": w.randn(w.shape.ffn_size, dtype=dtype, number=1)}


def _linear(w: Workload, dtype: torch.dtype, out_features: int) -> Arguments:
    hidden_size = w.shape.hidden_size
    return {
        "hidden_states": w.rows(dtype),
        "weight": w.randn(out_features, hidden_size, dtype=dtype, number=1, scale=hidden_size**-0.5),
        "bias": w.randn(out_features, dtype=dtype, number=2),
    }


def _fc1(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    return _linear(w, dtype, w.shape.ffn_size)


def _qkv(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    cos, sin = w.rotary_tables
    tables = {"cos": cos, "sin": sin, "position_ids": w.position_ids}
    return _linear(w, dtype, 3 * w.shape.num_heads * w.shape.head_dim) | tables


def _pooling(w: Workload, dtype: torch.dtype, residual_dtype: torch.dtype) -> Arguments:
    return {"hidden_states": w.rows(dtype, scale=3, mean=1), "cu_seqlens": w.cu_seqlens}


def _elements(w: Workload) -> int:
    """Number of elements of one activation."""
    return w.total_tokens * w.shape.hidden_size


def _pooling_case(name: str) -> Case:
    return Case(
        name,
        "pooling",
        _pooling,
        lambda w, dtype, residual: _elements(w) * dtype.itemsize + 4 * w.num_sequences * w.shape.hidden_size,
        candidates=lambda pooling, shape, dtype: pooling.CANDIDATES,
    )


def _attention_case(input_precision: str, dtypes: tuple[torch.dtype, ...], max_error: float) -> Case:
    return Case(
        "packed_attention" + ("" if input_precision == "ieee" else f"_{input_precision}"),
        "attention",
        partial(_attention, input_precision=input_precision),
        lambda w, dtype, residual: 4 * _elements(w) * dtype.itemsize,
        lambda w: 4 * w.shape.hidden_size * w.sum_of_squares,
        operation="packed_attention",
        dtypes=dtypes,
        input_precision=input_precision,
        max_error=max_error,
        since=80,
        size="head_dim",
        candidates=lambda attention, shape, dtype: attention.candidates(dtype, input_precision),
    )


def _fused_cases(
    epilogue: str,
    module: str,
    inputs: Callable[[Workload, torch.dtype, torch.dtype], Arguments],
    out_features: Callable[[Shape], int],
) -> tuple[Case, Case]:
    """A matrix multiplication with an epilogue, and the choice between this kernel and two steps."""
    common: dict[str, Any] = {
        "module": module,
        "inputs": inputs,
        "num_bytes": lambda w, dtype, residual: (
            w.total_tokens * (w.shape.hidden_size + out_features(w.shape)) * dtype.itemsize
        ),
        "num_flops": lambda w: 2 * w.total_tokens * w.shape.hidden_size * out_features(w.shape),
        "operation": f"linear_{epilogue}",
        "dtypes": HALF_DTYPES,  # elsewhere there is no choice
        "since": 80,
    }
    return (
        Case(
            f"gemm_bias_{epilogue}",
            direct=True,
            candidates=lambda launchers, shape, dtype: launchers.CANDIDATES,
            **common,
        ),
        Case(
            f"linear_{epilogue}",
            chooses=True,
            candidates=lambda launchers, shape, dtype: [{"FUSED": 1}],
            **common,
        ),
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "embed_tokens",
            "embedding",
            _embed_tokens,
            lambda w, dtype, residual: _elements(w) * residual.itemsize + 8 * w.total_tokens,
            streams=True,
            residual_dtype=FLOAT32,
            candidates=lambda embedding, shape, dtype: embedding.CANDIDATES,
        ),
        Case(
            "rotary_qk_",
            "rotary",
            _rotary_qk,
            _rotary_bytes,
            size="head_dim",
            candidates=lambda rotary, shape, dtype: rotary.candidates(shape.head_dim),
        ),
        Case("rotary_qk_packed_", "rotary", _rotary_qk_packed, _rotary_bytes, size="head_dim"),
        Case(
            "layer_norm",
            "layernorm",
            _layer_norm,
            lambda w, dtype, residual: _elements(w) * (residual.itemsize + dtype.itemsize),
            streams=True,
            tuned_by_stream=True,
            candidates=lambda layernorm, shape, dtype: layernorm.candidates(shape.hidden_size),
        ),
        Case(
            "add_layer_norm_",
            "layernorm",
            _add_layer_norm,
            lambda w, dtype, residual: _elements(w) * 2 * (residual.itemsize + dtype.itemsize),
            streams=True,
            residual_dtype=FLOAT32,
            candidates=lambda layernorm, shape, dtype: layernorm.candidates(shape.hidden_size),
        ),
        Case(
            "bias_gelu_",
            "gelu",
            _bias_gelu,
            lambda w, dtype, residual: 2 * w.total_tokens * w.shape.ffn_size * dtype.itemsize,
            size="ffn_size",
            candidates=lambda gelu, shape, dtype: gelu.CANDIDATES,
        ),
        _pooling_case("segment_mean"),
        _pooling_case("segment_max"),
        _attention_case("ieee", ALL_DTYPES, 0.0),
        _attention_case("tf32", (FLOAT32,), 5e-3),
        _attention_case("tf32x3", (FLOAT32,), 1e-5),
        Case(
            "add_attention_maps_",
            "contacts",
            _attention_maps,
            _attention_maps_bytes,
            lambda w: 2 * w.shape.hidden_size * w.sum_of_squares,
            since=80,
            size="head_dim",
            launches=3,
            candidates=lambda contacts, shape, dtype: contacts.candidates(dtype),
        ),
        *_fused_cases("gelu", "gemm", _fc1, lambda shape: shape.ffn_size),
        *_fused_cases("rotary", "qkv", _qkv, lambda shape: 3 * shape.hidden_size),
    )
}
"""By name."""


def relative_errors(actual: Results, truth: Results) -> dict[str, float]:
    """Relative L2 error of every floating-point result, computed in FP64.

    Raises:
        AssertionError: an integer or boolean result differs from `truth`, or a result is not finite.
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
