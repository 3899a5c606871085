"""Trials of `esm-packed tune`, which are checked, timed in turns and ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from esm_packed.kernels.cases import Arguments, Case, Results
from esm_packed.kernels.launch import Settings
from esm_packed.kernels.timing import Rounds

LEAST_GAIN = 0.02
"""Share of the time that settings, or another backend, must save to be kept; less may be noise."""

SCREENING_ROUNDS, FINAL_ROUNDS, FINALISTS = 5, 21, 3
"""Fastest candidates of a few rounds that meet the heuristic again: the best of many is partly luck."""


@dataclass(frozen=True)
class Trial:
    """Something to be timed.

    Args:
        settings: settings of `launch`, None for the heuristic's; or the name of an attention backend.
        launch: runs the kernel once on each of several buffers.
        restore: undoes the effects of in-place launches on the buffers.
        launches: number of buffers.
    """

    settings: Settings | str | None
    launch: Callable[[], object]
    restore: Callable[[], None]
    launches: int


class Timer(Protocol):
    """Measures the median time of one launch in microseconds, for trials timed in turns."""

    def __call__(self, trials: Sequence[Trial], rounds: int, /) -> list[float]: ...


def attempt(case: Case, function: Callable[..., Any], arguments: Arguments) -> Results:
    """The results; empty if the settings do not compile or need more resources than the GPU has."""
    from triton.runtime.errors import TritonError

    try:
        return case.results(function, arguments)
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError):  # LLVM and the driver report theirs as RuntimeError
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if the GPU cannot continue after this
        return {}


def agree(results: Results, truth: Results, input_precision: str | None) -> bool:
    """Whether `results` differ from the FP32 `truth` only by rounding, as a whole and in every element."""
    for name, expected in truth.items():
        actual = results[name]
        if not actual.is_floating_point():
            if not torch.equal(actual, expected):
                return False
            continue
        unit = torch.finfo(actual.dtype).eps
        if actual.dtype == torch.float32:
            unit = 2.0**-8 if input_precision == "tf32" else 32 * unit
        error, largest = actual.float() - expected, float(expected.abs().max())
        # NaN must disagree, hence the direction of the comparisons.
        if not (
            float(error.norm()) <= unit * float(expected.norm())
            and float(error.abs_().max()) <= 4 * unit * largest
        ):
            return False
    return True


def time_in_turns(device: torch.device, trials: Sequence[Trial], rounds: int, /) -> list[float]:
    """Median microseconds of one launch of each trial; see `kernels.timing`."""
    pool = torch.cuda.graph_pool_handle()
    timed = [Rounds([trial.launch], device, reset=trial.restore, pool=pool) for trial in trials]
    for _ in range(rounds):
        for one in timed:
            one.prepare()
            one.run()
    return [1e6 * one.median / trial.launches for one, trial in zip(timed, trials, strict=True)]
