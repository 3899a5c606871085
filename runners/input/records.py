"""Records read back from the files that an index points into, and the line numbers that messages name."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.fasta import (
    InputError,
    Positions,
    ReadOptions,
    record_name,
    residue_codes,
    shorten,
    token_ids_of,
)
from esm_packed.runners.system.files import open_regular

STDIN = "-"

# Bytes from the start of the readable file; the sequence begins where the header ends. `copy` is 0, or the
# number in the `__2` that tells this record from an earlier one of the same ID; `modified` holds the flags of
# `fasta.Modified` but RENAMED, which `copy` tells.
RECORD = np.dtype(
    [
        ("header", "<i8"),
        ("header_bytes", "<i4"),
        ("sequence_bytes", "<i4"),
        ("length", "<i4"),
        ("copy", "<i4"),
        ("modified", "u1"),
    ]
)
Records = npt.NDArray[Any]

_PIECE_BYTES = 1 << 20
_GAP_BYTES = 1 << 12
"""Records nearer to each other are read with one read: that costs less than a second call."""


class RowFile:
    """Rows of one dtype in a file, read as they are asked for.

    A mapped file would be as short to write, but ends the process when the file is cut short meanwhile.

    Args:
        path: the file.
        dtype: of a row.
        field: the field that is given of each row; None gives whole rows.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], field: str | None = None) -> None:
        self._path = path
        self._file = open_regular(path)
        self._row = dtype
        self._field = field
        self._num_rows = os.fstat(self._file.fileno()).st_size // dtype.itemsize
        self.dtype: np.dtype[Any] = dtype if field is None else dtype[field]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, rows: slice) -> Records:
        """The rows of a slice without a step, in memory of their own.

        Raises:
            InputError: the file is shorter than it was.
        """
        start, stop, _ = rows.indices(self._num_rows)
        size = max(0, stop - start) * self._row.itemsize
        content = os.pread(self._file.fileno(), size, start * self._row.itemsize)
        while len(content) < size and (
            more := os.pread(
                self._file.fileno(), size - len(content), start * self._row.itemsize + len(content)
            )
        ):
            content += more
        if len(content) < size:
            raise InputError(f"{self._path}: cut short while it was in use; repeat the command")
        values = np.frombuffer(content, self._row)
        return values if self._field is None else np.ascontiguousarray(values[self._field])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Records:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list[Any]:
        """All of them."""
        return list(self[:].tolist())


@dataclass(frozen=True)
class Problem:
    """A record that was left out; `line` counts from 1 and is where the reason shows."""

    sequence_id: str
    file: str
    line: int
    reason: str

    def located(self) -> str:
        """File, line and record, as errors name them."""
        return f"{self.file}, line {self.line}, record {shorten(self.sequence_id)}"


class InputFile(NamedTuple):
    """One input as the user named it; `size` in bytes and `sha256` (hex) are of the file as it is on disk."""

    path: str
    size: int
    sha256: str


@dataclass
class Source:
    """Where the records of one input can be read: the file itself or its uncompressed copy.

    `size` and `sha256` are of the input; `stat`, its size and mtime in ns before it was read, is None where
    it cannot be read again (a pipe), and so is `ctime`, in ns.
    """

    given: str
    path: Path
    is_copy: bool
    stat: tuple[int, int] | None
    first_record: int
    ctime: int | None = None
    size: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return "standard input" if self.given == STDIN else self.given

    def open(self) -> BinaryIO:
        """The file, for reading.

        Raises:
            InputError: it is gone or no longer the file that was indexed.
        """
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read any more: {error.strerror}") from error
        if not self.is_copy and size_and_mtime(os.fstat(file.fileno())) != self.stat:
            file.close()
            raise self.changed()
        return file

    def changed(self) -> InputError:
        """The error for a file that is not what was indexed."""
        return InputError(f"{self.name}: the file was changed while it was in use; start again")

    def pieces(self, begins: Positions, ends: Positions) -> Iterator[tuple[bytes, Positions, Positions]]:
        """(text, begins and ends in it) of the ascending, disjoint ranges [begins, ends), a few MB at a time.

        Raises:
            InputError: the file is gone or was changed since the index was made.
        """
        apart = begins[1:] - ends[:-1] > _GAP_BYTES
        apart |= begins[1:] // _PIECE_BYTES != begins[:-1] // _PIECE_BYTES
        firsts = np.append(0, np.flatnonzero(apart) + 1)
        lasts = np.append(firsts[1:], len(begins))
        reads = zip(
            firsts.tolist(), lasts.tolist(), begins[firsts].tolist(), ends[lasts - 1].tolist(), strict=True
        )
        texts: list[bytes] = []
        shifts = np.empty(len(begins), dtype=np.int64)
        done, num_bytes = 0, 0
        with self.open() as file:
            for first, last, begin, end in reads:
                texts.append(os.pread(file.fileno(), end - begin, begin))
                if len(texts[-1]) < end - begin:
                    raise self.changed()
                shifts[first:last] = begin - num_bytes
                num_bytes += end - begin
                if num_bytes >= _PIECE_BYTES or last == len(begins):
                    shift = shifts[done:last]
                    yield b"".join(texts), begins[done:last] - shift, ends[done:last] - shift
                    texts, done, num_bytes = [], last, 0


class RecordReader:
    """The rows of an index and the texts they point to; records are numbered over all sources."""

    def __init__(self, records: Records | RowFile, sources: Sequence[Source], options: ReadOptions) -> None:
        self.records = records
        self.sources = sources
        self.options = options

    def token_ids(self, wanted: Positions) -> Iterator[npt.NDArray[np.uint8]]:
        """The residues of the records of these ascending numbers."""
        for source, rows in self._by_source(wanted):
            begins = rows["header"] + rows["header_bytes"]
            lengths = rows["length"].astype(np.int64)
            done = 0
            for text, text_begins, text_ends in source.pieces(begins, begins + rows["sequence_bytes"]):
                residues = token_ids_of(residue_codes(text, text_begins, text_ends, self.options.gaps))
                stops = np.cumsum(lengths[done : done + len(text_begins)])
                if len(residues) != stops[-1]:
                    raise source.changed()
                start = 0
                for stop in stops.tolist():
                    yield residues[start:stop]
                    start = stop
                done += len(text_begins)

    def residues(self, wanted: Positions) -> list[bytes]:
        """`token_ids` as bytes, which can be compared and hashed."""
        return [residues.tobytes() for residues in self.token_ids(wanted)]

    def names(self, wanted: Positions) -> list[bytes]:
        """The IDs, as the files have them, of the records of these ascending numbers."""
        names: list[bytes] = []
        for source, rows in self._by_source(wanted):
            begins = rows["header"]
            for text, text_begins, text_ends in source.pieces(begins, begins + rows["header_bytes"]):
                names += [
                    record_name(text[begin:end], self.options.full_header)
                    for begin, end in zip(text_begins.tolist(), text_ends.tolist(), strict=True)
                ]
        return names

    def place(self, record: int) -> tuple[int, int]:
        """Source number and byte position of the record's header."""
        source = bisect_right(self.sources, record, key=lambda source: source.first_record) - 1
        return source, int(self.records[record : record + 1]["header"][0])

    def _by_source(self, wanted: Positions) -> Iterator[tuple[Source, Records]]:
        limits = [source.first_record for source in self.sources[1:]] + [len(self.records)]
        for source, limit in zip(self.sources, limits, strict=True):
            part = wanted[np.searchsorted(wanted, source.first_record) : np.searchsorted(wanted, limit)]
            if len(part):
                first = int(part[0])
                yield source, np.asarray(self.records[first : int(part[-1]) + 1])[part - first]


def size_and_mtime(status: os.stat_result) -> tuple[int, int]:
    """Size in bytes and modification time in ns."""
    return status.st_size, status.st_mtime_ns


def line_numbers(path: Path, positions: Sequence[int]) -> list[int]:
    """The lines, counted from 1, in which the bytes at ascending `positions` lie."""
    lines: list[int] = []
    line, after_cr, num_read = 1, False, 0
    with path.open("rb", buffering=1 << 18) as file:
        for position in positions:
            while num_read < position and (text := file.read(min(position - num_read, 1 << 22))):
                num_read += len(text)
                line += text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")
                line -= after_cr and text.startswith(b"\n")
                after_cr = text.endswith(b"\r")
            lines.append(line)
    return lines


def lines_at(sources: Sequence[Source], places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Line number of each (source number, byte position), with one pass over each file."""
    by_source: defaultdict[int, set[int]] = defaultdict(set)
    for source, position in places:
        by_source[source].add(position)
    lines: dict[tuple[int, int], int] = {}
    for source, positions in by_source.items():
        ordered = sorted(positions)
        numbers = line_numbers(sources[source].path, ordered)
        lines.update({(source, position): line for position, line in zip(ordered, numbers, strict=True)})
    return lines
