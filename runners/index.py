"""FASTA files to a compact index: one pass that checks all, then random access to any range of records.

The index is one row of 24 bytes for each record in `work_dir/records.bin`, memory-mapped; sequences and
headers stay where they are: in the user's files or, for gzip, pipes and standard input, in an uncompressed
copy in `work_dir`. Memory is bounded by the chunk size or the longest record, plus 16 bytes for each record
while IDs are compared (more if there are duplicates), plus a note for each record left out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.runners.fasta import (
    InputError,
    ReadOptions,
    first_record,
    parse_block,
    preamble_fault,
    record_at,
    record_name,
    residue_codes,
    shorten,
    text_fault,
    token_ids_of,
)

STDIN = "-"
MAX_RECORD_BYTES = 1 << 26
"""Longest record that is read, as a record is held in memory whole; the longest proteins are about 46 kB."""
DNA_RECORDS = 100
DNA_FRACTION = 0.9

_BOM = b"\xef\xbb\xbf"
_COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_DUPLICATES_BATCH = 1 << 16

# Bytes from the start of the readable file; the sequence begins where the header ends. `copy` is 0, or the
# number in the `__2` that tells this record from an earlier one of the same ID.
_RECORD = np.dtype(
    [
        ("header", "<i8"),
        ("header_bytes", "<i4"),
        ("sequence_bytes", "<i4"),
        ("length", "<i4"),
        ("copy", "<i4"),
    ]
)
_Records = npt.NDArray[Any]


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
class _Source:
    """Where the records of one input can be read: the file itself or its uncompressed copy."""

    name: str
    path: Path
    first_record: int
    unchanged: tuple[int, int] | None = None  # size and mtime in ns of the user's own file

    def open(self) -> BinaryIO:
        """The file, for reading.

        Raises:
            InputError: it is gone or no longer the file that was indexed.
        """
        try:
            file = self.path.open("rb", buffering=1 << 18)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read any more: {error.strerror}") from error
        if self.unchanged is not None and _size_and_mtime(file) != self.unchanged:
            file.close()
            raise InputError(f"{self.name}: the file was changed while it was in use; start again")
        return file


@dataclass(frozen=True)
class _LeftOut:
    """A `Problem` before its line number is known; a place is a source number and a byte position."""

    place: tuple[int, int]
    sequence_id: str
    reason: str
    same_as: tuple[int, int] | None = None


class FastaIndex:
    """The records of one or more FASTA files in input order; made by `build_index`.

    Attributes:
        num_records: how many, records left out not counted.
        lengths: (num_records,) int32, residues after cleaning; memory-mapped, read-only.
        total_residues: sum of `lengths`.
        num_replaced: characters that became X, in duplicates left out too.
        num_duplicates: records that had the ID of an earlier one.
        problems: the records left out, in input order.
        inputs: path, size in bytes and sha256 of each input.
    """

    def __init__(
        self,
        records: _Records,
        sources: list[_Source],
        options: ReadOptions,
        inputs: list[InputFile],
        *,
        num_replaced: int = 0,
        num_duplicates: int = 0,
        problems: list[Problem] | None = None,
    ) -> None:
        self._records = records
        self._sources = sources
        self._options = options
        self.num_records = len(records)
        self.lengths: npt.NDArray[np.int32] = records["length"]
        self.total_residues = int(self.lengths.sum(dtype=np.int64))
        self.num_replaced = num_replaced
        self.num_duplicates = num_duplicates
        self.problems: list[Problem] = problems or []
        self.inputs = inputs

    def token_ids(self, start: int, stop: int, max_length: int = 0) -> list[npt.NDArray[np.uint8]]:
        """The residues of records [start, stop), read with one read for each file they lie in.

        Args:
            start, stop: record numbers, 0 <= start <= stop <= num_records.
            max_length: cut each sequence to its first `max_length` residues; 0 keeps them whole.

        Returns:
            For each record (num_residues,) uint8 ids as in `alphabet.TOKENS`, without BOS and EOS.

        Raises:
            ValueError: no such range, or `max_length` is negative.
            InputError: a file is gone or was changed since the index was made.
        """
        self._check_range(start, stop)
        if max_length < 0:
            raise ValueError(f"max_length must be 0 (no limit) or positive; got {max_length}")
        sequences: list[npt.NDArray[np.uint8]] = []
        for source, begin, end in self._by_source(start, stop):
            records = self._records[begin:end]
            begins = records["header"] + records["header_bytes"]
            ends = begins + records["sequence_bytes"]
            base, num_bytes = int(begins[0]), int(ends[-1] - begins[0])
            with source.open() as file:
                file.seek(base)
                text = file.read(num_bytes)
            lengths = records["length"].astype(np.int64)
            # The input may be longer than what is read here; a shorter text shows as too few residues.
            residues = token_ids_of(
                residue_codes(text.ljust(num_bytes), begins - base, ends - base, self._options.gaps)
            )
            if len(residues) != lengths.sum():
                raise InputError(f"{source.name}: the file was changed while it was in use; start again")
            stops = np.cumsum(lengths)
            starts = stops - lengths
            if max_length:
                stops = np.minimum(stops, starts + max_length)
            sequences += [residues[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
        return sequences

    def sequence_ids(self, start: int, stop: int) -> list[str]:
        """The IDs of records [start, stop), `__2` and so on included.

        Raises:
            ValueError: no such range.
            InputError: a file is gone or was changed since the index was made.
        """
        self._check_range(start, stop)
        ids = self._ids_in_file(np.arange(start, stop))
        copies = self._records["copy"][start:stop].tolist()
        return [
            name.decode("utf-8") + (f"__{copy}" if copy else "")
            for name, copy in zip(ids, copies, strict=True)
        ]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_records:
            raise ValueError(
                f"start, stop must be within 0 to {self.num_records} and ordered; got {start}, {stop}"
            )

    def _by_source(self, start: int, stop: int) -> Iterator[tuple[_Source, int, int]]:
        limits = [source.first_record for source in self._sources[1:]] + [self.num_records]
        for source, limit in zip(self._sources, limits, strict=True):
            begin, end = max(start, source.first_record), min(stop, limit)
            if begin < end:
                yield source, begin, end

    def _ids_in_file(self, indices: npt.NDArray[np.int64]) -> list[bytes]:
        """The IDs as the files have them, of ascending record numbers."""
        names: list[bytes] = []
        if not len(indices):
            return names
        for source, begin, end in self._by_source(int(indices[0]), int(indices[-1]) + 1):
            wanted = indices[np.searchsorted(indices, begin) : np.searchsorted(indices, end)]
            if not len(wanted):
                continue
            rows = self._records[wanted]
            places = zip(rows["header"].tolist(), rows["header_bytes"].tolist(), strict=True)
            with source.open() as file:
                for position, num_bytes in places:
                    file.seek(position)
                    names.append(record_name(file.read(num_bytes), self._options.full_header))
        return names

    def _places(self, records: list[int]) -> list[tuple[int, int]]:
        """Source number and byte position of each record's header."""
        firsts = [source.first_record for source in self._sources]
        sources = np.searchsorted(firsts, records, side="right") - 1
        return list(zip(sources.tolist(), self._records["header"][records].tolist(), strict=True))


class _HashingReader(io.RawIOBase):
    """Reads a binary stream once, keeping its size and SHA-256; a read is short only at the end."""

    def __init__(self, stream: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self._stream = stream
        self._progress = progress
        self.size = 0
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self.sha256.update(memoryview(buffer)[:num_bytes])
        self.size += num_bytes
        if self._progress is not None and num_bytes:
            self._progress(num_bytes)
        return int(num_bytes)


def build_index(
    paths: Sequence[str],
    work_dir: Path,
    options: ReadOptions,
    *,
    progress: Callable[[int], None] | None = None,
    chunk_size: int = 1 << 22,
) -> FastaIndex:
    """Read all of `paths` once, check every record, and leave an index in `work_dir`.

    Args:
        paths: FASTA files, plain or gzip (told by content), or `-` for standard input.
        work_dir: made if missing; an index already in it is replaced.
        options: what to do about faults.
        progress: told how many more bytes of the inputs (as they are, compressed or not) have been read.
        chunk_size: bytes to read at a time.

    Raises:
        InputError: the first fault that `options` does not allow; the message names file, line and record.
        OSError: `work_dir` cannot be written.
    """
    if not paths:
        raise InputError("no input files were given")
    for path in paths:
        _check_opens(path)
    work_dir.mkdir(parents=True, exist_ok=True)
    with (
        (work_dir / "records.bin").open("wb") as records_file,
        (work_dir / "id_hashes.bin").open("wb") as hashes_file,
    ):
        builder = _Pass(options, records_file, hashes_file)
        for number, path in enumerate(paths):
            builder.read_input(path, work_dir / f"input-{number}.fasta", progress, chunk_size)
        builder.check_not_dna()
    if not builder.num_records:
        first = _problems(builder.sources, builder.left_out[:1])[0]
        raise InputError(
            f"no record is left, all {len(builder.left_out):,} were left out; the first is "
            f"{first.located()}: {first.reason}"
        )
    num_duplicates = _settle_duplicates(builder, work_dir)
    return FastaIndex(
        np.memmap(work_dir / "records.bin", dtype=_RECORD, mode="r"),
        builder.sources,
        options,
        builder.inputs,
        num_replaced=builder.num_replaced,
        num_duplicates=num_duplicates,
        problems=_problems(builder.sources, builder.left_out),
    )


class _Pass:
    """The state of the pass over all inputs."""

    def __init__(self, options: ReadOptions, records_file: BinaryIO, hashes_file: BinaryIO) -> None:
        self.options = options
        self.records_file = records_file
        self.hashes_file = hashes_file
        self.sources: list[_Source] = []
        self.inputs: list[InputFile] = []
        self.left_out: list[_LeftOut] = []
        self.num_records = 0
        self.num_replaced = 0
        self.dna_checked = options.force
        self.first_accepted: _LeftOut | None = None
        self.num_nucleotides = 0
        self.num_tested_residues = 0

    def read_input(
        self, path: str, copy: Path, progress: Callable[[int], None] | None, chunk_size: int
    ) -> None:
        """Read one input; `copy` is where it goes, uncompressed, if it cannot be read again as it is."""
        name = "standard input" if path == STDIN else path
        with ExitStack() as stack:
            file = sys.stdin.buffer if path == STDIN else stack.enter_context(_open_input(path))
            can_be_read_again = path != STDIN and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            unchanged = _size_and_mtime(file) if can_be_read_again else None  # as it is before the first read
            hashing = _HashingReader(file, progress)
            # gzip reads in small pieces, so that what is beneath it must be buffered.
            stream: BinaryIO = io.BufferedReader(hashing, max(chunk_size, io.DEFAULT_BUFFER_SIZE))
            head = stream.peek(8)  # type: ignore[attr-defined]
            for magic, compression in _COMPRESSED.items():
                if head.startswith(magic):
                    raise InputError(
                        f"{name}: compressed with {compression}; only gzip is read, unpack it first"
                    )
            is_gzip = head.startswith(b"\x1f\x8b")
            if is_gzip:
                stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
            if can_be_read_again and not is_gzip:
                copy.unlink(missing_ok=True)
                copy_file = None
                source = _Source(name, Path(path).absolute(), self.num_records, unchanged)
            else:
                copy_file = stack.enter_context(copy.open("wb"))
                source = _Source(name, copy.absolute(), self.num_records)
            self.sources.append(source)

            is_start = True
            for position, block in self._blocks(stream, chunk_size, copy_file):
                if is_start:
                    position, block = self._skip_preamble(position, block)
                if block:
                    is_start = False
                    self._add_block(position, block)
            if is_start:
                raise InputError(f"{name}: {'no records' if hashing.size else 'the file is empty'}")
            if unchanged is not None and (unchanged[0] != hashing.size or unchanged != _size_and_mtime(file)):
                raise InputError(f"{name}: the file was changed while it was being read; start again")
            self.inputs.append(InputFile(path, hashing.size, hashing.sha256.hexdigest()))

    def _blocks(
        self, stream: BinaryIO, chunk_size: int, copy: BinaryIO | None
    ) -> Iterator[tuple[int, bytes]]:
        """Cut the text in front of records: (position in the text, block of whole records)."""
        position, pending, num_read = 0, b"", 0
        while True:
            try:
                chunk = stream.read(chunk_size)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                kind = "truncated" if isinstance(error, EOFError) else "corrupt"
                hint = "copy or download the file again"
                raise self._error(
                    num_read, pending, len(pending), f"the gzip data are {kind} soon after this", hint
                ) from error
            if not chunk:
                break
            if copy is not None:
                copy.write(chunk)
                copy.flush()  # so that the lines in front of an error can be counted
            num_read += len(chunk)
            searched = max(len(pending) - 1, 0)
            pending += chunk
            cut = pending.rfind(b"\n>", searched) + 1
            if b"\r" in chunk or pending[searched : searched + 1] == b"\r":
                cut = max(cut, pending.rfind(b"\r>", searched) + 1)
            if cut:
                yield position, pending[:cut]
                position, pending = position + cut, pending[cut:]
            elif len(pending) > MAX_RECORD_BYTES:
                reason = f"a record is longer than {MAX_RECORD_BYTES >> 20} MiB: these are no proteins"
                if not pending.startswith(b">"):
                    reason = (
                        f"not FASTA: no '>' at the start of a line in the first {MAX_RECORD_BYTES >> 20} MiB"
                    )
                raise self._error(position, pending, 0, reason)
        if pending:
            yield position, pending

    def _skip_preamble(self, position: int, block: bytes) -> tuple[int, bytes]:
        if position == 0 and block.startswith(_BOM):
            position, block = len(_BOM), block[len(_BOM) :]
        begin = first_record(block)
        fault = text_fault(block[:begin]) or preamble_fault(block[:begin])
        if fault is not None:
            raise self._error(position, block, *fault)
        return position + begin, block[begin:]

    def _add_block(self, position: int, block: bytes) -> None:
        """Check the records of a block and append them to the index."""
        unreadable = text_fault(block)
        if unreadable is not None:
            raise self._error(position, block, *unreadable)
        parsed = parse_block(block, self.options)
        keep = np.ones(len(parsed.names), dtype=np.bool_)
        for fault in parsed.faults:
            if self.options.invalid != "skip":
                raise self._error(position, block, fault.position, fault.reason, fault.hint)
            keep[fault.record] = False
            name = parsed.names[fault.record].decode("utf-8")
            self.left_out.append(
                _LeftOut((len(self.sources) - 1, position + fault.position), name, fault.reason)
            )

        accepted = np.flatnonzero(keep)
        if not self.dna_checked:
            if self.first_accepted is None and len(accepted):
                first = int(accepted[0])
                place = (len(self.sources) - 1, position + int(parsed.header_begins[first]))
                self.first_accepted = _LeftOut(place, parsed.names[first].decode("utf-8"), "")
            for record in accepted[: DNA_RECORDS - self.num_records].tolist():
                self.num_nucleotides += parsed.count_nucleotides(record)
                self.num_tested_residues += int(parsed.lengths[record])
            if self.num_records + len(accepted) >= DNA_RECORDS:
                self.check_not_dna()

        rows = np.zeros(len(keep), dtype=_RECORD)
        rows["header"] = position + parsed.header_begins
        rows["header_bytes"] = parsed.header_ends - parsed.header_begins
        rows["sequence_bytes"] = parsed.sequence_ends - parsed.header_ends
        rows["length"] = parsed.lengths
        # Python's own hash is fast and only picks candidates: the IDs themselves are compared afterwards.
        hashes = np.fromiter(map(hash, parsed.names), dtype=np.int64, count=len(keep))
        self.records_file.write(rows[keep].tobytes())
        self.hashes_file.write(hashes[keep].tobytes())
        self.num_records += len(accepted)
        self.num_replaced += parsed.num_replaced

    def check_not_dna(self) -> None:
        """Raise InputError if the first records look like nucleotides; for when enough, or all, are known."""
        if self.dna_checked:
            return
        self.dna_checked = True
        if self.num_nucleotides > DNA_FRACTION * self.num_tested_residues:
            share = 100 * self.num_nucleotides / self.num_tested_residues
            assert self.first_accepted is not None
            first = _problems(self.sources, [self.first_accepted])[0]
            raise InputError(
                f"{first.located()}: this looks like DNA or RNA: {share:.0f}% of the residues in the first "
                f"records (at most {DNA_RECORDS}) are A, C, G, T, U or N (--force goes on)"
            )

    def _error(
        self, block_position: int, block: bytes, fault: int, reason: str, hint: str = ""
    ) -> InputError:
        """The error for byte `fault` of the block that begins at `block_position` of the newest input."""
        line = _line_numbers(self.sources[-1].path, [block_position + fault])[0]
        name = record_at(block, fault, self.options.full_header)
        record = "" if name is None else f", record {shorten(name)}"
        return InputError(
            f"{self.sources[-1].name}, line {line}{record}: {reason}" + (f" ({hint})" if hint else "")
        )


def _open_input(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: this is a directory; name the FASTA files in it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error


def _check_opens(path: str) -> None:
    """Fail before the first file is read, not hours later at the last; a pipe can be opened only once."""
    try:
        only_once = path == STDIN or Path(path).is_fifo()
    except OSError:
        only_once = False
    if not only_once:
        _open_input(path).close()


def _size_and_mtime(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _line_numbers(path: Path, positions: Sequence[int]) -> list[int]:
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


def _lines_at(sources: list[_Source], places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Line number of each (source number, byte position), with one pass over each file."""
    by_source: defaultdict[int, set[int]] = defaultdict(set)
    for source, position in places:
        by_source[source].add(position)
    lines: dict[tuple[int, int], int] = {}
    for source, positions in by_source.items():
        ordered = sorted(positions)
        numbers = _line_numbers(sources[source].path, ordered)
        lines.update({(source, position): line for position, line in zip(ordered, numbers, strict=True)})
    return lines


def _problems(sources: list[_Source], left_out: list[_LeftOut]) -> list[Problem]:
    """`left_out` in input order, with line numbers."""
    places = [entry.place for entry in left_out] + [entry.same_as for entry in left_out if entry.same_as]
    lines = _lines_at(sources, places)
    problems = []
    for entry in sorted(left_out, key=lambda entry: entry.place):
        reason = entry.reason
        if entry.same_as is not None:
            reason += f" {sources[entry.same_as[0]].name}, line {lines[entry.same_as]}"
        problems.append(Problem(entry.sequence_id, sources[entry.place[0]].name, lines[entry.place], reason))
    return problems


def _settle_duplicates(builder: _Pass, work_dir: Path) -> int:
    """Do as `options.duplicates` says; the number of records that had the ID of an earlier one."""
    hashes_path, records_path = work_dir / "id_hashes.bin", work_dir / "records.bin"
    hashes = np.fromfile(hashes_path, dtype=np.int64)
    hashes_path.unlink()
    in_order = np.sort(hashes)
    if not (in_order[1:] == in_order[:-1]).any():
        return 0

    order = np.argsort(hashes, kind="stable")
    mapped = np.memmap(records_path, dtype=_RECORD, mode="r+")
    records = np.asarray(mapped)  # single elements of a memmap itself are slow to reach
    index = FastaIndex(records, builder.sources, builder.options, builder.inputs)
    rule = builder.options.duplicates
    num_duplicates = 0
    keep = np.ones(len(records), dtype=np.bool_)

    def is_taken(name: bytes) -> bool:
        first, last = (int(np.searchsorted(in_order, hash(name), side=side)) for side in ("left", "right"))
        return name in index._ids_in_file(order[first:last])

    for name, members in _same_ids(index, order, in_order):
        num_duplicates += len(members) - 1
        copy = 2
        places = index._places(members)
        for later, place in zip(members[1:], places[1:], strict=True):
            repeated = _LeftOut(place, name.decode("utf-8"), "the same ID as in", places[0])
            if rule == "error":
                problem = _problems(builder.sources, [repeated])[0]
                raise InputError(
                    f"{problem.located()}: {problem.reason} (--duplicates first keeps the first record of an "
                    f"ID, --duplicates rename adds __2, __3 ...)"
                )
            if rule == "first":
                keep[later] = False
                builder.left_out.append(repeated)
            else:
                while is_taken(b"%s__%d" % (name, copy)):
                    copy += 1
                records["copy"][later] = copy
                copy += 1
    mapped.flush()
    if not keep.all():
        for source in builder.sources:
            source.first_record = int(np.count_nonzero(keep[: source.first_record]))
        kept_path = work_dir / "records.kept.bin"
        with kept_path.open("wb") as file:
            for start in range(0, len(records), 1 << 20):
                file.write(records[start : start + (1 << 20)][keep[start : start + (1 << 20)]].tobytes())
        kept_path.replace(records_path)
    return num_duplicates


def _same_ids(
    index: FastaIndex, order: npt.NDArray[np.int64], in_order: npt.NDArray[np.int64]
) -> Iterator[tuple[bytes, list[int]]]:
    """Each ID that several records have, with their ascending numbers, by where it is first repeated.

    `in_order` are the hashes of all IDs, sorted; `order` are the record numbers in that order (stable).
    """
    same = np.concatenate([[False], in_order[1:] == in_order[:-1], [False]])
    begins = np.flatnonzero(~same[:-1] & same[1:])
    ends = np.flatnonzero(same[:-1] & ~same[1:]) + 1
    by_repeat = np.argsort(order[begins + 1])
    for batch in np.split(by_repeat, range(_DUPLICATES_BATCH, len(by_repeat), _DUPLICATES_BATCH)):
        runs = [order[begins[run] : ends[run]] for run in batch]
        wanted = np.sort(np.concatenate(runs))
        names = dict(zip(wanted.tolist(), index._ids_in_file(wanted), strict=True))
        for run in runs:
            members: defaultdict[bytes, list[int]] = defaultdict(list)
            for record in run.tolist():
                members[names[record]].append(record)
            yield from ((name, numbers) for name, numbers in members.items() if len(numbers) > 1)
