"""FASTA files to a compact index: one pass that checks all, then random access to any range of records.

An index is a folder: `records.bin`, one row of 25 bytes for each record; `first_same.bin`, 8 bytes that name
the first record of the same sequence; and `index.json`, which is written last, carries the checksums of all,
and says what the index was made from, so that a later process can take it over. Sequences and headers stay
where they are: in the user's files or, for gzip, pipes and standard input, in an uncompressed copy in the
folder. Memory is bounded by the chunk size or the longest record, plus a note for each record left out or
fault to be listed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.duplicates import (
    ROW,
    Rows,
    confirm_firsts,
    hash_rows,
    hashes_of,
    records_with,
    sort_rows,
    write_firsts,
)
from esm_packed.runners.input.fasta import (
    Fault,
    InputError,
    Modified,
    ReadOptions,
    count_nucleotides,
    first_record,
    parse_block,
    preamble_fault,
    record_at,
    record_begin,
    shorten,
    text_fault,
    token_ids_of,
)
from esm_packed.runners.input.records import (
    RECORD,
    STDIN,
    InputFile,
    Problem,
    RecordReader,
    Records,
    RowFile,
    Source,
    line_numbers,
    lines_at,
    size_and_mtime,
)
from esm_packed.runners.system.files import open_regular, read_regular, sync, whole_or_nothing

__all__ = ["STDIN", "FastaIndex", "InputFile", "Problem", "build_index", "open_index"]

MAX_RECORD_BYTES = 1 << 26
"""Longest record that is read, as a record is held in memory whole; the longest proteins are about 46 kB."""
DNA_RECORDS = 100
DNA_FRACTION = 0.9
MOST_READ_OF_DNA = 1 << 26
"""Bytes of text after which an input that looks like DNA is not read on: there may be a hundred gigabytes."""
MOST_LISTED = 10
"""Faults that an error lists; of the others it says how many there are."""

_FORMAT_VERSION = 2
_CHECKSUM_BYTES = hashlib.sha256().digest_size * 2
_NO_INDEX = (OSError, ValueError, TypeError, KeyError)
"""What reading an index raises that is not there, not whole, or not of this version."""

_METADATA = "index.json"
_RECORDS = "records.bin"
_FIRST_SAME = "first_same.bin"
_ID_HASHES = "id_hashes.bin"
_SEQUENCE_HASHES = "sequence_hashes.bin"
_FIRST_IDS = "first_ids.bin"
_KEPT = "kept.bin"
_NEXT_COPIES = "next_copies.bin"
_FILES = (_RECORDS, _FIRST_SAME, _ID_HASHES, _SEQUENCE_HASHES, _FIRST_IDS, _KEPT, _NEXT_COPIES)

_BOM = b"\xef\xbb\xbf"
_COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_ROWS_AT_ONCE = 1 << 17
_IDS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class _LeftOut:
    """A `Problem` before its line number is known; a place is a source number and a byte position."""

    place: tuple[int, int]
    sequence_id: str
    reason: str
    same_as: tuple[int, int] | None = None
    hint: str = ""


class _UnreadableError(InputError):
    """The rest of an input cannot be read; other inputs can."""


class _Faults:
    """The faults that end a run, counted; the first ones are kept.

    Args:
        most: how many of each kind to keep; None keeps all.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.count = 0
        self._in_records: list[_LeftOut] = []
        self._repeated: list[_LeftOut] = []
        self._dna: list[_LeftOut] = []
        self._unreadable: list[tuple[int, str]] = []

    def add_in_record(self, entry: Callable[[], _LeftOut]) -> None:
        """Of one record; `entry` is asked for only if it is kept."""
        self.count += 1
        if self.most is None or len(self._in_records) < self.most:
            self._in_records.append(entry())

    def add_repeated(self, entries: Iterator[_LeftOut], count: int) -> None:
        """All records, `count` of them, of an ID that an earlier one has."""
        self.count += count
        self._repeated += islice(entries, self.most)

    def add_dna(self, entry: _LeftOut) -> None:
        self.count += 1
        self._dna.append(entry)

    def add_unreadable(self, source: int, message: str) -> None:
        """Source number and message of what ends the reading of an input."""
        self.count += 1
        self._unreadable.append((source, message))

    def error(self, sources: Sequence[Source], left_out: Sequence[_LeftOut] = ()) -> InputError:
        """The error that lists what was found, in input order, with line numbers.

        Args:
            sources: all inputs.
            left_out: records that are to be listed, too.
        """
        count = self.count + len(left_out)
        entries = [*self._in_records, *self._repeated, *self._dna, *left_out]
        entries = sorted(entries, key=lambda entry: entry.place)[: self.most]
        listed = [
            (entry.place, f"{problem.located()}: {problem.reason}", entry.hint)
            for entry, problem in zip(entries, _problems(sources, entries), strict=True)
        ]
        # what ends a file comes after all else in it, and is listed in any case
        ends = [((source, sys.maxsize), text, "") for source, text in self._unreadable[: self.most]]
        listed = sorted(listed + ends)
        lines = [" ".join(text.splitlines()) for _, text, _ in listed]
        hints = list(dict.fromkeys(hint for _, _, hint in listed if hint))
        if count == 1:
            return InputError(lines[0] + "".join(f" ({hint})" for hint in hints))
        if len(lines) < count:
            lines.append(f"and {count - len(lines):,} more; esm-packed info --all FILE lists all of a file")
        return InputError(f"{count:,} faults in the input:", [*lines, *hints])


class FastaIndex:
    """The records of one or more FASTA files in input order; made by `build_index`.

    Attributes:
        num_records: how many, records left out not counted.
        lengths: (num_records,) int32, residues after cleaning.
        first_same: (num_records,) int64, the first record of the same residues, which may be the record
            itself.
        total_residues: sum of `lengths`.
        num_identical: records whose residues an earlier one has.
        num_replaced: characters that became X, in duplicates left out too.
        num_duplicates: records that had the ID of an earlier one.
        mean_id_bytes: mean size of an ID as it was read, in bytes of UTF-8.
        problems: the records left out, in input order.
        options: the rules it was made by.
        inputs: path, size in bytes and sha256 of each input.
    """

    def __init__(
        self,
        reader: RecordReader,
        lengths: RowFile,
        first_same: RowFile,
        *,
        num_identical: int,
        num_replaced: int,
        num_duplicates: int,
        mean_id_bytes: float,
        problems: list[Problem],
    ) -> None:
        self._reader = reader
        self._records = reader.records
        self.num_records = len(self._records)
        self.lengths = lengths
        self.first_same = first_same
        self.total_residues = sum(
            int(lengths[start : start + _ROWS_AT_ONCE].sum(dtype=np.int64))
            for start in range(0, self.num_records, _ROWS_AT_ONCE)
        )
        self.num_identical = num_identical
        self.num_replaced = num_replaced
        self.num_duplicates = num_duplicates
        self.mean_id_bytes = mean_id_bytes
        self.problems = problems
        self.options = reader.options
        self.inputs = [InputFile(source.given, source.size, source.sha256) for source in reader.sources]

    def token_ids(self, start: int, stop: int, max_length: int = 0) -> list[npt.NDArray[np.uint8]]:
        """The residues of records [start, stop), read a few MB at a time.

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
        sequences = self._reader.token_ids(np.arange(start, stop))
        return [residues[: max_length or None] for residues in sequences]

    def sequence_ids(self, start: int, stop: int) -> list[str]:
        """The IDs of records [start, stop), `__2` and so on included.

        Raises:
            ValueError: no such range.
            InputError: a file is gone or was changed since the index was made.
        """
        self._check_range(start, stop)
        names = self._reader.names(np.arange(start, stop))
        copies = self._records[start:stop]["copy"].tolist()
        return [
            name.decode("utf-8") + (f"__{copy}" if copy else "")
            for name, copy in zip(names, copies, strict=True)
        ]

    def modified(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """(stop - start,) uint8, what was changed in the records [start, stop): `Modified` flags.

        Raises:
            ValueError: no such range.
        """
        self._check_range(start, stop)
        rows = self._records[start:stop]
        is_renamed = (rows["copy"] > 0).astype(np.uint8)
        modified: npt.NDArray[np.uint8] = rows["modified"] | is_renamed * np.uint8(Modified.RENAMED)
        return modified

    def dna_problem(self) -> Problem | None:
        """Why the first records look like nucleotides; None if they do not."""
        fault = _dna_fault(self._reader, self.num_records)
        return None if fault is None else _problems(self._reader.sources, [fault])[0]

    def close(self) -> None:
        """Close the files of the index; network file systems keep those that are open."""
        for rows in (self._records, self.lengths, self.first_same):
            if isinstance(rows, RowFile):
                rows.close()

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_records:
            raise ValueError(
                f"start, stop must be within 0 to {self.num_records} and ordered; got {start}, {stop}"
            )


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
    most_listed: int | None = MOST_LISTED,
    list_left_out: bool = False,
) -> FastaIndex:
    """Read all of `paths` once, check every record, and leave an index in `work_dir`.

    Args:
        paths: FASTA files, plain or gzip (told by content), or `-` for standard input.
        work_dir: made if missing; an index already in it is replaced.
        options: what to do about faults.
        progress: told how many more bytes of the inputs (as they are, compressed or not) have been read.
        chunk_size: bytes to read at a time.
        most_listed: faults that an error lists; None lists all.
        list_left_out: an error also lists the records that `options` left out.

    Raises:
        InputError: there are faults that `options` does not allow; the message names file, line and record
            of each that is listed, a line for each if there are several.
        OSError: `work_dir` cannot be written.
    """
    if not paths:
        raise InputError("no input files were given")
    _check_open(paths, most_listed)
    work_dir.mkdir(parents=True, exist_ok=True)
    _clear(work_dir)
    with (
        (work_dir / _RECORDS).open("wb") as records_file,
        (work_dir / _ID_HASHES).open("wb") as ids_file,
        (work_dir / _SEQUENCE_HASHES).open("wb") as sequences_file,
    ):
        builder = _Pass(options, records_file, ids_file, sequences_file, _Faults(most_listed))
        for number, path in enumerate(paths):
            try:
                builder.read_input(path, work_dir / _copy_name(number), progress, chunk_size)
            except _UnreadableError as error:
                builder.faults.add_unreadable(len(builder.sources) - 1, str(error))
        if builder.num_records:
            builder.check_not_dna()
    num_duplicates, mean_id_bytes = 0, 0.0
    if builder.num_records:
        mean_id_bytes = builder.num_id_bytes / builder.num_records
        num_duplicates = _settle_duplicates(builder, work_dir)
    left_out = builder.left_out if list_left_out else []
    if builder.faults.count or (left_out and not builder.num_records):
        raise builder.faults.error(builder.sources, left_out)
    if not builder.num_records:
        first = _problems(builder.sources, builder.left_out[:1])[0]
        raise InputError(
            f"no record is left, all {len(builder.left_out):,} were left out; the first is "
            f"{first.located()}: {first.reason}"
        )
    num_identical = _find_identical(builder, work_dir)
    problems = _problems(builder.sources, builder.left_out)
    copies = [_copy_name(number) for number, source in enumerate(builder.sources) if source.is_copy]
    for name in (_RECORDS, _FIRST_SAME, *copies):
        sync(work_dir / name)
    metadata = {
        "format_version": _FORMAT_VERSION,
        "options": asdict(options),
        "files": {name: _sha256(work_dir / name) for name in (_RECORDS, _FIRST_SAME, *copies)},
        "inputs": [
            {
                "given": source.given,
                "absolute": str(Path(source.given).absolute()),
                "copy": _copy_name(number) if source.is_copy else None,
                "stat": source.stat,
                "ctime": source.ctime,
                "first_record": source.first_record,
                "size": source.size,
                "sha256": source.sha256,
            }
            for number, source in enumerate(builder.sources)
        ],
        "num_identical": num_identical,
        "num_replaced": builder.num_replaced,
        "num_duplicates": num_duplicates,
        "mean_id_bytes": mean_id_bytes,
        "problems": [astuple(problem) for problem in problems],
    }
    text = json.dumps(metadata).encode("ascii")
    with whole_or_nothing(work_dir / _METADATA, work_dir) as temporary:
        temporary.write_bytes(text + hashlib.sha256(text).hexdigest().encode())
    return _restore(work_dir, metadata)


def open_index(paths: Sequence[str], work_dir: Path, options: ReadOptions) -> FastaIndex | None:
    """The index that `build_index` left in `work_dir`, if it is whole and was made from just this.

    The inputs must have the same paths, sizes and modification times, and the same content if they were
    touched in any way. Standard input passes for unchanged:
    only the caller can know whether there is anything new in it. A pipe never does.
    """
    try:
        metadata = _read_metadata(work_dir)
        if (
            metadata["options"] != asdict(options)
            or [entry["given"] for entry in metadata["inputs"]] != list(paths)
            or not all(map(_is_unchanged, metadata["inputs"]))
        ):
            return None
        return _restore(work_dir, metadata)
    except _NO_INDEX:
        return None


def reopen_index(work_dir: Path) -> FastaIndex:
    """The index in `work_dir`, whatever it was made from; it can be opened from any working directory.

    Raises:
        InputError: none can be read, or a file that sequences are read from is gone or has changed.
    """
    try:
        metadata = _read_metadata(work_dir)
        index = _restore(work_dir, metadata)
    except _NO_INDEX:
        raise InputError(f"{work_dir}: there is no whole index of the inputs") from None
    for entry in metadata["inputs"]:
        path = Path(entry["absolute"])
        if not entry["copy"] and (not path.exists() or list(size_and_mtime(path.stat())) != entry["stat"]):
            raise InputError(f"{path}: gone, changed since the run was planned, or not to be seen from here")
    return index


def _read_metadata(work_dir: Path) -> dict[str, Any]:
    """What `index.json` says, once it and all files of the index are known to be what was written.

    Raises:
        OSError, ValueError, TypeError, KeyError: an index is not there, of another version, or not whole.
    """
    content = read_regular(work_dir / _METADATA)
    text, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise ValueError("damaged")
    metadata: dict[str, Any] = json.loads(text)
    if metadata["format_version"] != _FORMAT_VERSION:
        raise ValueError("of another version")
    if any(_sha256(work_dir / name) != checksum for name, checksum in metadata["files"].items()):
        raise ValueError("damaged")
    return metadata


def _sha256_of_input(path: Path) -> str:
    """Checksum (hex) of a file that may be reached through links."""
    return _sha256(path.resolve())


def _sha256(path: Path) -> str:
    """Checksum (hex) of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_unchanged(entry: dict[str, Any]) -> bool:
    if entry["given"] == STDIN:
        return True
    path = Path(entry["given"]).absolute()
    status = path.stat()
    if list(size_and_mtime(status)) != entry["stat"] or str(path) != entry["absolute"]:
        return False
    # another file may have been given the same size and time; its ctime cannot be chosen
    return bool(status.st_ctime_ns == entry["ctime"] or _sha256_of_input(path) == entry["sha256"])


def _restore(work_dir: Path, metadata: dict[str, Any]) -> FastaIndex:
    sources = [
        Source(
            given=entry["given"],
            path=work_dir.absolute() / entry["copy"] if entry["copy"] else Path(entry["absolute"]),
            is_copy=bool(entry["copy"]),
            stat=tuple(entry["stat"]) if entry["stat"] else None,
            first_record=entry["first_record"],
            size=entry["size"],
            sha256=entry["sha256"],
        )
        for entry in metadata["inputs"]
    ]
    records = RowFile(work_dir / _RECORDS, RECORD)
    return FastaIndex(
        RecordReader(records, sources, ReadOptions(**metadata["options"])),
        RowFile(work_dir / _RECORDS, RECORD, "length"),
        RowFile(work_dir / _FIRST_SAME, np.dtype(np.int64)),
        num_identical=metadata["num_identical"],
        num_replaced=metadata["num_replaced"],
        num_duplicates=metadata["num_duplicates"],
        mean_id_bytes=metadata["mean_id_bytes"],
        problems=[Problem(*problem) for problem in metadata["problems"]],
    )


def _copy_name(number: int) -> str:
    return f"input-{number}.fasta"


def _clear(work_dir: Path) -> None:
    """Remove an earlier index, first what vouches for it; a process that has it mapped keeps its pages."""
    for name in (_METADATA, *_FILES):
        (work_dir / name).unlink(missing_ok=True)
    for pattern in (f"{_METADATA}.*", "input-*.fasta", "*.bin.spare"):
        for path in work_dir.glob(pattern):
            path.unlink()


class _Pass:
    """The state of the pass over all inputs."""

    def __init__(
        self,
        options: ReadOptions,
        records_file: BinaryIO,
        ids_file: BinaryIO,
        sequences_file: BinaryIO,
        faults: _Faults,
    ) -> None:
        self.options = options
        self.records_file = records_file
        self.ids_file = ids_file
        self.sequences_file = sequences_file
        self.faults = faults
        self.sources: list[Source] = []
        self.left_out: list[_LeftOut] = []
        self.num_records = 0
        self.num_replaced = 0
        self.num_id_bytes = 0
        self.is_dna_checked = options.force
        self.is_dna = False

    def read_input(
        self, path: str, copy: Path, progress: Callable[[int], None] | None, chunk_size: int
    ) -> None:
        """Read one input; `copy` is where it goes, uncompressed, if it cannot be read again as it is.

        Raises:
            _UnreadableError: it, or the rest of it, is no FASTA; records before that are in the index.
            InputError: it was changed meanwhile.
        """
        name = "standard input" if path == STDIN else path
        with ExitStack() as stack:
            file = sys.stdin.buffer if path == STDIN else stack.enter_context(_open_input(path))
            can_be_read_again = path != STDIN and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            status = size_and_mtime(os.fstat(file.fileno())) if can_be_read_again else None
            hashing = _HashingReader(file, progress)
            # gzip reads in small pieces, so that what is beneath it must be buffered.
            stream: BinaryIO = io.BufferedReader(hashing, max(chunk_size, io.DEFAULT_BUFFER_SIZE))
            head = stream.peek(8)  # type: ignore[attr-defined]
            is_gzip = head.startswith(b"\x1f\x8b")
            if is_gzip:
                stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
            if can_be_read_again and not is_gzip:
                copy_file = None
                source = Source(path, Path(path).absolute(), False, status, self.num_records)
            else:
                copy_file = stack.enter_context(copy.open("wb"))
                source = Source(path, copy.absolute(), True, status, self.num_records)
            if can_be_read_again:
                source.ctime = os.fstat(file.fileno()).st_ctime_ns
            self.sources.append(source)
            for magic, compression in _COMPRESSED.items():
                if head.startswith(magic):
                    raise _UnreadableError(
                        f"{name}: compressed with {compression}; only gzip is read, unpack it first"
                    )

            is_start = True
            for position, block in self._blocks(stream, chunk_size, copy_file):
                if is_start:
                    position, block = self._skip_preamble(position, block)
                if block:
                    is_start = False
                    self._add_block(position, block)
            if is_start:
                raise _UnreadableError(f"{name}: {'no records' if hashing.size else 'the file is empty'}")
            if status is not None and (
                status[0] != hashing.size or status != size_and_mtime(os.fstat(file.fileno()))
            ):
                raise InputError(f"{name}: the file was changed while it was being read; start again")
            source.size, source.sha256 = hashing.size, hashing.sha256.hexdigest()

    def _blocks(
        self, stream: BinaryIO, chunk_size: int, copy: BinaryIO | None
    ) -> Iterator[tuple[int, bytes]]:
        """Cut the text in front of records: (position in the text, block of whole records)."""
        position, pending, num_read = 0, b"", 0
        while True:
            if self.is_dna and num_read >= MOST_READ_OF_DNA:
                name = self.sources[-1].name
                raise _UnreadableError(f"{name}: not read beyond {num_read >> 20} MiB, as it looks like DNA")
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
            if readable := record_begin(block, unreadable[0]):
                self._add_block(position, block[:readable])
            raise self._error(position, block, *unreadable)
        parsed = parse_block(block, self.options)
        keep = np.ones(len(parsed.lengths), dtype=np.bool_)
        keep[[fault.record for fault in parsed.faults]] = False
        num_accepted = int(np.count_nonzero(keep))

        def entry(fault: Fault) -> _LeftOut:
            place = (len(self.sources) - 1, position + fault.position)
            return _LeftOut(place, parsed.name(fault.record), fault.reason, hint=fault.hint)

        if self.options.invalid == "skip":
            self.left_out += map(entry, parsed.faults)
        else:
            for fault in parsed.faults:
                self.faults.add_in_record(partial(entry, fault))

        rows = np.zeros(len(keep), dtype=RECORD)
        rows["header"] = position + parsed.header_begins
        rows["header_bytes"] = parsed.header_ends - parsed.header_begins
        rows["sequence_bytes"] = parsed.sequence_ends - parsed.header_ends
        rows["length"] = parsed.lengths
        rows["modified"] = parsed.modified
        residues = token_ids_of(parsed.codes).tobytes()
        ends = np.cumsum(parsed.lengths)
        ids = hashes_of(block, parsed.name_begins, parsed.name_ends)
        sequences = hashes_of(residues, ends - parsed.lengths, ends)
        self.records_file.write(rows[keep].tobytes())
        self.ids_file.write(hash_rows(ids[keep], self.num_records).tobytes())
        self.sequences_file.write(hash_rows(sequences[keep], self.num_records).tobytes())
        self.num_records += num_accepted
        self.num_replaced += parsed.num_replaced
        self.num_id_bytes += int((parsed.name_ends - parsed.name_begins)[keep].sum())

        if self.num_records >= DNA_RECORDS:
            self.check_not_dna()

    def check_not_dna(self) -> None:
        """Add a fault if the first records look like nucleotides; for when enough, or all, are known."""
        if self.is_dna_checked:
            return
        self.is_dna_checked = True
        self.records_file.flush()
        records = np.memmap(self.records_file.name, dtype=RECORD, mode="r")
        fault = _dna_fault(RecordReader(records, self.sources, self.options), len(records))
        if fault is not None:
            self.is_dna = True
            self.faults.add_dna(fault)

    def _error(
        self, block_position: int, block: bytes, fault: int, reason: str, hint: str = ""
    ) -> _UnreadableError:
        """The error for byte `fault` of the block that begins at `block_position` of the newest input."""
        line = line_numbers(self.sources[-1].path, [block_position + fault])[0]
        name = record_at(block, fault, self.options.full_header)
        record = "" if name is None else f", record {shorten(name)}"
        return _UnreadableError(
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


def _check_open(paths: Sequence[str], most_listed: int | None) -> None:
    """Fail before the first file is read, not hours later at the last; a pipe can be opened only once.

    Raises:
        InputError: files that cannot be opened.
    """
    faults = _Faults(most_listed)
    for number, path in enumerate(paths):
        try:
            if path != STDIN and not _is_fifo(path):
                _open_input(path).close()
        except InputError as error:
            faults.add_unreadable(number, str(error))
    if faults.count:
        raise faults.error([])


def _is_fifo(path: str) -> bool:
    try:
        return Path(path).is_fifo()
    except OSError:
        return False


def _problems(sources: Sequence[Source], left_out: Sequence[_LeftOut]) -> list[Problem]:
    """`left_out` in input order, with line numbers."""
    places = [entry.place for entry in left_out] + [entry.same_as for entry in left_out if entry.same_as]
    lines = lines_at(sources, places)
    problems = []
    for entry in sorted(left_out, key=lambda entry: entry.place):
        reason = entry.reason
        if entry.same_as is not None:
            reason += f" {sources[entry.same_as[0]].name}, line {lines[entry.same_as]}"
        problems.append(Problem(entry.sequence_id, sources[entry.place[0]].name, lines[entry.place], reason))
    return problems


def _dna_fault(reader: RecordReader, num_records: int) -> _LeftOut | None:
    """Why the first records look like nucleotides; None if they do not."""
    tested = np.arange(min(num_records, DNA_RECORDS))
    num_nucleotides = num_residues = 0
    for residues in reader.token_ids(tested):
        num_nucleotides += count_nucleotides(residues)
        num_residues += len(residues)
    if num_nucleotides <= DNA_FRACTION * num_residues:
        return None
    share = 100 * num_nucleotides / num_residues
    reason = (
        f"this looks like DNA or RNA: {share:.0f}% of the residues in the first records (at most "
        f"{DNA_RECORDS}) are A, C, G, T, U or N"
    )
    name = reader.names(tested[:1])[0].decode("utf-8")
    return _LeftOut(reader.place(0), name, reason, hint="--force goes on")


def _settle_duplicates(builder: _Pass, work_dir: Path) -> int:
    """Do as `options.duplicates` says; the number of records that had the ID of an earlier one."""
    mapped = np.memmap(work_dir / _RECORDS, dtype=RECORD, mode="r+")
    records = np.asarray(mapped)  # single elements of a memmap itself are slow to reach
    reader = RecordReader(records, builder.sources, builder.options)
    sort_rows(work_dir / _ID_HASHES)
    rows = np.asarray(np.memmap(work_dir / _ID_HASHES, dtype=ROW, mode="r"))
    firsts = write_firsts(rows, work_dir / _FIRST_IDS)
    num_duplicates = confirm_firsts(firsts, reader.names)
    if num_duplicates:
        if builder.options.duplicates == "rename":
            _rename(reader, records, rows, firsts, work_dir)
        elif builder.options.duplicates == "error":
            repeated = (entry for _, entry in _repeated(reader, firsts))
            builder.faults.add_repeated(repeated, num_duplicates)
        else:
            keep = _keep_first(builder, reader, firsts)
            _drop_rows(work_dir / _RECORDS, records, keep)
            hashes = np.memmap(work_dir / _SEQUENCE_HASHES, dtype=ROW, mode="r")
            _drop_rows(work_dir / _SEQUENCE_HASHES, hashes, keep)
        mapped.flush()
    for name in (_ID_HASHES, _FIRST_IDS):
        (work_dir / name).unlink()
    return num_duplicates


def _repeats(reader: RecordReader, firsts: npt.NDArray[np.int64]) -> Iterator[list[tuple[int, int, bytes]]]:
    """Batches of (record, first record of its ID, ID) of all whose ID an earlier one has, in order."""
    for start in range(0, len(firsts), _IDS_AT_ONCE):
        part = np.array(firsts[start : start + _IDS_AT_ONCE])
        records = start + np.flatnonzero(part != np.arange(start, start + len(part)))
        if len(records):
            names = reader.names(records)
            yield list(zip(records.tolist(), part[records - start].tolist(), names, strict=True))


def _repeated(reader: RecordReader, firsts: npt.NDArray[np.int64]) -> Iterator[tuple[int, _LeftOut]]:
    """Each record whose ID an earlier one has, and why it is left out or refused."""
    hint = "--duplicates first keeps the first record of an ID, --duplicates rename adds __2, __3 ..."
    for record, first, name in chain.from_iterable(_repeats(reader, firsts)):
        yield (
            record,
            _LeftOut(
                reader.place(record), name.decode("utf-8"), "the same ID as in", reader.place(first), hint
            ),
        )


def _keep_first(builder: _Pass, reader: RecordReader, firsts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which records stay when only the first of each ID does."""
    keep = np.ones(len(firsts), dtype=np.bool_)
    for record, entry in _repeated(reader, firsts):
        keep[record] = False
        builder.left_out.append(entry)
    for source in builder.sources:
        source.first_record = int(np.count_nonzero(keep[: source.first_record]))
    builder.num_records = int(np.count_nonzero(keep))
    return keep


def _drop_rows(path: Path, rows: Records | Rows, keep: npt.NDArray[np.bool_]) -> None:
    """Write anew the file of `rows` without those that are not kept; hashes get their new record numbers."""
    num_kept = 0
    kept_path = path.with_name(_KEPT)
    with kept_path.open("wb") as file:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            kept = rows[start : start + _ROWS_AT_ONCE][keep[start : start + _ROWS_AT_ONCE]]
            if rows.dtype == ROW:
                kept["record"] = np.arange(num_kept, num_kept + len(kept))
            file.write(kept.tobytes())
            num_kept += len(kept)
    kept_path.replace(path)


def _rename(
    reader: RecordReader, records: Records, rows: Rows, firsts: npt.NDArray[np.int64], work_dir: Path
) -> None:
    """Number the records of an ID from 2 on, past the IDs that the files already have; `rows` are sorted."""

    def is_taken(name: bytes, hash_halves: Sequence[int]) -> bool:
        same_hash = records_with(rows, *hash_halves)
        return len(same_hash) > 0 and name in reader.names(same_hash)

    path = work_dir / _NEXT_COPIES
    next_copies = np.asarray(np.memmap(path, dtype=np.int32, mode="w+", shape=firsts.shape))
    for batch in _repeats(reader, firsts):
        # What the names become if none is taken is hashed at once: one by one takes ten times as long.
        expected: list[bytes] = []
        in_batch: Counter[int] = Counter()
        for _, first, name in batch:
            expected.append(b"%s__%d" % (name, max(2, next_copies[first]) + in_batch[first]))
            in_batch[first] += 1
        hashes = _hashes_of_names(expected)
        for (record, first, name), new_name, halves in zip(batch, expected, hashes, strict=True):
            copy = max(2, int(next_copies[first]))
            while True:
                wanted = b"%s__%d" % (name, copy)
                if not is_taken(wanted, halves if wanted == new_name else _hashes_of_names([wanted])[0]):
                    break
                copy += 1
            records["copy"][record] = copy
            next_copies[first] = copy + 1
    path.unlink()


def _hashes_of_names(names: list[bytes]) -> list[list[int]]:
    ends = np.cumsum([len(name) for name in names])
    hashes: list[list[int]] = hashes_of(b"".join(names), np.append(0, ends[:-1]), ends).tolist()
    return hashes


def _find_identical(builder: _Pass, work_dir: Path) -> int:
    """Write the first record of each sequence; the number of records that are copies of an earlier one."""
    records = np.memmap(work_dir / _RECORDS, dtype=RECORD, mode="r")
    sort_rows(work_dir / _SEQUENCE_HASHES)
    rows = np.asarray(np.memmap(work_dir / _SEQUENCE_HASHES, dtype=ROW, mode="r"))
    firsts = write_firsts(rows, work_dir / _FIRST_SAME)
    reader = RecordReader(records, builder.sources, builder.options)
    num_identical = confirm_firsts(firsts, reader.residues, records["length"])
    (work_dir / _SEQUENCE_HASHES).unlink()
    return num_identical
