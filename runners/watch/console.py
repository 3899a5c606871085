"""Progress output of a run: a bar on a terminal, occasional lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

from tqdm.std import tqdm as terminal_bar

from esm_packed.runners.system.terminal import printable

LOG_INTERVAL_SECONDS = 15.0

_NARROW_COLUMNS = 60
_NARROW_BAR = "{desc}: {percentage:3.0f}%, {remaining} left{postfix}"
"""With fewer columns the terminal would cut off the time left in the usual bar."""


class Advance(Protocol):
    """Adds finished units to a progress display; `state` is a short text for a bar."""

    def __call__(self, amount: int, /, state: str = "") -> None: ...


class Console:
    """Notes and progress on stderr.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = _is_notebook() or (sys.stderr is not None and sys.stderr.isatty())

    @property
    def has_bar(self) -> bool:
        """Whether progress is shown as a bar."""
        return self._terminal and not self._quiet

    def note(self, text: str) -> None:
        """Print one line; in a log with a timestamp."""
        if not self._quiet:
            stamp = "" if self._terminal else time.strftime("%Y-%m-%d %H:%M:%S ")
            # A log that is gone or full must not end the work.
            with suppress(OSError):
                print(f"{stamp}{printable(text)}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, label: str, unit: str, total: int | None) -> Iterator[Advance]:
        """Show progress toward `total` units (None: unknown) while the block runs."""
        if self._quiet:
            yield lambda amount, /, state="": None
        elif self._terminal:
            with _bar(
                total=total,
                desc=label,
                unit=f" {unit}",
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.1,
                leave=False,
                bar_format=_NARROW_BAR if _columns() < _NARROW_COLUMNS else None,
            ) as bar:

                def advance(amount: int, /, state: str = "") -> None:
                    if state:
                        bar.set_postfix_str(state)
                    bar.update(amount)

                yield advance
        else:
            yield _LogLines(self, label, unit, total)

    @contextmanager
    def lines(self, count: int) -> Iterator[Callable[[Sequence[str]], None]]:
        """`count` lines below the progress, updated from time to time while the block runs."""
        if self._quiet:
            yield lambda texts: None
        elif self._terminal:
            with ExitStack() as stack:
                bars = [
                    stack.enter_context(
                        _bar(
                            total=0, bar_format="{desc}", position=number + 1, leave=False, dynamic_ncols=True
                        )
                    )
                    for number in range(count)
                ]

                def show(texts: Sequence[str]) -> None:
                    for bar, text in zip(bars, texts, strict=False):
                        bar.set_description_str(text)

                yield show
        else:
            yield _LoggedLines(self)

    @contextmanager
    def byte_steps(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """Show consecutive steps, each reported as (description, bytes done, total bytes)."""
        with ExitStack() as stack:
            yield _Steps(self, stack)


class _Steps:
    def __init__(self, console: Console, stack: ExitStack) -> None:
        self._console, self._stack = console, stack
        self._step = ""
        self._done = 0
        self._advance: Advance | None = None

    def __call__(self, step: str, done: int, total: int | None) -> None:
        if self._advance is None or step != self._step:
            self._stack.close()
            self._advance = self._stack.enter_context(self._console.progress(step, "B", total))
            self._step, self._done = step, 0
        self._advance(done - self._done)
        self._done = done


class _LoggedLines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()

    def __call__(self, texts: Sequence[str]) -> None:
        if time.monotonic() - self._last >= LOG_INTERVAL_SECONDS:
            self._last = time.monotonic()
            for text in texts:
                self._console.note(text)


class _LogLines:
    def __init__(self, console: Console, label: str, unit: str, total: int | None) -> None:
        self._console, self._label, self._unit, self._total = console, label, unit, total
        self._done = 0
        self._start = self._last_line = time.monotonic()

    def __call__(self, amount: int, /, state: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last_line < LOG_INTERVAL_SECONDS:
            return
        self._last_line = now
        rate = self._done / (now - self._start)
        text = f"{self._label}: {self._done:,} {self._unit}, {rate:,.0f} {self._unit}/s"
        if self._total and self._done > 0:
            text += f", {self._done / self._total:.1%}, {duration((self._total - self._done) / rate)} left"
        self._console.note(text)


def _is_notebook() -> bool:
    return "ipykernel" in sys.modules


def _bar(**options: Any) -> Any:
    """A progress bar on the terminal or in the notebook."""
    if _is_notebook():
        from tqdm.auto import tqdm as notebook_bar

        return notebook_bar(**options)
    return terminal_bar(**options)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # no terminal, or closed
        return _NARROW_COLUMNS


def duration(seconds: float) -> str:
    """Format a duration as 12.3 s, 4:05 min or 1:02:03 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def byte_size(size: int) -> str:
    """Format a size as 512 B, 1.2 kB or 3.4 GB."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
