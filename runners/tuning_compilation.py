"""Compiles the candidates of `esm-packed tune` ahead of time in separate processes.

Compiling uses the CPU, timing the GPU. Triton caches compiled kernels on disk, where the timing process finds
them.
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
"""Problems of a compiling process."""


def begin(
    configs: Sequence[ESM2Config], precisions: Sequence[Precision], tokens: int, device: torch.device
) -> None:
    """Turn this process into a compiling one: its launches stop once a kernel is compiled."""
    from triton.runtime.jit import JITFunction

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends it
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    _work[:] = problems(configs, precisions, tokens, device, few=True)


@cache
def _arguments(number: int) -> Arguments:
    return _work[number].arguments()


def compile_candidate(number: int, candidate: int, device: torch.device) -> bool:
    """Compile a candidate of problem `number` (-1: the heuristic's settings); return whether it succeeded."""
    problem, tuned = _work[number], launch.tuned_settings(device)
    tuned.pop(problem.key, None)
    if candidate >= 0:
        tuned[problem.key] = problem.candidates[candidate]
    try:
        with torch.no_grad():
            problem.case.function(**_arguments(number))
    except Exception:  # the search gets it again and drops the candidate
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
    """Compile the candidates of `work` in order in `jobs` processes; with 0, the search itself compiles.

    Args:
        configs, precisions, tokens, device: the arguments of `problems` that gave `work`.
        work: the problems to be searched.
        jobs: number of processes.

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
    wait(futures)  # if the processes failed, the search compiles
