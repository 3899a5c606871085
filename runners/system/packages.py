"""Optional packages."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from esm_packed.errors import UserError


def optional_package(name: str, install: str) -> Any:
    """Import and return the module `name`.

    Args:
        name: of the package.
        install: the command that installs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed; install it with: {install}") from error
