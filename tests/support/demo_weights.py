"""Read the files of the bundled model once in a process: most tests use it, and torch takes 20 ms a file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from esm_packed.checkpoints import formats


def install() -> None:
    """Patch the reader of checkpoints in this process."""
    load = formats._torch_load
    load_once = cache(load)

    def load_or_remember(path: Path) -> Any:
        return load_once(path) if path.parent == formats.DEMO_FILE.parent else load(path)

    formats._torch_load = load_or_remember
