"""Operations of the model that are compared: checked against FP64, captured, and only then timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_baselines import (
    KERNELS,
    MODEL_SIZES,
    baseline,
    plain_linear_gelu,
    plain_linear_rotary,
    separate_linear_gelu,
    separate_linear_rotary,
)
from measuring import DEVICE, ON_GPU, measured_rate, record
from workloads import token_lengths

from esm_packed.attention import WAITING_BACKENDS, BackendError, select_backend
from esm_packed.kernels.cases import BFLOAT16, FLOAT16, FLOAT32, Results, Workload, relative_errors
from esm_packed.kernels.launch import dtype_name
from esm_packed.kernels.timing import Rounds, num_buffers
from esm_packed.numerics import PRECISIONS

ROUNDS = 7 if ON_GPU else 1
MAX_RELATIVE_ERRORS = {FLOAT16: 2e-3, BFLOAT16: 1.6e-2, FLOAT32: 1e-5}
MODES = {FLOAT16: "fp16", BFLOAT16: "bf16", FLOAT32: "fp32"}
MIN_FREE_MEMORY = 0.3
"""Share of the GPU's memory below which buffers of earlier cases are given up."""

_GROUPS = {"rotary_qk_packed_": "rotary_qk_", "gemm_bias_gelu": "fc1", "gemm_bias_rotary": "qkv"}


@dataclass(frozen=True)
class KernelEntry:
    """One provider of one operation, in one shape, on proteins of one of `WORKLOADS`."""

    operation: str
    provider: str
    model_size: str
    dtype: torch.dtype
    lengths: str = "uniref"
    total_tokens: int = 16384 if ON_GPU else 300

    @property
    def parameters(self) -> tuple[str, ...]:
        """Arguments of the test."""
        return self.operation, self.provider, self.model_size, dtype_name(self.dtype), self.lengths

    @property
    def group(self) -> str:
        """Contests of one group are compared."""
        operation = "packed_attention" if self.operation.startswith("packed_attention") else self.operation
        return _GROUPS.get(operation, operation)


class Buffers:
    """An operation in one shape: several sets of arguments, and what FP64 makes of the first."""

    def __init__(self, contest: KernelEntry) -> None:
        self.case = KERNELS[contest.operation]
        lengths = token_lengths(contest.lengths, contest.total_tokens)
        self.workload = Workload(MODEL_SIZES[contest.model_size], lengths, DEVICE)
        self.dtype = contest.dtype
        self.bytes = self.case.bytes(self.workload, self.dtype)
        self.arguments = [
            self.case.arguments(replace(self.workload, seed=seed), self.dtype)
            for seed in range(num_buffers(self.bytes, DEVICE))
        ]
        self._originals = [
            {name: arguments[name].clone() for name in self.case.mutates} for arguments in self.arguments
        ]

    @cached_property
    def truth(self) -> Results:
        """The FP64 reference on the first arguments."""
        return self.case.truth(self.arguments[0])

    def reset(self) -> None:
        """Give arguments that launches modify their first values."""
        for arguments, originals in zip(self.arguments, self._originals, strict=True):
            for name, original in originals.items():
                arguments[name].copy_(original)

    def function(self, provider: str) -> Callable[..., Any]:
        """Function with which `provider` computes the operation; it takes the launcher's arguments.

        Raises:
            pytest.skip.Exception: the provider is not to be had here.
        """
        if provider in ("ours", "fused"):
            return self.case.function
        if (self.case.name, provider) in _SEPARATE:
            return _SEPARATE[self.case.name, provider]
        if provider == "torch":
            return baseline(self.case, self.workload)
        if (self.case.name, provider) in _RIVALS:
            return _rival(self.case.name, provider)
        if provider == "torch_compile":
            return torch.compile(baseline(self.case, self.workload), dynamic=False)
        return _attention_backend(provider, MODES[self.dtype], self.workload.shape.head_dim)

    def max_relative_error(self, function: Callable[..., Any]) -> float:
        """Worst relative L2 error of what `function` writes.

        Raises:
            AssertionError: it is more than arithmetic in this dtype explains.
        """
        errors = relative_errors(self.case.results(function, self.case.copied(self.arguments[0])), self.truth)
        worst = max(errors.values())
        allowed = self.case.max_error or MAX_RELATIVE_ERRORS[self.dtype]
        assert worst <= allowed, f"relative errors {errors}, above {allowed}"
        return worst


def _linear(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **rotary: torch.Tensor
) -> torch.Tensor:
    return F.linear(hidden_states, weight, bias)


_SEPARATE: dict[tuple[str, str], Callable[..., Any]] = {
    ("gemm_bias_gelu", "separate"): separate_linear_gelu,
    ("gemm_bias_gelu", "torch"): plain_linear_gelu,
    ("gemm_bias_gelu", "matmul_alone"): _linear,
    ("gemm_bias_rotary", "separate"): separate_linear_rotary,
    ("gemm_bias_rotary", "torch"): plain_linear_rotary,
    ("gemm_bias_rotary", "matmul_alone"): _linear,
}
"""What fused products compete with."""


def _liger_layer_norm(
    module: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    normalized: torch.Tensor = module.layer_norm_forward(hidden_states, weight, bias, eps)[0]
    return normalized


def _flash_attn_layer_norm(
    module: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    normalized: torch.Tensor = module.layer_norm_fn(hidden_states, weight, bias, eps=eps)
    return normalized


_RIVALS: dict[tuple[str, str], tuple[str, Callable[..., torch.Tensor]]] = {
    ("layer_norm", "liger"): ("liger_kernel.ops.layer_norm", _liger_layer_norm),
    ("layer_norm", "flash_attn"): ("flash_attn.ops.triton.layer_norm", _flash_attn_layer_norm),
}
"""Operation and provider to the module that holds it, and how it is called."""


def _rival(operation: str, provider: str) -> Callable[..., torch.Tensor]:
    module, function = _RIVALS[operation, provider]
    try:
        return partial(function, importlib.import_module(module))
    except ImportError as error:
        pytest.skip(f"{operation} of {provider}: {error}")


def _attention_backend(name: str, mode: str, head_dim: int) -> Callable[..., Any]:
    try:
        _, backend = select_backend(name, DEVICE, PRECISIONS[mode], head_dim)
    except BackendError as error:
        pytest.skip(str(error))

    return lambda *, input_precision, **arguments: backend(*arguments.values())


@dataclass(frozen=True)
class Prepared:
    """A contest ready to be timed."""

    rounds: Rounds
    max_relative_error: float | None


class Bench:
    """Buffers and captured graphs, which stay from block to block."""

    def __init__(self) -> None:
        self._buffers: dict[KernelEntry, Buffers] = {}
        self._prepared: dict[KernelEntry, Prepared] = {}

    def buffers(self, contest: KernelEntry) -> Buffers:
        """The contest's arguments, which its rivals share."""
        key = replace(contest, provider="")
        if key not in self._buffers:
            self._buffers[key] = Buffers(contest)
        return self._buffers[key]

    def prepare(self, contest: KernelEntry) -> Prepared:
        """Check the numbers, warm up and capture, once for all blocks."""
        if contest not in self._prepared:
            self._give_up_memory()
            buffers = self.buffers(contest)
            buffers.reset()
            function = buffers.function(contest.provider)
            error = None if contest.provider == "matmul_alone" else buffers.max_relative_error(function)
            calls = [partial(function, **arguments) for arguments in buffers.arguments]
            graph = contest.provider not in WAITING_BACKENDS
            self._prepared[contest] = Prepared(Rounds(calls, DEVICE, graph=graph, reset=buffers.reset), error)
        return self._prepared[contest]

    def _give_up_memory(self) -> None:
        if DEVICE.type != "cuda":
            return
        for buffers in list(self._buffers.values())[:-1]:
            buffers.__dict__.pop("truth", None)
        free, total = torch.cuda.mem_get_info()
        reserved_but_unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if free + reserved_but_unused < MIN_FREE_MEMORY * total:
            self._prepared.clear()
            self._buffers.clear()

    def time(self, contest: KernelEntry, suite: str, block: int, benchmark: Any) -> dict[str, Any]:
        """Time `contest` and fill the benchmark's record, which is returned."""
        prepared = self.prepare(contest)
        rounds = prepared.rounds
        rounds.seconds.clear()
        with torch.no_grad():
            benchmark.pedantic(rounds.run, setup=rounds.prepare, rounds=ROUNDS)

        buffers = self.buffers(contest)
        workload, case = buffers.workload, buffers.case
        mode = _mode(contest)
        values: dict[str, Any] = {
            "group": contest.group,
            "operation": contest.operation,
            "model_size": contest.model_size,
            "lengths": contest.lengths,
            "total_tokens": workload.total_tokens,
            "num_sequences": workload.num_sequences,
            "buffers": len(buffers.arguments),
            "launches_per_round": rounds.launches,
            "captured": rounds.captured,
            "max_relative_error": prepared.max_relative_error,
            "round_seconds": list(rounds.seconds),
            "bytes": buffers.bytes,
            "ceiling_name": "copy",
        }
        if case.num_flops is not None:
            values |= {"flops": case.num_flops(workload), "ceiling_name": mode}
        amount = values.get("flops", values["bytes"])
        values["ceiling_per_second"] = measured_rate(values["ceiling_name"])
        values["bandwidth_ceiling"] = measured_rate("copy")
        if rounds.seconds:
            values["per_second"] = amount / rounds.median
            values["share_of_ceiling"] = values["per_second"] / values["ceiling_per_second"]
        return record(
            benchmark,
            seconds=rounds.median if rounds.seconds else None,
            suite=suite,
            block=block,
            provider=contest.provider,
            model=contest.model_size,
            workload=contest.lengths,
            dtype=mode,
            backend=contest.provider if contest.provider not in ("ours", "fused") else _OURS[DEVICE.type],
            sequences=workload.num_sequences,
            useful_tokens=workload.total_tokens,
            padded_tokens=workload.total_tokens,
            relative_error=prepared.max_relative_error,
            launches=rounds.launches,
            **values,
        )


_OURS = {"cuda": "triton", "cpu": "pytorch"}
"""On a CPU our operations are plain PyTorch."""


def _mode(contest: KernelEntry) -> str:
    """The matrix multiplication whose rate bounds the contest."""
    if "_tf32" in contest.operation:
        return "tf32"
    return MODES[contest.dtype]
