"""Checks of the output of a scoring run: a table, and the file that describes it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from esm_packed.errors import UsageError
from esm_packed.files import sha256_of
from esm_packed.runners.checks import ExistingOutput
from esm_packed.runners.output.score_description import described_at, read_description
from esm_packed.runners.output.scores import check_table
from esm_packed.runners.state.directory import RunDirectory


def existing_table(output: Path, overwrite: bool) -> ExistingOutput | None:
    """Check that a table of scores can be created.

    Returns:
        The existing table, if it may not simply be replaced, else None.

    Raises:
        UsageError: it cannot be created, or the existing file is something else.
    """
    check_table(output)
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such directory to write {output.name} to")
    RunDirectory(described_at(output)).check_name()
    if RunDirectory.holds(output):
        raise UsageError(f"{output.parent}: is a run directory, which the run removes; choose another")
    description = described_at(output)
    for path in (output, description):
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: exists and is not a regular file")
    if overwrite or not output.exists():
        if description.exists() and not overwrite and read_description(output) is None:
            raise UsageError(
                f"{description}: already exists, not written by esm-packed; use --overwrite to replace it"
            )
        return None
    found = read_description(output)
    if found is None or found["sha256"] != _sha256_of(output, *_state_of(output)):
        raise UsageError(
            f"{output}: already exists and is not the table that {description.name} describes; use "
            "--overwrite to replace it"
        )
    return ExistingOutput(output, found["plan_hash"], found["identity"], is_complete=True)


def _state_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _sha256_of(path: Path, *state: int) -> str:
    """SHA-256 (hex) of a file in this state: a run looks for its table twice, which may be large."""
    return sha256_of(path)
