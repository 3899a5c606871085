"""Exclusive claims of a process on a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from esm_packed.errors import UsageError
from esm_packed.files import is_out_of_space
from esm_packed.runners.state.claims import Claim, ClaimedError, describe_holder, holder_of
from esm_packed.runners.state.directory import WHOLE_RUN, RunDirectory
from esm_packed.runners.state.slices import Slice
from esm_packed.runners.watch.console import Console

MOST_REMOVALS = 1000
"""How often a run directory may vanish while it is claimed before giving up: it cannot be created there."""

WAIT_SECONDS = 0.5


@contextmanager
def undisturbed(directory: RunDirectory) -> Iterator[None]:
    """Raise a `UsageError` that explains it if something is removed from the directory during the run."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is not None and directory.path not in Path(error.filename).parents:
            raise
        raise UsageError(
            f"{directory.path}: the directory or a file in it was removed during the run; rerun the same "
            "command to continue"
        ) from error


@contextmanager
def claimed(directory: RunDirectory, purpose: str, console: Console) -> Iterator[Claim]:
    """Hold the run; if the block fails, a directory without a plan is removed.

    A process that computes a slice waits for others that are joining, leaving or merging.
    """
    claim = directory.claim(purpose)
    try:
        try:
            _take(claim, directory, console)
            if purpose == WHOLE_RUN:
                check_others(directory, None)
            directory.sweep()
        except OSError as error:
            if is_out_of_space(error):
                raise
            raise UsageError(f"{directory.output.parent}: cannot be written to: {error.strerror}") from error
        yield claim
    except BaseException as error:
        if claim.is_held() and not directory.plan_path.exists():
            with suppress(OSError, UsageError):
                directory.remove()
        if isinstance(error, Exception) and not isinstance(error, UsageError) and claim.is_anothers():
            check_held(claim)  # whatever it is, two processes working in one directory caused it
        raise
    finally:
        claim.release()


def check_held(claim: Claim) -> None:
    """Check that no other process took over the run, as may happen if this one was suspended for long.

    Raises:
        UsageError: another process did.
    """
    if not claim.is_held():
        raise UsageError(
            f"{claim.path.parent}: another process has taken over this run, because this one had no recent "
            "heartbeat; wait for that process, or rerun the same command"
        )


def _take(claim: Claim, directory: RunDirectory, console: Console) -> None:
    """Take `claim` on a run, creating its directory if needed; wait for others if both are slices."""
    is_waiting = False
    for attempt in count():
        try:
            directory.make()
            claim.acquire()
            return
        except FileNotFoundError:  # the process that used the directory has removed it
            if attempt == MOST_REMOVALS:
                raise
        except ClaimedError as holder:
            if WHOLE_RUN in (claim.purpose, holder.purpose) or not holder.purpose:
                raise UsageError(
                    f"{directory.path} is in use by {holder}; wait for it, or delete {claim.path} if that "
                    "process no longer exists"
                ) from holder
            if not is_waiting:
                console.note(f"waiting for {holder}, which is {holder.purpose}")
            is_waiting = True
            time.sleep(WAIT_SECONDS)


def check_others(directory: RunDirectory, part: Slice | None) -> None:
    """Check that `part` (None: the whole run) does not overlap with what others compute.

    Raises:
        UsageError: it does; the message names the other process.
    """
    for other, path in directory.live_slices().items():
        who = describe_holder(holder_of(path))
        if part == other:
            raise UsageError(
                f"slice {part} of {directory.path} is being computed by {who}; wait for it, or delete {path} "
                "if that process no longer exists"
            )
        if part is None or part.count != other.count:
            wanted = "the whole run" if part is None else f"slice {part}"
            raise UsageError(
                f"{directory.path} is being computed in {other.count} slices, {other} by {who}; {wanted} "
                "overlaps with them"
            )
