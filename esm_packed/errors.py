"""What goes wrong by no fault of the program."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in what the program was given; `str(error)` is the full message for the terminal.

    Args:
        message: the message, or its first line if there are `details`.
        details: further lines, for a list of faults.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.message = message
        self.details = tuple(details)


class UsageError(UserError, ValueError):
    """An argument or option does not fit."""


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged or no ESM-2; the message says which file or key, and what to do."""


class EngineError(RuntimeError):
    """Workers fail whatever they are given; finished shards are kept, and the same command continues."""
