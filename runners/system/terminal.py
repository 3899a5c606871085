"""Exit codes, errors and text for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

EXIT_COMPLETE = 0
EXIT_FAILED = 1
"""A failed verdict, out of memory, or an internal error."""
EXIT_USAGE = 2
EXIT_FAILED_ROWS = 3
EXIT_INTERRUPTED = 4
EXIT_OUT_OF_SPACE = 5


def printable(text: str) -> str:
    """`text` with every character that a terminal may interpret escaped, such as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 shard`, `2,000 shards`; `plural` is for nouns that do not just take an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def complain(text: str, details: Sequence[str] = ()) -> None:
    """Print an error on stderr: one line, and an indented one for each of `details`."""
    warn(f"error: {text}", details)


def warn(text: str, details: Sequence[str] = ()) -> None:
    """Print a line on stderr, and an indented one for each of `details`."""
    lines = [f"esm-packed: {_in_one_line(text)}", *(f"  {_in_one_line(detail)}" for detail in details)]
    with suppress(OSError):  # a closed or full log must not end the run
        print("\n".join(lines), file=sys.stderr, flush=True)


def _in_one_line(text: str) -> str:
    return printable(" ".join(text.splitlines()))


def say(lines: Sequence[str]) -> None:
    """Print results on stdout; a closed stdout is no error, because the work is done."""
    text = "\n".join(map(printable, lines))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
