"""The log of changes made to the input."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.watch.console import Console

_ROWS_AT_ONCE = 1 << 16


def log_changes(console: Console, log: Path, output: Path) -> None:
    """Append a line for each sequence of a finished output that differs from the input: its ID and changes.

    Failure to write the log does not stop the run.
    """
    try:
        with EmbeddingReader(output) as reader, log.open("a") as file:
            for start in range(0, reader.num_sequences, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, reader.num_sequences)
                changes: defaultdict[int, list[str]] = defaultdict(list)
                for change, rows in reader.changed(start, stop).items():
                    for row in rows.tolist():
                        changes[row].append(change)
                ids = reader.sequence_ids(start, stop) if changes else []
                for row in sorted(changes):
                    line = {"event": "changed", "sequence_id": ids[row - start], "changes": changes[row]}
                    file.write(json.dumps(line) + "\n")
    except OSError as error:
        console.note(f"{log}: {error.strerror}; its list of changed sequences is incomplete")
