"""Checks of paths given by the user: no output may overwrite an input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from esm_packed.errors import UsageError


def resolved(path: Path) -> Path:
    """The absolute `path` with symbolic links resolved.

    Raises:
        UsageError: it has a symbolic link loop, or cannot be accessed.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "symbolic link loop"
        raise UsageError(f"{path}: {reason}") from error


def check_free(output: Path, *, overwrite: bool) -> None:
    """Check that the file `output` can be created.

    Raises:
        UsageError: it exists and may not be replaced, or its directory does not exist.
    """
    if os.path.lexists(output) and not overwrite:
        raise UsageError(f"{output}: already exists; use --overwrite to replace it")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such directory; create it first")


def check_apart(written: Mapping[str, Path], read: Iterable[str | Path]) -> None:
    """Check that no output is also an input or another output, under any name.

    Args:
        written: outputs by option, or by another name for the message; a directory stands for all its files.
        read: inputs; those that do not exist are ignored here, as reading them reports the error.

    Raises:
        UsageError: two of them clash; the message names both.
    """
    there = [Path(path) for path in read]
    seen: dict[str, Path] = {}
    for option, path in written.items():
        for other in there:
            if _is_same(path, other) or _is_in(other, path):
                raise UsageError(f"{option} {path}: would overwrite the input {other}; choose another name")
        for other_option, other in seen.items():
            if _is_same(path, other) or _is_in(path, other):
                raise UsageError(f"{option} {path}: clashes with {other_option} {other}; choose another name")
        seen[option] = path


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return _absolute(one) == _absolute(other)


def _is_in(path: Path, directory: Path) -> bool:
    return _absolute(directory) in _absolute(path).parents


def _absolute(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()
