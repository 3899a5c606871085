"""Errors caused by the input or the environment, not by the program."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the input or options; `str(error)` is the full message for the terminal.

    Args:
        message: the message, or its first line if there are `details`.
        details: further lines, for a list of faults.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.message = message
        self.details = tuple(details)


class UsageError(UserError, ValueError):
    """An argument or option is invalid."""


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged or not an ESM-2; the message names the file or key and what to do."""


class EngineError(RuntimeError):
    """Workers fail on every shard; finished shards are kept, and rerunning the same command continues."""
