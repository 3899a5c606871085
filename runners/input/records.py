"""Read FASTA records one at a time, by the rules of `embed`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from esm_packed.alphabet import TOKENS
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import InputError, ReadOptions
from esm_packed.runners.input.index import FastaIndex

_RECORDS_AT_ONCE = 1 << 10
_LETTERS = b"".join(token.encode() if len(token) == 1 else b"X" for token in TOKENS).ljust(256, b"X")


def read_fasta(
    source: str | os.PathLike[str] | IO[Any],
    *,
    invalid: str = "error",
    duplicates: str = "error",
    gaps: str = "error",
    full_header: bool = False,
    force: bool = False,
) -> Iterator[tuple[str, str]]:
    """Read a FASTA file as `esm-packed embed` does.

    The whole input is checked before the first record is returned. An index of about the size of the input is
    kept in a temporary directory, so memory use does not grow with the input.

    Args:
        source: a FASTA file, plain or gzip, `-` for standard input, or an open file.
        invalid: a character outside the alphabet is an `error`, is replaced by X (`x`), or its record is left
            out (`skip`).
        duplicates: a second record with the same ID is an `error`, is left out (`first`), or is renamed
            `ID__2`, `ID__3` ... (`rename`).
        gaps: `-` and `.` are an `error` or are removed (`drop`).
        full_header: use the whole header as the ID instead of its first word.
        force: continue even if the sequences look like DNA.

    Returns:
        (ID, sequence in upper case) of each record in input order.

    Raises:
        InputError: the input cannot be read or has faults that are not allowed; the message names the file,
            line and record of the first ones.
        ValueError: an argument is not one of its allowed values.
        OSError: the temporary directory cannot be written to.
    """
    options = ReadOptions(invalid, duplicates, gaps, full_header, force)
    directory = TemporaryDirectory(prefix="esm-packed-")
    try:
        if isinstance(source, str | os.PathLike):
            index = build_index([os.fspath(source)], Path(directory.name, "index"), options)
        else:
            index = _index_open_file(source, Path(directory.name), options)
    except BaseException:
        directory.cleanup()
        raise
    return _records(index, directory)


def _index_open_file(file: IO[Any], directory: Path, options: ReadOptions) -> FastaIndex:
    """Copy an open file and index the copy; messages use the name of the original."""
    copy = directory / "input"
    with copy.open("wb") as copied:
        while chunk := file.read(1 << 20):
            copied.write(chunk.encode("utf-8", "surrogatepass") if isinstance(chunk, str) else chunk)
    try:
        return build_index([str(copy)], directory / "index", options)
    except InputError as error:
        name = str(getattr(file, "name", "the open file"))
        message, *details = (text.replace(str(copy), name) for text in (error.message, *error.details))
        raise InputError(message, details) from None


def _records(index: FastaIndex, directory: TemporaryDirectory[str]) -> Iterator[tuple[str, str]]:
    with directory:
        try:
            for start in range(0, index.num_records, _RECORDS_AT_ONCE):
                stop = min(start + _RECORDS_AT_ONCE, index.num_records)
                residues = index.token_ids(start, stop)
                for sequence_id, token_ids in zip(index.sequence_ids(start, stop), residues, strict=True):
                    yield sequence_id, token_ids.tobytes().translate(_LETTERS).decode("ascii")
        finally:
            index.close()
