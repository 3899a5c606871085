"""The file next to a table of scores that describes its origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from esm_packed.files import read_regular, sha256_of, whole_or_nothing
from esm_packed.runners.state.plan import plan_hash

SUFFIXES = (".csv", ".parquet")
"""Of tables of scores."""

FORMAT = "esm-packed scores 1"


def described_at(table: Path) -> Path:
    """Return the path of the file next to a table that says what it was made from."""
    return table.with_name(f"{table.name}.json")


def read_description(output: Path) -> dict[str, Any] | None:
    """The description of a table; None if it does not exist or is not ours."""
    try:
        found: dict[str, Any] = json.loads(read_regular(described_at(output)))
        is_ours = (
            found["format"] == FORMAT
            and found["plan_hash"] == plan_hash(found["identity"])
            and isinstance(found["sha256"], str)
            and all(isinstance(found[name], int) for name in ("num_rows", "num_queries", "num_recomputed"))
            and all(isinstance(found[name], list) for name in ("failed", "left_out"))
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if is_ours else None


def describe(output: Path, table: Path, scratch: Path, content: Mapping[str, Any]) -> None:
    """Write the description of a table, before the table gets its final name.

    Args:
        output: the final path of the table.
        table: its current path.
        scratch: a directory for the unfinished file.
        content: the description.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    found = {"format": FORMAT, "sha256": sha256_of(table), "date": date, **content}
    with whole_or_nothing(described_at(output), scratch) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
