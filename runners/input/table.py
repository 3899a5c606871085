"""Tables that describe sequences: tab-separated, with a header and the ID in the first column."""

from __future__ import annotations

from pathlib import Path

from esm_packed.errors import UsageError
from esm_packed.runners.input.fasta import shorten

_SHOWN_COLUMNS = 10


def read_column(path: Path, column: str) -> dict[str, str]:
    """Read a column of a TSV file, keyed by the ID in the first column.

    Raises:
        UsageError: the file or column does not exist, a line has too few columns, an ID appears twice, or the
            file is not text.
        OSError: the file cannot be read.
    """
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig") as lines:
            header = next(lines, "").rstrip("\n").split("\t")
            if column not in header[1:]:
                raise UsageError(_no_column(path, column, header))
            place = header.index(column, 1)
            for number, line in enumerate(lines, 2):
                fields = line.rstrip("\n").split("\t")
                if fields == [""]:
                    continue
                if len(fields) <= place:
                    raise UsageError(
                        f"{path}: line {number} has {len(fields)} columns; the header has {len(header)}"
                    )
                if fields[0] in found:
                    raise UsageError(f"{path}: line {number}: {shorten(fields[0])} appears twice")
                found[fields[0]] = fields[place]
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text; a tab-separated table is needed") from error
    return found


def _no_column(path: Path, column: str, header: list[str]) -> str:
    if len(header) < 2:
        return f"{path}: its first line has no tab; a tab-separated table with a header is needed"
    more = ", ..." if len(header) > _SHOWN_COLUMNS + 1 else ""
    shown = ", ".join(map(shorten, header[1 : _SHOWN_COLUMNS + 1]))
    return f"{path}: no column {shorten(column)}; choose from {shown}{more}"
