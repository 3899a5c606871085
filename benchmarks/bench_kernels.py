"""Every kernel beside what PyTorch offers, on packed batches of UniRef lengths: README.md.

On a CPU the sizes are tiny and the operations are the plain PyTorch ones: that shows that the code runs, no
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    MODEL_SIZES,
    OPERATIONS,
    Arguments,
    Operation,
    Results,
    Workload,
    call,
    plain_linear_gelu,
    relative_errors,
    separate_linear_gelu,
    truth_of,
    uniref_lengths,
    with_copies,
)
from gpu_timing import Rounds, copy_rate, matmul_rate, num_buffers

from esm_packed.attention import BACKENDS, BackendError, select_backend
from esm_packed.kernels.launch import dtype_name
from esm_packed.numerics import PRECISIONS

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
TOTAL_TOKENS = 16384 if ON_GPU else 300
ROUNDS = 7 if ON_GPU else 1
MAX_RELATIVE_ERRORS = {FLOAT16: 2e-3, BFLOAT16: 1.6e-2, FLOAT32: 1e-5}
MODES = {FLOAT16: "fp16", BFLOAT16: "bf16", FLOAT32: "fp32"}
MIN_FREE_MEMORY = 0.3
"""Share of the GPU's memory below which buffers of earlier cases are given up."""

SHAPES = [("650M", FLOAT16), ("650M", BFLOAT16), ("650M", FLOAT32), ("8M", FLOAT16), ("3B", FLOAT16)]
COMPILED = [("650M", FLOAT16)]
GROUPS = {"rotary_qk_packed_": "rotary_qk_", "gemm_bias_gelu": "fc1"}
FC1_PROVIDERS = ("fused", "separate", "torch", "matmul_alone")
BACKEND_NAMES = [name for name in BACKENDS if name != "triton"]


@dataclass(frozen=True)
class Contest:
    """One provider of one operation, in one shape."""

    operation: str
    provider: str
    model_size: str
    dtype: torch.dtype
    lengths: str = "uniref"

    @property
    def parameters(self) -> tuple[str, ...]:
        """What the test is called with."""
        return self.operation, self.provider, self.model_size, dtype_name(self.dtype), self.lengths

    @property
    def group(self) -> str:
        """Contests of one group are compared."""
        operation = "packed_attention" if self.operation.startswith("packed_attention") else self.operation
        return GROUPS.get(operation, operation)


def memory_bound_contests() -> Iterator[Contest]:
    """Every shape: ours and plain PyTorch; one shape: `torch.compile` of that, too."""
    for operation in OPERATIONS.values():
        if operation.num_bytes is None:
            continue
        for size, dtype in SHAPES:
            if dtype not in operation.dtypes:
                continue
            yield Contest(operation.name, "ours", size, dtype)
            if operation.name != "rotary_qk_packed_":
                yield Contest(operation.name, "torch", size, dtype)
                if ON_GPU and (size, dtype) in COMPILED:
                    yield Contest(operation.name, "torch_compile", size, dtype)


def attention_contests() -> Iterator[Contest]:
    """All backends in the main shape, the ones a model would use in the others."""
    name = "packed_attention"
    for lengths in ("uniref", "constant1024"):
        for provider in ("ours", *BACKEND_NAMES):
            yield Contest(name, provider, "650M", FLOAT16, lengths)
    for size, dtype in SHAPES[1:]:
        for provider in ("ours", "sdpa") if dtype == FLOAT32 else ("ours", "varlen"):
            yield Contest(name, provider, size, dtype)
    for precision in ("tf32", "tf32x3"):
        yield Contest(f"{name}_{precision}", "ours", "650M", FLOAT32)


def fc1_contests() -> Iterator[Contest]:
    """The fused matrix multiplication, a library's with our bias + GELU, and with PyTorch's."""
    for size, dtype in SHAPES:
        if dtype != FLOAT32:
            for provider in FC1_PROVIDERS:
                if ON_GPU or provider != "fused":  # the fused kernel has no reference path
                    yield Contest("gemm_bias_gelu", provider, size, dtype)


def contests() -> list[Contest]:
    """All, in the order they take turns."""
    found = [*memory_bound_contests(), *attention_contests(), *fc1_contests()]
    return found if ON_GPU else [contest for contest in found if contest.model_size != "3B"]


PARAMETERS = {
    "operation, provider, model_size, dtype, lengths": [contest.parameters for contest in contests()],
}


class Case:
    """An operation in one shape: several sets of arguments, and what FP64 makes of the first."""

    def __init__(self, contest: Contest) -> None:
        self.operation: Operation = OPERATIONS[contest.operation]
        lengths = uniref_lengths(TOTAL_TOKENS)
        if contest.lengths == "constant1024":
            lengths = [1024] * max(1, TOTAL_TOKENS // 1024)
        self.workload = Workload(MODEL_SIZES[contest.model_size], lengths, DEVICE)
        self.dtype = contest.dtype
        first = self.operation.arguments(self.workload, self.dtype)
        count = num_buffers(self.footprint, DEVICE)
        self.arguments = [first] + [
            self.operation.arguments(replace(self.workload, seed=seed), self.dtype)
            for seed in range(1, count)
        ]
        self._originals = [
            {name: arguments[name].clone() for name in self.operation.mutates} for arguments in self.arguments
        ]

    @property
    def footprint(self) -> int:
        """Bytes that one launch touches, at least."""
        if self.operation.num_bytes is not None:
            return self.operation.num_bytes(self.workload, self.dtype)
        # Attention reads three tensors and writes one; fc1 reads one and writes four times as much.
        width = 4 if self.operation.name.startswith("packed_attention") else 5
        return width * self.workload.total_tokens * self.workload.config.hidden_size * self.dtype.itemsize

    @cached_property
    def truth(self) -> Results:
        """The FP64 reference on the first arguments."""
        return truth_of(self.operation, with_copies(self.arguments[0], self.operation.mutates))

    def reset(self) -> None:
        """Give arguments that launches modify their first values."""
        for arguments, originals in zip(self.arguments, self._originals, strict=True):
            for name, original in originals.items():
                arguments[name].copy_(original)

    def function(self, provider: str) -> Callable[..., Any]:
        """What `provider` computes the operation with; it takes the launcher's arguments.

        Raises:
            pytest.skip.Exception: the provider is not to be had here.
        """
        if provider in ("ours", "fused"):
            return self.operation.ours()
        if self.operation.name == "gemm_bias_gelu":
            return _FC1[provider]
        if provider == "torch":
            return self.operation.plain(self.workload)
        if provider == "torch_compile":
            return torch.compile(self.operation.plain(self.workload), dynamic=False)
        return _attention_backend(provider, MODES[self.dtype], self.workload.config.head_dim)

    def max_relative_error(self, function: Callable[..., Any]) -> float:
        """Worst relative L2 error of what `function` writes.

        Raises:
            AssertionError: it is more than arithmetic in this dtype explains.
        """
        arguments = with_copies(self.arguments[0], self.operation.mutates)
        errors = relative_errors(call(function, arguments, self.operation.mutates), self.truth)
        worst = max(errors.values())
        allowed = self.operation.max_error or MAX_RELATIVE_ERRORS[self.dtype]
        assert worst <= allowed, f"relative errors {errors}, allowed are {allowed}"
        return worst


def _linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_states, weight, bias)


_FC1: dict[str, Callable[..., Any]] = {
    "separate": separate_linear_gelu,
    "torch": plain_linear_gelu,
    "matmul_alone": _linear,
}


def _attention_backend(name: str, mode: str, head_dim: int) -> Callable[..., Any]:
    try:
        _, backend = select_backend(name, DEVICE, PRECISIONS[mode], head_dim)
    except BackendError as error:
        pytest.skip(str(error))

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        softmax_scale: float,
        input_precision: str,
    ) -> torch.Tensor:
        return backend(query, key, value, cu_seqlens, max_seqlen, softmax_scale)

    return attend


@dataclass(frozen=True)
class Prepared:
    """A contest ready to be timed."""

    rounds: Rounds
    max_relative_error: float | None


class Bench:
    """Cases and captured graphs, which stay from block to block, and the ceilings of this run."""

    def __init__(self) -> None:
        self._cases: dict[Any, Case] = {}
        self._prepared: dict[Contest, Prepared] = {}
        self._ceilings: dict[str, float] = {}

    def ceiling(self, name: str) -> float:
        """Measured bytes or operations per second: `copy`, or a mode of matrix multiplication."""
        if name not in self._ceilings:
            self._ceilings[name] = copy_rate(DEVICE) if name == "copy" else matmul_rate(DEVICE, name)
        return self._ceilings[name]

    def case(self, contest: Contest) -> Case:
        """The contest's arguments, which its rivals share."""
        key = (contest.operation, contest.model_size, contest.dtype, contest.lengths)
        if key not in self._cases:
            self._cases[key] = Case(contest)
        return self._cases[key]

    def prepare(self, contest: Contest) -> Prepared:
        """Check the numbers, warm up and capture, once for all blocks."""
        if contest not in self._prepared:
            self._give_up_memory()
            case = self.case(contest)
            case.reset()
            function = case.function(contest.provider)
            error = None if contest.provider == "matmul_alone" else case.max_relative_error(function)
            calls = [_bind(function, arguments) for arguments in case.arguments]
            graph = contest.provider not in ("sdpa", "reference")  # these read lengths back from the device
            self._prepared[contest] = Prepared(Rounds(calls, DEVICE, graph=graph, reset=case.reset), error)
        return self._prepared[contest]

    def _give_up_memory(self) -> None:
        if DEVICE.type != "cuda":
            return
        for case in list(self._cases.values())[:-1]:
            case.__dict__.pop("truth", None)
        free, total = torch.cuda.mem_get_info()
        reserved_but_unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if free + reserved_but_unused < MIN_FREE_MEMORY * total:
            self._prepared.clear()
            self._cases.clear()


def _bind(function: Callable[..., Any], arguments: Arguments) -> Callable[[], Any]:
    return lambda: function(**arguments)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with torch.no_grad():
        yield Bench()


def test_kernel(
    block: int,
    operation: str,
    provider: str,
    model_size: str,
    dtype: str,
    lengths: str,
    bench: Bench,
    benchmark: Any,
    record_property: Callable[[str, Any], None],
) -> None:
    contest = Contest(operation, provider, model_size, getattr(torch, dtype), lengths)
    benchmark.group = contest.group
    prepared = bench.prepare(contest)
    rounds = prepared.rounds
    rounds.seconds.clear()
    with torch.no_grad():
        benchmark.pedantic(rounds.run, setup=rounds.prepare, rounds=ROUNDS)

    case = bench.case(contest)
    info: dict[str, Any] = {
        "block": block,
        "group": contest.group,
        "operation": operation,
        "provider": provider,
        "model_size": model_size,
        "dtype": dtype,
        "lengths": lengths,
        "total_tokens": case.workload.total_tokens,
        "num_sequences": case.workload.num_sequences,
        "buffers": len(case.arguments),
        "launches_per_round": rounds.launches,
        "captured": rounds.captured,
        "max_relative_error": prepared.max_relative_error,
    }
    if case.operation.num_bytes is not None:
        amount = case.operation.num_bytes(case.workload, contest.dtype)
        info |= {"bytes": amount, "ceiling_name": "copy"}
    else:
        assert case.operation.num_flops is not None
        amount = case.operation.num_flops(case.workload)
        info |= {"flops": amount, "ceiling_name": _mode(contest)}
    info["ceiling_per_second"] = bench.ceiling(info["ceiling_name"])
    if rounds.seconds:
        info["seconds"] = rounds.median
        info["per_second"] = amount / rounds.median
        info["share_of_ceiling"] = info["per_second"] / info["ceiling_per_second"]
    benchmark.extra_info.update(info)
    for name, value in info.items():
        record_property(name, value)


def _mode(contest: Contest) -> str:
    """The matrix multiplication whose rate bounds the contest."""
    if "_tf32" in contest.operation:
        return "tf32"
    return MODES[contest.dtype]
