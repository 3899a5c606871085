"""Paths that the user names: what is written is none of what is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from esm_packed.checkpoints import Checkpoint
from esm_packed.checkpoints.download import contact_regression_path
from esm_packed.errors import UsageError


def resolved(path: Path) -> Path:
    """`path` as an absolute one without links.

    Raises:
        UsageError: its links lead in a circle, or it cannot be looked up.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its symbolic links lead in a circle"
        raise UsageError(f"{path}: {reason}") from error


def check_free(output: Path, *, overwrite: bool) -> None:
    """See that a file can be made.

    Raises:
        UsageError: it is there and may not be replaced, or its folder is not there.
    """
    if os.path.lexists(output) and not overwrite:
        raise UsageError(f"{output}: exists already; --overwrite replaces it")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: there is no such folder")


def check_apart(written: Mapping[str, Path], read: Iterable[str | Path]) -> None:
    """See that no file that is written is one that is read, under whatever name, or another one written.

    Args:
        written: by option, or by another word for the message. Of a folder all that it holds is written.
        read: files; what does not exist is passed over, as the one who reads it complains.

    Raises:
        UsageError: names both.
    """
    there = [Path(path) for path in read]
    seen: dict[str, Path] = {}
    for option, path in written.items():
        for other in there:
            if _is_same(path, other) or _is_in(other, path):
                raise UsageError(f"{option} {path}: would write over {other}, which is read")
        for other_option, other in seen.items():
            if _is_same(path, other) or _is_in(path, other):
                raise UsageError(f"{option} {path}: in the way of {other_option} {other}")
        seen[option] = path


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """The files that a checkpoint is read from; none if it is made from a recipe."""
    source = Path(checkpoint.source)
    try:
        if source.is_dir():
            return [path for path in source.iterdir() if path.is_file()]
        if source.suffix == ".json":  # an index, with its parts beside it
            return [path for path in source.parent.iterdir() if path.is_file()]
        return [path for path in (source, contact_regression_path(source)) if path.is_file()]
    except OSError:
        return []


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return _absolute(one) == _absolute(other)


def _is_in(path: Path, folder: Path) -> bool:
    return _absolute(folder) in _absolute(path).parents


def _absolute(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()
