"""Entry point of the command `esm-packed`: exit codes, error messages and signals.

Imports are kept few: until `main` handles signals, Ctrl-C ends in a traceback.
"""

from __future__ import annotations

import errno
import gc
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from esm_packed.errors import EngineError, UserError
from esm_packed.runners.system.environment import is_on
from esm_packed.runners.system.signals import ENDING_SIGNALS
from esm_packed.runners.system.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_SPACE,
    EXIT_USAGE,
    complain,
    warn,
)

if TYPE_CHECKING:
    import argparse

_REPEATED_SIGNAL_SECONDS = 5.0


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop; `str(error)` is the name of the signal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the name of the program; None for those of `sys.argv`.

    Returns:
        The exit code.
    """
    owns_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    can_continue = list(arguments[:1]) in (["embed"], ["extract"], ["merge"], ["score"])
    remedy = "; rerun the same command to continue" if can_continue else ""

    def explain_interruption(name: str) -> None:
        complain(f"interrupted ({name}){remedy}")

    received: list[str] = []
    with _signals_interrupt(explain_interruption, received) as has_started, warnings.catch_warnings():
        warnings.showwarning = _show_warning
        show_traceback = False
        try:
            show_traceback = is_on("ESM_PACKED_DEBUG")
            return _run(arguments, has_started, owns_process)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else EXIT_USAGE
        except KeyboardInterrupt as error:
            explain_interruption(str(error) or "".join(received[-1:]))  # Ray drops the message of an error
            return EXIT_INTERRUPTED
        except Exception as error:
            if isinstance(error.__cause__, Interrupted):  # wrapped by `__set_name__`
                explain_interruption(str(error.__cause__))
                return EXIT_INTERRUPTED
            return _report(error, remedy, show_traceback)


def _run(arguments: Sequence[str], has_started: Callable[[], None], owns_process: bool) -> int:
    """Run a command.

    Args:
        arguments: its name and options.
        has_started: called after all imports.
        owns_process: whether nothing else runs in this process.
    """
    from importlib import import_module

    from esm_packed.runners.cli.options import build_parser
    from esm_packed.runners.cli.values import join_negative_layers

    parser = build_parser()
    options = parser.parse_args(join_negative_layers(arguments))
    if options.name is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    options.command = shlex.join(["esm-packed", *arguments])
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        complain("the working directory no longer exists; change to another one")
        return EXIT_USAGE
    if owns_process:
        # Collections would go through all objects of torch several times, and once more at exit.
        gc.disable()
    import_module(options.module)
    if owns_process:
        gc.freeze()
        gc.enable()
    has_started()
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def _report(error: Exception, remedy: str, show_traceback: bool) -> int:
    """Print `error` as one line, with the `remedy` of a run, and return the exit code."""
    if not isinstance(error, UserError) and _is_out_of_memory(
        error
    ):  # checked first: other imports need memory
        complain(
            "out of memory: close other programs, or use fewer --threads, a smaller --token-budget or a "
            f"smaller model{remedy}"
        )
        return EXIT_FAILED
    import traceback

    from esm_packed.files import is_out_of_space

    if is_out_of_space(error):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        to_continue = " to continue" if remedy else ""
        complain(f"out of disk space: {reason}; free some and rerun the same command{to_continue}")
        return EXIT_OUT_OF_SPACE
    if isinstance(error, EngineError):
        complain(f"{error}; finished work is kept{remedy}")
        return EXIT_INTERRUPTED
    if isinstance(error, UserError):
        complain(error.message, error.details)
        return EXIT_USAGE
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename is not None:
        complain(f"{os.fsdecode(error.filename)}: {error.strerror}")
        return EXIT_USAGE
    if show_traceback:
        traceback.print_exception(error)
    else:
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        complain(f"internal error: {summary} (set ESM_PACKED_DEBUG=1 for the traceback)")
    return EXIT_FAILED


_PATH_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,  # not a regular file
)
"""Errors of a path or its permissions, explained by the path and the message of the system."""

_OUT_OF_MEMORY = (
    "annot allocate memory",
    "an't allocate memory",
    "out of memory",
    "can't start new thread",
    "could not create a primitive",
    "failed to map segment",
    "std::bad_alloc",
)
"""Messages of the system, torch, oneDNN, the loader and the standard library."""


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` was caused by a lack of memory or a memory limit."""
    while error is not None:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    warn(f"warning: {message}")


@contextmanager
def _signals_interrupt(
    explain_interruption: Callable[[str], None], received: list[str]
) -> Iterator[Callable[[], None]]:
    """Raise `Interrupted` on Ctrl-C, SIGTERM and a lost terminal, so that temporary files are removed.

    During startup the signals end the process at once: there is nothing to clean up, and libraries that are
    being imported hide exceptions or print their own tracebacks.

    Args:
        explain_interruption: called with the name of the signal that ends the process.
        received: the names of signals that raised are appended.

    Yields:
        A function to call after all imports.
    """
    is_starting = True

    def has_started() -> None:
        nonlocal is_starting
        is_starting = False

    if threading.current_thread() is not threading.main_thread():
        yield has_started
        return
    last = -_REPEATED_SIGNAL_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if is_starting:
            explain_interruption(signal.Signals(number).name)
            os._exit(EXIT_INTERRUPTED)
        # some schedulers send a second signal at once, which must not interrupt the cleanup
        if time.monotonic() - last >= _REPEATED_SIGNAL_SECONDS:
            last = time.monotonic()
            received.append(signal.Signals(number).name)
            raise Interrupted(received[-1])

    previous = {}
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # set by nohup
            previous[number] = signal.signal(number, interrupt)
    try:
        yield has_started
    finally:
        # an interrupted process is about to end: another signal must not change its exit code
        for number, handler in previous.items():
            signal.signal(number, handler if last < 0 else signal.SIG_IGN)
