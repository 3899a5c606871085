"""The command `esm-packed`: how it ends, and what it says when something is wrong."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

from esm_packed.runners.arguments import build_parser
from esm_packed.runners.commands import (
    EXIT_INTERNAL_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_SPACE,
    EXIT_USAGE,
    complain,
)

_REPEATED_SIGNAL_SECONDS = 5.0


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop; `str(error)` is the signal's name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; `sys.argv` when None.

    Returns:
        The exit code.
    """
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    can_continue = list(arguments[:1]) in (["embed"], ["merge"])
    with _signals_interrupt(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options = parser.parse_args(_join_negative_layers(arguments))
            if options.command is None:
                parser.print_help(sys.stderr)
                return EXIT_USAGE
            command: Callable[[argparse.Namespace], int] = options.run
            return command(options)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else EXIT_USAGE
        except KeyboardInterrupt as error:
            complain(f"interrupted ({error})" + "; repeat the command to continue" * can_continue)
            return EXIT_INTERRUPTED
        except Exception as error:
            return _report(error, can_continue)


def _report(error: Exception, can_continue: bool) -> int:
    """Explain `error` in one line and return the exit code it calls for."""
    if _is_out_of_space(error):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        complain(f"out of space: {reason}; free some and repeat the command" + " to continue" * can_continue)
        return EXIT_OUT_OF_SPACE
    if _is_of(error, {"esm_packed.runners.ray_engine": "EngineError"}):
        complain(f"{error}; what is finished is kept, repeat the command to continue")
        return EXIT_INTERRUPTED
    if _is_of(error, _USER_ERRORS):
        complain(str(error))
        return EXIT_USAGE
    if os.environ.get("ESM_PACKED_DEBUG"):
        traceback.print_exception(error)
    else:
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        complain(f"internal error: {summary} (set ESM_PACKED_DEBUG=1 for the traceback)")
    return EXIT_INTERNAL_ERROR


def _is_out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind `error`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


_USER_ERRORS = {
    "esm_packed.attention": "BackendError",
    "esm_packed.download": "CheckpointError",
    "esm_packed.reports.page": "ReportError",
    "esm_packed.runners.fasta": "InputError",
    "esm_packed.runners.plan": "PlanError",
    "esm_packed.runners.request": "UsageError",
    "esm_packed.runners.slices": "SliceError",
    "esm_packed.runners.store": "StoreError",
}
"""What a command raises for its user's mistakes, by module."""


def _is_of(error: Exception, classes: Mapping[str, str]) -> bool:
    """Whether `error` is one of `classes`; a module that is not loaded cannot have raised it."""
    return any(
        isinstance(error, getattr(sys.modules[module], name))
        for module, name in classes.items()
        if module in sys.modules
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    with suppress(OSError):
        print(f"esm-packed: warning: {message}", file=sys.stderr, flush=True)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a lost terminal raise `Interrupted`, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -_REPEATED_SIGNAL_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        # a second signal at once, as some schedulers send, must not interrupt the cleaning up
        if time.monotonic() - last >= _REPEATED_SIGNAL_SECONDS:
            last = time.monotonic()
            raise Interrupted(signal.Signals(number).name)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has asked for this
            previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        # once interrupted the process is about to end, and a repeated signal must not change its exit code
        for number, handler in previous.items():
            signal.signal(number, handler if last < 0 else signal.SIG_IGN)


def _join_negative_layers(arguments: Sequence[str]) -> list[str]:
    """`--layers -1,-2` as `--layers=-1,-2`: argparse takes the list for an option otherwise."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--layers" and re.match(r"-\d", argument):
            joined[-1] = f"--layers={argument}"
        else:
            joined.append(argument)
    return joined
