"""Deferred signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to end: from Ctrl-C, a scheduler, or a lost terminal."""


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer `ENDING_SIGNALS` while HDF5 runs: an exception inside its callbacks corrupts its state."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    handlers = {}
    for number in ENDING_SIGNALS:
        if callable(handler := signal.getsignal(number)):
            handlers[number] = handler
            signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(pending):
            signal.raise_signal(late)
