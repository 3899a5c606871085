"""The command `esm-packed`: how it ends, and what it says when something is wrong.

Little is imported here: until `main` handles signals, Ctrl-C ends in a traceback.
"""

from __future__ import annotations

import errno
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
    """A signal asked the program to stop; `str(error)` is the signal's name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; `sys.argv` when None.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    can_continue = list(arguments[:1]) in (["embed"], ["extract"], ["merge"], ["score"])
    remedy = "; repeat the command to continue" if can_continue else ""

    def explain_interruption(name: str) -> None:
        complain(f"interrupted ({name}){remedy}")

    received: list[str] = []
    with _signals_interrupt(explain_interruption, received) as has_started, warnings.catch_warnings():
        warnings.showwarning = _show_warning
        show_traceback = False
        try:
            show_traceback = is_on("ESM_PACKED_DEBUG")
            return _run(arguments, has_started)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else EXIT_USAGE
        except KeyboardInterrupt as error:
            explain_interruption(str(error) or "".join(received[-1:]))  # Ray drops what an error says
            return EXIT_INTERRUPTED
        except Exception as error:
            if isinstance(error.__cause__, Interrupted):  # as `__set_name__` wraps it
                explain_interruption(str(error.__cause__))
                return EXIT_INTERRUPTED
            return _report(error, remedy, show_traceback)


def _run(arguments: Sequence[str], has_started: Callable[[], None]) -> int:
    """Do what `arguments` ask for; `has_started` is called when all is imported."""
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
        complain("the working directory is gone; change to one that exists")
        return EXIT_USAGE
    import_module(options.module)
    has_started()
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def _report(error: Exception, remedy: str, show_traceback: bool) -> int:
    """Explain `error` in one line, with the `remedy` of a run, and return the exit code it calls for."""
    if not isinstance(error, UserError) and _is_out_of_memory(error):  # before anything else is imported
        complain(
            "out of memory: close other programs, or choose fewer --threads, a smaller --token-budget or a "
            f"smaller model{remedy}"
        )
        return EXIT_FAILED
    import traceback

    from esm_packed.files import is_out_of_space

    if is_out_of_space(error):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        to_continue = " to continue" if remedy else ""
        complain(f"out of space: {reason}; free some and repeat the command{to_continue}")
        return EXIT_OUT_OF_SPACE
    if isinstance(error, EngineError):
        complain(f"{error}; what is finished is kept{remedy}")
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
    errno.EINVAL,  # no regular file
)
"""What is wrong with a path or with the rights on it, which its name and the system's words explain."""

_OUT_OF_MEMORY = (
    "annot allocate memory",
    "an't allocate memory",
    "out of memory",
    "can't start new thread",
    "could not create a primitive",
    "failed to map segment",
    "std::bad_alloc",
)
"""How the system, torch, oneDNN, the loader and the standard library say it."""


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a shortage of memory, or a limit on it, is behind `error`."""
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
    """Let Ctrl-C, SIGTERM and a lost terminal raise `Interrupted`, so that temporary files are removed.

    While the program starts they end the process at once: there is nothing to clean up, and libraries that
    are being imported hide exceptions or print tracebacks of their own.

    Args:
        explain_interruption: told the name of the signal that ends the process.
        received: gets the names of signals that raise.

    Yields:
        To be called when all is imported.
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
        # a second signal at once, as some schedulers send, must not interrupt the cleaning up
        if time.monotonic() - last >= _REPEATED_SIGNAL_SECONDS:
            last = time.monotonic()
            received.append(signal.Signals(number).name)
            raise Interrupted(received[-1])

    previous = {}
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has asked for this
            previous[number] = signal.signal(number, interrupt)
    try:
        yield has_started
    finally:
        # once interrupted the process is about to end, and a repeated signal must not change its exit code
        for number, handler in previous.items():
            signal.signal(number, handler if last < 0 else signal.SIG_IGN)
