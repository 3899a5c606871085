"""The command `status`: the progress of a run, read from its directory."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from esm_packed.runners.input.fasta import DamagedIndexError
from esm_packed.runners.input.index import reopen_index
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.output.score_description import SUFFIXES, described_at, read_description
from esm_packed.runners.state.claims import describe_holder, holder_of, is_live
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import Plan, PlanError
from esm_packed.runners.state.shard import STATUS_NOT_COMPUTED, StoreError
from esm_packed.runners.system.terminal import counted


@dataclass(frozen=True)
class RunState:
    """The progress of the run of an output.

    Args:
        run: its directory; empty if it no longer exists.
        output: the file that it produces.
        complete: the output exists, was created by this run, and everything is computed.
        num_not_computed: records without a row in the output of `merge --partial`; None if there is no such
            output.
        command: the command that started it; empty if unknown.
        num_shards: number of shards; None while the input is read.
        num_shards_finished: number of finished shards.
        num_records: records of the input, copies of proteins that are scored, or rows of a table of scores.
        num_records_finished: those in finished shards.
        shards_per_minute: None if unknown.
        seconds_since_last: seconds since the last shard was finished.
        workers: processes working on it.
        is_scoring: whether variants are scored.
        index_fault: why the records of its inputs cannot be read, empty if they can.
    """

    run: str
    output: str
    complete: bool = False
    num_not_computed: int | None = None
    command: str = ""
    num_shards: int | None = None
    num_shards_finished: int = 0
    num_records: int | None = None
    num_records_finished: int = 0
    shards_per_minute: float | None = None
    seconds_since_last: float | None = None
    workers: tuple[str, ...] = ()
    is_scoring: bool = False
    index_fault: str = ""

    def lines(self) -> list[str]:
        """For the terminal."""
        if self.complete:
            kept = f"; {self.run} is kept" if self.run else ""
            records = counted(self.num_records or 0, "row" if self.is_scoring else "sequence")
            return [f"{self.output}: complete, {records}{kept}", *self.workers]
        partial = []
        if self.num_not_computed is not None:
            missing = f"{self.num_not_computed:,} of {self.num_records:,} proteins are not computed"
            partial = [f"{self.output}: not complete; {missing}, rerun the same embed command to continue"]
        if not self.run:
            return partial
        lines = list(self.workers) or ["not running; rerun the same command to continue"]
        if self.command:
            lines.append(f"started by: {self.command}")
        if self.num_shards is None or self.num_records is None:
            return [f"{self.run}: no plan yet, reading the input", *lines]
        if self.index_fault:
            lines.append(self.index_fault)
        if self.num_shards_finished == self.num_shards and not self.is_scoring:
            lines.append(f"all shards are finished; merge them with esm-packed merge {self.output}")
        if self.shards_per_minute is not None:
            lines.insert(
                0,
                f"{self.shards_per_minute:.1f} shards a minute so far, the last one "
                f"{self.seconds_since_last:,.0f} s ago",
            )
        noun = "copies" if self.is_scoring else "records"
        return [
            *partial,
            f"{self.run}: {self.num_shards_finished:,} of {self.num_shards:,} shards finished, "
            f"{self.num_records_finished:,} of {self.num_records:,} {noun} "
            f"({self.num_records_finished / self.num_records:.0%})",
            *lines,
        ]


def run_state(directory: RunDirectory) -> RunState:
    """The progress of the run of an output.

    Raises:
        PlanError: neither the output nor a run exists, or it cannot be read.
    """
    try:
        if directory.exists():
            return _state_of_run(directory)
        if not directory.output.exists():
            raise PlanError(f"{directory.output}: no such output file or run")
        if (found := read_description(directory.output)) is not None:
            return RunState(
                "", str(directory.output), complete=True, num_records=found["num_rows"], is_scoring=True
            )
        if directory.output.suffix.lower() in SUFFIXES:
            raise PlanError(
                f"{directory.output}: {described_at(directory.output).name}, which describes this table, is "
                "missing or damaged"
            )
        with EmbeddingReader(directory.output) as reader:
            return RunState(
                "", str(directory.output), *_completeness(reader), num_records=reader.num_sequences
            )
    except StoreError as error:
        raise PlanError(str(error)) from error
    except OSError as error:  # no permission, or a name that is too long
        raise PlanError(f"{error.filename or directory.output}: {error.strerror}") from error


def _state_of_run(directory: RunDirectory) -> RunState:
    run, output = str(directory.path), str(directory.output)
    try:
        plan = Plan.read(directory.plan_path)
    except FileNotFoundError:
        return RunState(run, output, workers=_workers(directory))
    finished = directory.finished(plan.num_shards)
    times = sorted(directory.shard_path(shard).stat().st_mtime for shard in finished)
    has_rate = len(times) > 1 and times[-1] > times[0]
    is_complete, num_not_computed = False, None
    num_records = plan.starts[-1]
    if plan.is_scoring:
        table = read_description(directory.output) if directory.output.exists() else None
        if table is not None and table["plan_hash"] == plan.hash:
            is_complete, num_records = True, table["num_rows"]
    else:
        with suppress(OSError, StoreError), EmbeddingReader(directory.output) as reader:
            if reader.attributes["plan_hash"] == plan.hash:
                is_complete, num_not_computed = _completeness(reader)
    return RunState(
        run,
        output,
        is_complete,
        num_not_computed,
        command=plan.command,
        num_shards=plan.num_shards,
        num_shards_finished=len(finished),
        num_records=num_records,
        num_records_finished=sum(stop - start for start, stop in map(plan.records, finished)),
        shards_per_minute=60 * (len(times) - 1) / (times[-1] - times[0]) if has_rate else None,
        seconds_since_last=time.time() - times[-1] if times else None,
        workers=_workers(directory),
        is_scoring=plan.is_scoring,
        index_fault=_index_fault(directory),
    )


def _index_fault(directory: RunDirectory) -> str:
    try:
        reopen_index(directory.index_path).close()
    except DamagedIndexError as error:
        return str(error)
    return ""


def _completeness(reader: EmbeddingReader) -> tuple[bool, int | None]:
    """Whether an output is complete, and if not, how many of its records are not computed."""
    if reader.attributes.get("complete", True):
        return True, None
    return False, int(np.count_nonzero(reader.column("status") == STATUS_NOT_COMPUTED))


def _workers(directory: RunDirectory) -> tuple[str, ...]:
    """The processes working on it: one on the whole run, or several on slices."""
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
            f"{name}: {describe_holder(holder_of(path))}, last heartbeat {max(0.0, silent):,.0f} s ago"
        )
    return tuple(lines)
