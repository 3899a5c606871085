"""Measures which attention backend is fastest on this GPU, for `auto` to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch

from esm_packed.attention import AUTO_ORDER, BACKENDS, WAITING_BACKENDS, PackedAttention
from esm_packed.config import ESM2Config
from esm_packed.kernels import launch
from esm_packed.kernels.cases import CASES, HALF_DTYPES, Workload
from esm_packed.numerics import PRECISIONS, Precision, matmul_precision
from esm_packed.runners.tuning_problems import sample_lengths
from esm_packed.runners.tuning_trials import FINAL_ROUNDS, LEAST_GAIN, Timer, Trial, agree, attempt

LENGTH_CLASSES = {"short50": 50, "medium150": 150, "long300": 300}
"""Mean number of tokens of the proteins that backends are timed on."""

CASE = CASES["packed_attention"]


@dataclass(frozen=True)
class BackendOrder:
    """The result for one head_dim in one dtype.

    Args:
        key: key in `launch.tuned_attention`.
        order: backends, fastest first.
        microseconds: time of one call, by length class and backend.
        dropped: backends that failed or computed wrong results.
    """

    key: str
    order: list[str]
    microseconds: dict[str, dict[str, float]]
    dropped: list[str]


def contests(
    configs: Sequence[ESM2Config], precisions: Sequence[Precision]
) -> dict[str, tuple[ESM2Config, Precision]]:
    """Shapes and modes in which backends compete with our kernel, each once, by the key of its settings."""
    found: dict[str, tuple[ESM2Config, Precision]] = {}
    for config in configs:
        for precision in precisions:
            if precision.dtype in HALF_DTYPES:  # in FP32 only ours does not synchronize
                key = CASE.settings_key(config, precision.dtype, precision.dtype)
                found.setdefault(key, (config, precision))
    return found


def order_backends(
    config: ESM2Config,
    precision: Precision,
    tokens: int,
    device: torch.device,
    timer: Timer,
    num_buffers: Callable[[int], int],
) -> BackendOrder | None:
    """Time the backends that `auto` may take, in turns, on proteins of every length class.

    They are ranked by the geometric mean, over the classes, of their time relative to the fastest. The
    default first choice stays first if it loses less than `LEAST_GAIN`.

    Args:
        config: gives the heads.
        precision: a half-precision mode.
        tokens: total_tokens of the inputs.
        device: the device to use.
        timer: times the backends that compute correct results.
        num_buffers: number of buffers of a given size in bytes to rotate through.

    Returns:
        The order; None if fewer than two backends are left.
    """
    names = [
        name
        for name in AUTO_ORDER
        if name not in WAITING_BACKENDS
        and BACKENDS[name].obstacle(device, precision.dtype, config.head_dim) is None
    ]
    if len(names) < 2:
        return None
    microseconds: dict[str, dict[str, float]] = {}
    dropped: list[str] = []
    for length_class, mean in LENGTH_CLASSES.items():
        workload = Workload(config, sample_lengths(tokens, mean), device)
        functions = {name: _keywords(BACKENDS[name].load(precision)) for name in names}
        with matmul_precision(precision):
            times = _time(functions, workload, precision, timer, num_buffers)
        dropped += [name for name in names if name not in times]
        names = [name for name in names if name in times]
        microseconds[length_class] = times
    key = launch.attention_key(config.head_dim, precision.dtype)
    if len(names) < 2:
        return None
    return BackendOrder(key, _ranked(names, microseconds), microseconds, dropped)


def _ranked(names: list[str], microseconds: dict[str, dict[str, float]]) -> list[str]:
    """Fastest first; `names` are in the order that is kept if the gain is too small."""
    fastest = {length_class: min(times.values()) for length_class, times in microseconds.items()}
    means = {
        name: geometric_mean(
            times[name] / fastest[length_class] for length_class, times in microseconds.items()
        )
        for name in names
    }
    order = sorted(names, key=means.__getitem__)
    if means[order[0]] > means[names[0]] * (1 - LEAST_GAIN):
        order.remove(names[0])
        order.insert(0, names[0])
    return order


def _time(
    functions: dict[str, Callable[..., Any]],
    workload: Workload,
    precision: Precision,
    timer: Timer,
    num_buffers: Callable[[int], int],
) -> dict[str, float]:
    """Microseconds of the functions that compute correct results."""
    arguments = CASE.arguments(workload, precision.dtype)
    with matmul_precision(PRECISIONS["fp32"]):
        truth = CASE.truth(arguments, torch.float32)
    right = []
    for name, function in functions.items():
        results = attempt(CASE, function, arguments)
        if results and agree(results, truth, CASE.input_precision):
            right.append(name)
    del truth
    count = num_buffers(CASE.bytes(workload, precision.dtype))
    buffers = [arguments, *(CASE.arguments(workload, precision.dtype) for _ in range(count - 1))]

    def run(function: Callable[..., Any]) -> list[torch.Tensor]:
        return [function(**buffer) for buffer in buffers]

    trials = [Trial(name, partial(run, functions[name]), lambda: None, count) for name in right]
    return dict(zip(right, timer(trials, FINAL_ROUNDS), strict=True))


def _keywords(attend: PackedAttention) -> Callable[..., torch.Tensor]:
    """A backend's function, with the signature of our kernel."""

    def call(*, input_precision: str, **arguments: Any) -> torch.Tensor:
        return attend(*arguments.values())

    return call
