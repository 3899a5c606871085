"""Compiling what `esm-packed tune` will time, ahead of it and in processes of their own.

Compiling takes the time of a CPU and timing that of the GPU. Triton keeps what is compiled on disk, where the
process that times finds it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch

from esm_packed.config import ESM2Config
from esm_packed.kernels import launch
from esm_packed.kernels.cases import Arguments
from esm_packed.numerics import Precision
from esm_packed.runners.tuning_problems import TuningProblem, problems

_work: list[TuningProblem] = []
"""Of a process that compiles."""


def begin(
    configs: Sequence[ESM2Config], precisions: Sequence[Precision], tokens: int, device: torch.device
) -> None:
    """Make this process one that compiles: its launches end where a kernel is compiled."""
    from triton.runtime.jit import JITFunction

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it ends it
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    _work[:] = problems(configs, precisions, tokens, device, few=True)


@cache
def _arguments(number: int) -> Arguments:
    return _work[number].arguments()


def compile_candidate(number: int, candidate: int, device: torch.device) -> bool:
    """Compile a candidate of problem `number`, the heuristic's settings for -1; whether it could."""
    problem, tuned = _work[number], launch.tuned_settings(device)
    tuned.pop(problem.key, None)
    if candidate >= 0:
        tuned[problem.key] = problem.candidates[candidate]
    try:
        with torch.no_grad():
            problem.case.function(**_arguments(number))
    except Exception:  # the search meets it again, and drops the candidate
        return False
    return True


@contextmanager
def compiled_ahead(
    configs: Sequence[ESM2Config],
    precisions: Sequence[Precision],
    tokens: int,
    device: torch.device,
    work: Sequence[TuningProblem],
    jobs: int,
) -> Iterator[Callable[[int], None]]:
    """Compile the candidates of `work` in its order, in `jobs` processes; without any, in the search itself.

    Args:
        configs, precisions, tokens, device: as `problems` makes `work` of them.
        work: what is going to be searched.
        jobs: processes.

    Yields:
        A function that waits until the candidates of problem `number` are compiled.
    """
    if not jobs:
        yield lambda number: None
        return
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),  # CUDA does not survive a fork
        initializer=begin,
        initargs=(configs, precisions, tokens, device),
    )
    futures: list[list[Future[bool]]] = []
    try:
        for number, problem in enumerate(work):
            candidates = range(-1, len(problem.candidates))
            futures.append([pool.submit(compile_candidate, number, index, device) for index in candidates])
        yield lambda number: _ended(futures[number])
    finally:
        pool.shutdown(cancel_futures=True)


def _ended(futures: Sequence[Future[bool]]) -> None:
    wait(futures)  # where the processes failed, the search compiles
