"""`esm-packed tune`: measure which launch settings of the Triton kernels are fastest on this very GPU.

The search (candidates, checked, timed, chosen) knows no clock: a `Timer` is handed to it.
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
from typing import Any, Protocol

import torch
from tqdm import tqdm

from esm_packed.config import ESM2_MODELS
from esm_packed.errors import UsageError
from esm_packed.files import whole_or_nothing
from esm_packed.kernels import launch
from esm_packed.kernels.cases import Arguments, Case, Results
from esm_packed.kernels.launch import Settings
from esm_packed.kernels.timing import Rounds, num_buffers
from esm_packed.numerics import PRECISIONS, matmul_precision, resolve_device
from esm_packed.runners.tuning_problems import TuningProblem, problems
from esm_packed.runners.watch.console import Console, duration
from esm_packed.version import __version__

LEAST_GAIN = 0.02
"""Share of the heuristic's time that settings must save to be kept: less may be chance."""

SCREENING_ROUNDS, FINAL_ROUNDS, FINALISTS = 5, 21, 3
"""The fastest candidates of a few rounds meet the heuristic again: the first of many is partly luck."""


@dataclass(frozen=True)
class TuneRequest:
    """What `esm-packed tune` is asked to do.

    Args:
        models: names in `ESM2_MODELS`.
        dtypes: precision modes.
        tokens: total_tokens of the inputs.
        device: a CUDA device.
        output: the file to write; None for where launches look for it.
        time_limit: seconds after which no further kernel is begun, or None.
    """

    models: tuple[str, ...] = tuple(ESM2_MODELS)
    dtypes: tuple[str, ...] = ("fp16",)
    tokens: int = 16384
    device: str = "cuda"
    output: Path | None = None
    time_limit: float | None = None


@dataclass(frozen=True)
class Trial:
    """Settings to be timed; None are the heuristic's.

    Args:
        settings: what `launch` launches with.
        launch: runs the kernel once on each of several buffers.
        restore: undoes what in-place launches did to the buffers.
        launches: number of buffers.
    """

    settings: Settings | None
    launch: Callable[[], object]
    restore: Callable[[], None]
    launches: int


class Timer(Protocol):
    """Tells the median time of one launch in microseconds, for trials measured in turns."""

    def __call__(self, trials: Sequence[Trial], rounds: int, /) -> list[float]: ...


@dataclass(frozen=True)
class Outcome:
    """What a search found; times in microseconds, None where nothing worked.

    Args:
        key: in the tuned settings.
        settings: the chosen ones; None leaves the heuristic's.
        candidates: how many were tried.
        dropped: how many of them failed or computed wrong numbers.
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
        tuned: the live settings; afterwards they hold the choice, or are as before if anything is raised.
        timer: times the candidates that compute right numbers.
        num_buffers: how many buffers of so many bytes to rotate through.
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
        results = _attempt(case, arguments)
        if results and _agree(results, truth, case.input_precision):
            right.append(settings)
            tensors = {id(x): x for x in (*arguments.values(), *results.values()) if torch.is_tensor(x)}
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        for result in results.values():
            # The next candidate gets this memory, and must not find right numbers there.
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
        # All results are alive at once, so that none is written where the cache still holds another.
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


def _attempt(case: Case, arguments: Arguments) -> Results:
    """The results; none if these settings do not compile or need more than the GPU has."""
    from triton.runtime.errors import TritonError

    try:
        return case.results(case.function, arguments)
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError):  # LLVM and the driver report theirs as RuntimeError
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if the GPU cannot go on after this
        return {}


def _agree(results: Results, truth: Results, input_precision: str | None) -> bool:
    """Whether rounding alone parts `results` from the FP32 `truth`, as a whole and in every element."""
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
        # NaN must disagree, so the comparisons are this way round.
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


def search_all(
    work: Sequence[TuningProblem],
    tuned: dict[str, Settings],
    timer: Timer,
    num_buffers: Callable[[int], int],
    save: Callable[[Outcome], None],
    console: Console,
    time_limit: float | None = None,
) -> list[Outcome]:
    """Search for one problem after the other, saving each outcome at once; see `search`."""
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
                outcome = search(problem, tuned, timer, num_buffers, bar.update)
            except torch.OutOfMemoryError:
                note(f"{problem.key}: left as it was, there is too little memory; lower --tokens")
                continue
            except KeyboardInterrupt:
                note(f"{len(outcomes)} of {len(work)} kernels were measured and their settings written")
                raise
            except RuntimeError as error:
                raise RuntimeError(f"{problem.key}: {error}") from error
            save(outcome)
            outcomes.append(outcome)
            if bar.disable:
                left = (time.monotonic() - begin) * (len(work) / (number + 1) - 1)
                note(f"{number + 1}/{len(work)} {_row(outcome)}, about {duration(left)} left")
    return outcomes


def read_settings(path: Path, gpu: str) -> dict[str, Any]:
    """What the file of tuned settings at `path` holds; empty if there is none.

    Raises:
        UsageError: it is something else, or of another GPU.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(content[name], dict) for name in ("settings", "measured")):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is no file of tuned settings; name another with -o, or remove it"
        ) from error
    if content.get("gpu") != gpu:
        raise UsageError(
            f"{path}: has the settings of {content.get('gpu')}, not of {gpu}; name another with -o"
        )
    return dict(content)


def save_outcome(path: Path, facts: Mapping[str, Any], outcome: Outcome) -> None:
    """Merge an outcome into the file at `path`, which is whole at any time.

    Args:
        path: the file; what it has for other keys remains.
        facts: its other fields; `gpu` among them.
        outcome: replaces what the file has for its key.
    """
    before = read_settings(path, facts["gpu"])
    settings: dict[str, Settings] = before.get("settings", {})
    _put(settings, outcome.key, outcome.settings)
    measured: dict[str, Any] = before.get("measured", {})
    measured[outcome.key] = {
        "heuristic_us": _rounded(outcome.heuristic_us),
        "tuned_us": _rounded(outcome.tuned_us),
        "gain": _rounded(outcome.gain),
        "candidates": outcome.candidates,
        "dropped": outcome.dropped,
    }
    content = json.dumps({**facts, "settings": settings, "measured": measured}, indent=1)
    with whole_or_nothing(path) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def check_output(path: Path, gpu: str) -> None:
    """Find out before the search whether its outcome can be written to `path`.

    Raises:
        UsageError: it cannot.
    """
    try:
        if path.parent == launch.CONFIG_FOLDER:
            path.parent.mkdir(exist_ok=True)  # an installation without tuned settings lacks it
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{path.parent}: cannot be written to ({error.strerror}); name a file elsewhere with -o"
        ) from error
    read_settings(path, gpu)


def tune(request: TuneRequest, console: Console) -> list[str]:
    """Measure, write the settings, and return a summary.

    Raises:
        UsageError: there is no GPU or no Triton, or the settings cannot be written.
    """
    if importlib.util.find_spec("triton") is None:
        raise UsageError("tune measures Triton kernels, and Triton is not installed")
    if not torch.cuda.is_available():
        raise UsageError(f"tune measures a GPU, and torch {torch.__version__} finds no CUDA device")
    try:
        device = resolve_device(request.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if device.type != "cuda":
        raise UsageError(f"tune measures a GPU, which {request.device} is not; choose cuda or cuda:INDEX")
    gpu = torch.cuda.get_device_name(device)
    live_path = launch.config_path(gpu)
    path = request.output or live_path
    check_output(path, gpu)
    read_settings(live_path, gpu)

    import triton

    facts = {
        "gpu": gpu,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "esm_packed": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": request.tokens,
    }
    configs = [ESM2_MODELS[name] for name in request.models]
    precisions = [PRECISIONS[name] for name in request.dtypes]
    with torch.cuda.device(device), torch.no_grad():
        outcomes = search_all(
            problems(configs, precisions, request.tokens, device),
            launch.tuned_settings(device),
            partial(time_in_turns, device),
            partial(num_buffers, device=device),
            partial(save_outcome, path, facts),
            console,
            request.time_limit,
        )
    lines = summary(outcomes)
    lines.append(f"written to {path}")
    if path.resolve() != live_path.resolve():
        lines.append(f"copy it to {live_path} for launches to use it")
    return lines


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """A table of what was found."""
    lines = [f"{'kernel/size/dtype':34} {'heuristic':>12} {'tuned':>12} {'gain':>7}  settings"]
    lines += [_row(outcome) for outcome in outcomes]
    faster = sum(outcome.settings is not None for outcome in outcomes)
    candidates = sum(outcome.candidates for outcome in outcomes)
    dropped = sum(outcome.dropped for outcome in outcomes)
    lines.append(
        f"{faster} of {len(outcomes)} kernels with settings of their own; of {candidates} candidates "
        f"{dropped} failed and were dropped"
    )
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
