"""What goes wrong by no fault of the program."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the program was given; `str(error)` is the full message for the terminal."""


class UsageError(UserError, ValueError):
    """An argument or option does not fit."""
