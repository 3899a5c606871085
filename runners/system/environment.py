"""Environment variables that are switches, and the number of CPUs."""

from __future__ import annotations

import os

from esm_packed.errors import UserError

_ON = ("1", "true", "yes")
_OFF = ("0", "false", "no", "")


class EnvironmentSwitchError(UserError, ValueError):
    """The value of an environment variable is neither on nor off; the message names the variable."""


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_on(variable: str) -> bool:
    """Whether an environment variable is on (1, true, yes), not off (0, false, no, empty, unset); any case.

    Raises:
        EnvironmentSwitchError: it has any other value.
    """
    value = os.environ.get(variable, "").strip().lower()
    if value not in _ON + _OFF:
        raise EnvironmentSwitchError(
            f"environment variable {variable}={os.environ[variable]!r}: set it to 1, true or yes, or to "
            "0, false or no"
        )
    return value in _ON
