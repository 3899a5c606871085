"""Switches that are set in the environment."""

from __future__ import annotations

import os

from esm_packed.errors import UserError

_ON = ("1", "true", "yes")
_OFF = ("0", "false", "no", "")


class EnvironmentSwitchError(UserError, ValueError):
    """An environment variable has a value that is neither on nor off; the message names it."""


def is_on(variable: str) -> bool:
    """Whether an environment variable is 1, true or yes, not 0, false, no, empty or unset, in any case.

    Raises:
        EnvironmentSwitchError: it is something else.
    """
    value = os.environ.get(variable, "").strip().lower()
    if value not in _ON + _OFF:
        raise EnvironmentSwitchError(
            f"environment variable {variable}={os.environ[variable]!r}: set it to 1, true or yes, or to "
            "0, false or no"
        )
    return value in _ON
