"""How far a run is, as its directory shows it."""

from __future__ import annotations

import time

from esm_packed.runners.claims import describe_holder, holder_of, is_live
from esm_packed.runners.plan import Plan, PlanError
from esm_packed.runners.rundir import RunDirectory
from esm_packed.runners.store import EmbeddingReader, StoreError


def describe_run(directory: RunDirectory) -> list[str]:
    """Lines for the terminal.

    Raises:
        PlanError: neither the output nor a run is there, or what is there cannot be read.
    """
    try:
        if directory.exists():
            return _describe_unfinished(directory)
        if not directory.output.exists():
            raise PlanError(f"{directory.output}: there is neither this output nor a run that makes it")
        with EmbeddingReader(directory.output) as reader:
            return [f"{directory.output}: complete, {reader.num_sequences:,} sequences"]
    except StoreError as error:
        raise PlanError(str(error)) from error
    except OSError as error:  # no right to look there, a name too long
        raise PlanError(f"{error.filename or directory.output}: {error.strerror}") from error


def _describe_unfinished(directory: RunDirectory) -> list[str]:
    try:
        plan = Plan.read(directory.plan_path)
    except FileNotFoundError:
        return [f"{directory.path}: no plan yet, the input is being read", *_workers(directory)]
    finished = directory.finished(plan.num_shards)
    records = sum(stop - start for start, stop in map(plan.records, finished))
    lines = [
        f"{directory.path}: {len(finished):,} of {plan.num_shards:,} shards finished, "
        f"{records:,} of {plan.starts[-1]:,} records ({records / plan.starts[-1]:.0%})"
    ]
    times = sorted(directory.shard_path(shard).stat().st_mtime for shard in finished)
    if len(times) > 1 and times[-1] > times[0]:
        per_minute = 60 * (len(times) - 1) / (times[-1] - times[0])
        silent = time.time() - times[-1]
        lines.append(f"{per_minute:.1f} shards a minute so far, the last one {silent:,.0f} s ago")
    return [*lines, *_workers(directory)]


def _workers(directory: RunDirectory) -> list[str]:
    """Who is at work: one process on all of it, or several on slices."""
    claims = {f"slice {part}": path for part, path in directory.live_slices().items()}
    claims["the run"] = directory.claim().path
    lines = []
    now = time.time()
    for name, path in claims.items():
        if not is_live(path, now):
            continue
        try:
            silent = now - path.stat().st_mtime
        except FileNotFoundError:
            continue
        lines.append(
            f"{name}: {describe_holder(holder_of(path))}, last sign of life {max(0.0, silent):,.0f} s ago"
        )
    return lines or ["nobody is at work on it; the command that began it continues it"]
