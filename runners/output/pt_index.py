"""`index.tsv` next to the `.pt` files: the run they belong to, and the file of each label."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esm_packed.files import open_regular, whole_or_nothing
from esm_packed.runners.output.pt_files import FileNames
from esm_packed.runners.output.reader import STATUS_LABELS, EmbeddingReader
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_FAILED

INDEX_NAME = "index.tsv"

_FIRST_LINE = "# esm-packed extract, format 1: "
_MOST_FIRST_LINE_BYTES = 1 << 20
_COLUMNS = ("label", "file", "status", "reason")
_RECORDS_AT_ONCE = 1 << 12


def write_index(
    directory: Path, scratch: Path, identity: Mapping[str, Any], reader: EmbeddingReader, names: FileNames
) -> None:
    """List all labels in input order, then the records left out, in `directory`.

    Args:
        directory: where the files are.
        scratch: a directory on the same file system for the unfinished file.
        identity: identity of the run, stored in the first line.
        reader: reader of its output.
        names: names of the files.
    """
    problems = reader.problems()
    reasons = {problem.sequence_id: problem.reason for problem in problems if not problem.file}
    with (
        whole_or_nothing(directory / INDEX_NAME, scratch) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        file.write(f"{_FIRST_LINE}{json.dumps(identity)}\n")
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(_COLUMNS)
        for start in range(0, reader.num_sequences, _RECORDS_AT_ONCE):
            stop = start + _RECORDS_AT_ONCE
            status = reader.column("status", start, stop).tolist()
            for label, each in zip(reader.sequence_ids(start, stop), status, strict=True):
                reason = "" if each == STATUS_COMPUTED else reasons.get(label, "")
                table.writerow((label, names.of(label), STATUS_LABELS[each], reason))
        for left in problems:
            if left.file:
                where = f"{left.file}, line {left.line}"
                table.writerow((left.sequence_id, "", "left out", f"{where}: {left.reason}"))


def listed_identity(directory: Path) -> dict[str, Any] | None:
    """Return the identity of the run whose files `directory` lists; None if there is no valid list."""
    try:
        with open_regular(directory / INDEX_NAME) as file:
            line = file.readline(_MOST_FIRST_LINE_BYTES).decode()
        identity = json.loads(line.removeprefix(_FIRST_LINE)) if line.startswith(_FIRST_LINE) else None
    except (OSError, ValueError, RecursionError):
        return None
    return identity if isinstance(identity, dict) else None


def num_failed(directory: Path) -> int:
    """Return how many of the labels listed in `directory` have only NaN."""
    with (directory / INDEX_NAME).open(encoding="utf-8", newline="") as file:
        file.readline()
        rows = csv.DictReader(file, delimiter="\t")
        return sum(row.get("status") == STATUS_LABELS[STATUS_FAILED] for row in rows)
