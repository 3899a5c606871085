"""`esm-packed tune`: measures which launch settings of the Triton kernels are fastest on this GPU.

The search checks, times and ranks candidates; it does not read a clock itself, but takes a `Timer`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from esm_packed.config import ESM2_MODELS
from esm_packed.errors import UsageError
from esm_packed.files import whole_or_nothing
from esm_packed.kernels import launch
from esm_packed.kernels.cases import Arguments
from esm_packed.kernels.launch import Settings
from esm_packed.kernels.timing import num_buffers
from esm_packed.numerics import PRECISIONS, matmul_precision, resolve_device
from esm_packed.runners.system.environment import num_cpus
from esm_packed.runners.tuning_attention import BackendOrder, contests, order_backends
from esm_packed.runners.tuning_compilation import compiled_ahead
from esm_packed.runners.tuning_problems import TuningProblem, problems
from esm_packed.runners.tuning_trials import (
    FINAL_ROUNDS,
    FINALISTS,
    LEAST_GAIN,
    SCREENING_ROUNDS,
    Timer,
    Trial,
    agree,
    attempt,
    time_in_turns,
)
from esm_packed.runners.watch.console import Console, duration
from esm_packed.version import __version__


@dataclass(frozen=True)
class TuneRequest:
    """Arguments of `esm-packed tune`.

    Args:
        models: names in `ESM2_MODELS`.
        dtypes: precision modes.
        tokens: total_tokens of the inputs.
        device: a CUDA device.
        output: the file to write; None for the one that launches read.
        time_limit: seconds after which no further kernel is started, or None.
        jobs: processes that compile candidates ahead; None for one less than the number of CPUs.
    """

    models: tuple[str, ...] = tuple(ESM2_MODELS)
    dtypes: tuple[str, ...] = ("fp16",)
    tokens: int = 16384
    device: str = "cuda"
    output: Path | None = None
    time_limit: float | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a search; times in microseconds, None where nothing worked.

    Args:
        key: key in the tuned settings.
        settings: the chosen settings; None keeps the heuristic's.
        candidates: how many were tried.
        dropped: how many of them failed or computed wrong results.
    """

    key: str
    settings: Settings | None
    heuristic_us: float | None
    tuned_us: float | None
    candidates: int
    dropped: int

    @property
    def gain(self) -> float | None:
        """Share of the heuristic's time that is saved."""
        if self.heuristic_us is None or self.tuned_us is None:
            return None
        return 1 - self.tuned_us / self.heuristic_us


def search(
    problem: TuningProblem,
    tuned: dict[str, Settings],
    timer: Timer,
    num_buffers: Callable[[int], int],
    advance: Callable[[], object] = lambda: None,
) -> Outcome:
    """Choose the settings of one kernel.

    Args:
        problem: the kernel.
        tuned: the live settings; afterward they hold the choice, or are unchanged if anything is raised.
        timer: times the candidates that compute correct results.
        num_buffers: number of buffers of a given size in bytes to rotate through.
        advance: called after each candidate is checked.
    """
    before = tuned.get(problem.key)
    try:
        with matmul_precision(problem.precision):
            outcome = _search(problem, partial(_put, tuned, problem.key), timer, num_buffers, advance)
    except BaseException:
        _put(tuned, problem.key, before)
        raise
    _put(tuned, problem.key, outcome.settings)
    return outcome


def _put(tuned: dict[str, Settings], key: str, settings: Settings | None) -> None:
    if settings is None:
        tuned.pop(key, None)
    else:
        tuned[key] = settings


def _search(
    problem: TuningProblem,
    put: Callable[[Settings | None], None],
    timer: Timer,
    num_buffers: Callable[[int], int],
    advance: Callable[[], object],
) -> Outcome:
    case = problem.case
    arguments, originals = problem.arguments(), problem.arguments()

    def restore(buffers: list[Arguments]) -> None:
        for buffer, name in itertools.product(buffers, case.mutates):
            buffer[name].copy_(originals[name])

    with matmul_precision(PRECISIONS["fp32"]):
        truth = case.truth(arguments, torch.float32)
    right: list[Settings | None] = []
    num_bytes = 1
    for settings in (None, *problem.candidates):
        put(settings)
        restore([arguments])
        results = attempt(case, case.function, arguments)
        if results and agree(results, truth, case.input_precision):
            right.append(settings)
            tensors = {id(x): x for x in (*arguments.values(), *results.values()) if torch.is_tensor(x)}
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        for result in results.values():
            # The next candidate gets this memory and must not find correct results there.
            result.fill_(math.nan if result.is_floating_point() else -1)
        del results
        advance()
    dropped = len(problem.candidates) - sum(settings is not None for settings in right)
    if not right:
        return Outcome(problem.key, None, None, None, len(problem.candidates), dropped)

    del truth
    buffers = [arguments, *(problem.arguments() for _ in range(num_buffers(num_bytes) - 1))]
    restore(buffers)

    def run(settings: Settings | None) -> object:
        put(settings)
        # All results stay alive, so that none is written where the cache still holds another.
        return [case.function(**buffer) for buffer in buffers]

    trials = [
        Trial(settings, partial(run, settings), partial(restore, buffers), len(buffers)) for settings in right
    ]
    screened = timer(trials, SCREENING_ROUNDS)
    finalists = sorted(range(len(trials)), key=screened.__getitem__)[:FINALISTS]
    if right[0] is None and 0 not in finalists:
        finalists.append(0)
    times = dict(zip(finalists, timer([trials[index] for index in finalists], FINAL_ROUNDS), strict=True))
    best = min(times, key=times.__getitem__)
    heuristic_us = times[0] if right[0] is None else None
    if heuristic_us is not None and times[best] >= heuristic_us * (1 - LEAST_GAIN):
        best = 0
    return Outcome(problem.key, right[best], heuristic_us, times[best], len(problem.candidates), dropped)


def search_all(
    work: Sequence[TuningProblem],
    tuned: dict[str, Settings],
    timer: Timer,
    num_buffers: Callable[[int], int],
    save: Callable[[Outcome], None],
    console: Console,
    time_limit: float | None = None,
    compiled: Callable[[int], object] = lambda number: None,
) -> list[Outcome]:
    """Search one problem after another, saving each outcome immediately; see `search`.

    `compiled` is called with the index of a problem in `work` and waits until its candidates are compiled.
    """
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    total = sum(len(problem.candidates) + 1 for problem in work)
    # Silent where stderr is no terminal; there each kernel gets a line.
    with tqdm(total=total, unit=" settings", dynamic_ncols=True, leave=False, disable=None) as bar:

        def note(text: str) -> None:
            bar.clear()
            console.note(text)

        for number, problem in enumerate(work):
            if time_limit is not None and number and time.monotonic() - begin >= time_limit:
                note(f"stopped by the time limit after {number} of {len(work)} kernels")
                break
            bar.set_description(problem.key)
            try:
                compiled(number)
                outcome = search(problem, tuned, timer, num_buffers, bar.update)
                save(outcome)
            except torch.OutOfMemoryError:
                note(f"{problem.key}: unchanged, not enough memory; use a smaller --tokens")
                continue
            except KeyboardInterrupt:
                note(f"{len(outcomes)} of {len(work)} kernels were measured and their settings written")
                raise
            except RuntimeError as error:
                raise RuntimeError(f"{problem.key}: {error}") from error
            outcomes.append(outcome)
            if bar.disable:
                left = (time.monotonic() - begin) * (len(work) / (number + 1) - 1)
                note(f"{number + 1}/{len(work)} {_row(outcome)}, about {duration(left)} left")
    return outcomes


def read_settings(path: Path, gpu: str) -> dict[str, Any]:
    """The contents of the file of tuned settings at `path`; empty if there is none.

    Raises:
        UsageError: it is another kind of file, or is for another GPU.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(content[name], dict) for name in ("settings", "measured")):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path}: not a file of tuned settings; choose another file with -o, or remove it"
        ) from error
    if content.get("gpu") != gpu:
        raise UsageError(
            f"{path}: has the settings of {content.get('gpu')}, not of {gpu}; choose another file with -o"
        )
    return dict(content)


def save_outcome(path: Path, facts: Mapping[str, Any], outcome: Outcome) -> None:
    """Merge an outcome into the file at `path`, which is replaced atomically.

    Args:
        path: the file; its entries for other keys are kept.
        facts: its other fields, including `gpu`.
        outcome: replaces the entry for its key.
    """
    content = {"settings": {}, "measured": {}} | read_settings(path, facts["gpu"]) | dict(facts)
    _put(content["settings"], outcome.key, outcome.settings)
    content["measured"][outcome.key] = {
        "heuristic_us": _rounded(outcome.heuristic_us),
        "tuned_us": _rounded(outcome.tuned_us),
        "gain": _rounded(outcome.gain),
        "candidates": outcome.candidates,
        "dropped": outcome.dropped,
    }
    _write(path, content)


def save_order(path: Path, facts: Mapping[str, Any], order: BackendOrder) -> None:
    """Merge the order of attention backends into the file at `path`; see `save_outcome`."""
    content = (
        {"settings": {}, "measured": {}, "attention": {}} | read_settings(path, facts["gpu"]) | dict(facts)
    )
    content["attention"][order.key] = {
        "order": order.order,
        "microseconds": {
            length_class: {name: _rounded(time_us) for name, time_us in times.items()}
            for length_class, times in order.microseconds.items()
        },
        "dropped": order.dropped,
    }
    _write(path, content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    with whole_or_nothing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def check_output(path: Path, gpu: str) -> None:
    """Check before the search that its outcome can be written to `path`.

    Raises:
        UsageError: it cannot.
    """
    try:
        if path.parent == launch.CONFIG_DIRECTORY:
            path.parent.mkdir(exist_ok=True)  # it does not exist in an installation without tuned settings
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{path.parent}: cannot be written to ({error.strerror}); choose a file elsewhere with -o"
        ) from error
    read_settings(path, gpu)


def tune(request: TuneRequest, console: Console) -> list[str]:
    """Measure, write the settings, and return a summary.

    Raises:
        UsageError: there is no GPU or no Triton, or the settings cannot be written.
    """
    device = _gpu(request)
    gpu = torch.cuda.get_device_name(device)
    live_path = launch.config_path(gpu)
    path = request.output or live_path
    check_output(path, gpu)
    read_settings(live_path, gpu)
    outcomes, orders = _measure(request, device, path, console)
    lines = summary(outcomes, orders)
    lines.append(f"written to {path}")
    if path.resolve() != live_path.resolve():
        lines.append(f"copy it to {live_path} for launches to use it")
    return lines


def _gpu(request: TuneRequest) -> torch.device:
    if importlib.util.find_spec("triton") is None:
        raise UsageError("tune needs Triton, which is not installed")
    if not torch.cuda.is_available():
        raise UsageError(f"tune needs a GPU, but torch {torch.__version__} finds no CUDA device")
    try:
        device = resolve_device(request.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if device.type != "cuda":
        raise UsageError(f"tune needs a GPU, not {request.device}; choose cuda or cuda:INDEX")
    return device


def _measure(
    request: TuneRequest, device: torch.device, path: Path, console: Console
) -> tuple[list[Outcome], list[BackendOrder]]:
    """Search for settings of every kernel; after our attention kernel, time it against its rivals."""
    import triton

    facts = {
        "gpu": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "esm_packed": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": request.tokens,
    }
    configs = [ESM2_MODELS[name] for name in request.models]
    precisions = [PRECISIONS[name] for name in request.dtypes]
    work = problems(configs, precisions, request.tokens, device)
    timer, buffers = partial(time_in_turns, device), partial(num_buffers, device=device)
    competing, orders = contests(configs, precisions), list[BackendOrder]()

    def save(outcome: Outcome) -> None:
        save_outcome(path, facts, outcome)
        if outcome.key in competing:
            config, precision = competing[outcome.key]
            try:
                order = order_backends(config, precision, request.tokens, device, timer, buffers)
            except torch.OutOfMemoryError:
                console.note(f"{outcome.key}: backends not timed, not enough memory; use a smaller --tokens")
                return
            if order is not None:
                save_order(path, facts, order)
                orders.append(order)

    jobs = max(0, num_cpus() - 1) if request.jobs is None else request.jobs
    with (
        torch.cuda.device(device),
        torch.no_grad(),
        compiled_ahead(configs, precisions, request.tokens, device, work, jobs) as compiled,
    ):
        outcomes = search_all(
            work,
            launch.tuned_settings(device),
            timer,
            buffers,
            save,
            console,
            request.time_limit,
            compiled,
        )
    return outcomes, orders


def summary(outcomes: Sequence[Outcome], orders: Sequence[BackendOrder] = ()) -> list[str]:
    """A table of the results, and the attention backends by head_dim and dtype."""
    lines = [f"{'kernel/size/dtype':34} {'heuristic':>12} {'tuned':>12} {'gain':>7}  settings"]
    lines += [_row(outcome) for outcome in outcomes]
    faster = sum(outcome.settings is not None for outcome in outcomes)
    candidates = sum(outcome.candidates for outcome in outcomes)
    dropped = sum(outcome.dropped for outcome in outcomes)
    lines.append(
        f"{faster} of {len(outcomes)} kernels have tuned settings; {dropped} of {candidates} candidates "
        "failed and were rejected"
    )
    for order in orders:
        times = "; ".join(
            f"{length_class} " + ", ".join(f"{name} {time_us:.1f} us" for name, time_us in times.items())
            for length_class, times in order.microseconds.items()
        )
        lines.append(f"attention {order.key}: {order.order[0]} is fastest ({times})")
    return lines


def _row(outcome: Outcome) -> str:
    heuristic, tuned = (
        "failed" if time is None else f"{time:.1f} us" for time in (outcome.heuristic_us, outcome.tuned_us)
    )
    gain = "" if outcome.gain is None else f"{outcome.gain:.1%}"
    settings = "heuristic's"
    if outcome.settings is not None:
        settings = " ".join(f"{name}={value}" for name, value in outcome.settings.items())
    return f"{outcome.key:34} {heuristic:>12} {tuned:>12} {gain:>7}  {settings}"
