"""A single pass over the inputs that checks every record and writes what the index needs.

Memory is bounded by the chunk size or the longest record, plus an entry for each record left out and each
fault to be listed.
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.blocks import Checksums
from esm_packed.runners.input.duplicates import hash_rows, hashes_of
from esm_packed.runners.input.fasta import (
    InputError,
    ParsedBlock,
    Positions,
    ReadOptions,
    count_lines,
    count_nucleotides,
    first_record,
    parse_block,
    preamble_fault,
    record_at,
    record_begin,
    shorten,
    text_fault,
)
from esm_packed.runners.input.index import (
    NAMES,
    RECORD,
    RECORDS,
    STDIN,
    TOKENS,
    InputFile,
    Problem,
    file_state,
)

ID_HASHES = "id_hashes.bin"
SEQUENCE_HASHES = "sequence_hashes.bin"

MAX_RECORD_BYTES = 1 << 26
"""Longest record to read, as each record is held in memory; the longest proteins are about 46 kB."""
DNA_RECORDS = 100
DNA_FRACTION = 0.9
MOST_READ_OF_DNA = 1 << 26
"""Bytes of text after which to stop reading an input that looks like DNA, which may be very large."""
MOST_LISTED = 10
"""Number of faults listed in an error; the others are only counted."""

_BOM = b"\xef\xbb\xbf"
_COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_END_OF_INPUT = sys.maxsize


class UnreadableError(InputError):
    """An input, or the rest of it, cannot be read; other inputs can still be read."""


class Listed(NamedTuple):
    """A fault to be listed; faults are ordered by input and line."""

    input: int
    line: int
    text: str
    hint: str = ""


class Faults:
    """Counts the faults of the inputs and keeps the first ones.

    Args:
        most: number of faults to list; None lists all.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.count = 0
        self.is_unreadable = False
        self._kept: defaultdict[str, list[Listed]] = defaultdict(list)

    def add(self, kind: str, faults: Iterable[Listed], count: int) -> None:
        """Add `count` faults of one kind, ordered across calls; only those kept are generated."""
        self.count += count
        kept = self._kept[kind]
        kept += islice(faults, None if self.most is None else self.most - len(kept))

    def add_unreadable(self, number: int, message: str) -> None:
        """Add a fault that stops the reading of an input."""
        self.is_unreadable = True
        self.add("unreadable", [Listed(number, _END_OF_INPUT, message)], 1)

    def listed(self) -> list[Listed]:
        """Return the first faults in input order; faults that stop the reading are always listed."""
        ends = self._kept["unreadable"]
        others = [fault for kept in self._kept.values() if kept is not ends for fault in kept]
        others.sort(key=lambda fault: fault[:2])
        return sorted(others[: self.most] + ends, key=lambda fault: fault[:2])

    def error(self) -> InputError:
        """Return the error that lists the faults."""
        listed = self.listed()
        lines = [" ".join(fault.text.splitlines()) for fault in listed]
        hints = list(dict.fromkeys(fault.hint for fault in listed if fault.hint))
        if self.count == 1:
            return InputError(lines[0] + "".join(f" ({hint})" for hint in hints))
        if len(lines) < self.count:
            lines.append(
                f"and {self.count - len(lines):,} more; esm-packed info --all FILE lists all of a file"
            )
        return InputError(f"{self.count:,} problems in the input:", [*lines, *hints])


class _HashingReader(io.RawIOBase):
    """Reads a binary stream once, computing its size and SHA-256; a read is short only at the end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = 0
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self.sha256.update(memoryview(buffer)[:num_bytes])
        self.size += num_bytes
        return int(num_bytes)


class _Input:
    """One input, read once.

    Args:
        path: as named by the user.
        full_header: as in `ReadOptions`.
        chunk_size: bytes to read at a time.
        progress: called with the number of additional bytes read (compressed bytes if compressed).
        stack: closes the input.

    Raises:
        UnreadableError: the input cannot be opened.
    """

    def __init__(
        self,
        path: str,
        full_header: bool,
        chunk_size: int,
        progress: Callable[[int], None] | None,
        stack: ExitStack,
    ) -> None:
        self.path = path
        self.name = input_name(path)
        self.line = 1  # where the newest block begins
        self.num_read = 0  # bytes of text
        self._full_header = full_header
        self._chunk_size = chunk_size
        self._progress = progress
        self._num_told = 0
        file = sys.stdin.buffer if path == STDIN else stack.enter_context(_open(path))
        self._descriptor = None
        if path != STDIN and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            self._descriptor = file.fileno()
        self.state = self._state()
        self._hashing = _HashingReader(file)
        # gzip reads in small pieces, so the underlying stream must be buffered
        self._stream: Any = io.BufferedReader(self._hashing, max(chunk_size, io.DEFAULT_BUFFER_SIZE))
        self._head = self._stream.peek(8)
        if self._head.startswith(b"\x1f\x8b"):
            self._stream = gzip.GzipFile(fileobj=self._stream)
        # A second thread reads, decompresses and hashes ahead; not for pipes, which might never end.
        self._ahead = None if self._descriptor is None else stack.enter_context(ThreadPoolExecutor(1))
        self._next: Future[bytes] | None = None

    def finish(self) -> InputFile:
        """Return what was read.

        Raises:
            InputError: the file was changed while it was being read.
        """
        size = self._hashing.size
        if self.state is not None and (self.state[0] != size or self.state != self._state()):
            raise InputError(f"{self.name}: the file was changed while it was being read; start again")
        return InputFile(self.path, size, self._hashing.sha256.hexdigest())

    def blocks(self) -> Iterator[bytes]:
        """Yield blocks of whole records; the caller adds the lines of each to `line`.

        Raises:
            UnreadableError: the input, or the rest of it, is not FASTA.
        """
        for magic, compression in _COMPRESSED.items():
            if self._head.startswith(magic):
                raise UnreadableError(
                    f"{self.name}: compressed with {compression}; only gzip is supported; decompress it first"
                )
        has_records = False
        for block in self._cut_text():
            if not has_records:
                text = block.removeprefix(_BOM)
                preamble = text[: first_record(text)]
                fault = text_fault(preamble) or preamble_fault(preamble)
                if fault is not None:
                    raise self.error(text, *fault)
                self.line += count_lines(preamble)
                block = text[len(preamble) :]
            if block:
                has_records = True
                yield block
        if not has_records:
            raise UnreadableError(
                f"{self.name}: {'no records' if self._hashing.size else 'the file is empty'}"
            )

    def error(self, block: bytes, fault: int, reason: str, hint: str = "") -> UnreadableError:
        """Return the error for byte `fault` of the newest block."""
        line = self.line + count_lines(block[:fault])
        name = record_at(block, fault, self._full_header)
        record = "" if name is None else f", record {shorten(name)}"
        return UnreadableError(f"{self.name}, line {line}{record}: {reason}" + (f" ({hint})" if hint else ""))

    def _state(self) -> list[int] | None:
        return None if self._descriptor is None else file_state(os.fstat(self._descriptor))

    def _cut_text(self) -> Iterator[bytes]:
        """Yield the text in pieces that end before a record."""
        pending = b""
        while True:
            try:
                chunk = self._chunk()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                kind = "truncated" if isinstance(error, EOFError) else "corrupt"
                reason = f"the gzip data are {kind} soon after this"
                hint = "copy or download the file again"
                raise self.error(pending, len(pending), reason, hint) from error
            if not chunk:
                break
            self.num_read += len(chunk)
            searched = max(len(pending) - 1, 0)
            pending += chunk
            cut = pending.rfind(b"\n>", searched) + 1
            if b"\r" in chunk or pending[searched : searched + 1] == b"\r":
                cut = max(cut, pending.rfind(b"\r>", searched) + 1)
            if cut:
                yield pending[:cut]
                pending = pending[cut:]
            elif len(pending) > MAX_RECORD_BYTES:
                reason = f"a record is longer than {MAX_RECORD_BYTES >> 20} MiB, too long for a protein"
                if not pending.startswith(b">"):
                    reason = (
                        f"not FASTA: no '>' at the start of a line in the first {MAX_RECORD_BYTES >> 20} MiB"
                    )
                raise self.error(pending, 0, reason)
        if pending:
            yield pending

    def _chunk(self) -> bytes:
        """Return the next chunk of text; empty at the end."""
        if self._ahead is None:
            chunk: bytes = self._stream.read(self._chunk_size)
        else:
            read = partial(self._stream.read, self._chunk_size)
            chunk = (self._next or self._ahead.submit(read)).result()
            self._next = self._ahead.submit(read) if chunk else None
        size = self._hashing.size
        if self._progress is not None and size > self._num_told:
            self._progress(size - self._num_told)
        self._num_told = size
        return chunk


class Scan:
    """The results of the pass and the files it writes.

    `RECORDS`, `NAMES` and the two files of hashes have a row for each record that is not left out; a faulty
    record has no residues, and only its ID matters. `TOKENS` has the residues of the others.

    Args:
        directory: where the files go.
        options: how to handle faults.
        faults: collects the faults that `options` does not allow.
        is_survey: only collect faults, to the end of every input; do not write `TOKENS`.

    Attributes:
        inputs: what was read of each input that was read to its end, and its `file_state`.
        names: names of the inputs for messages.
        starts: first row of each input.
        left_out: (input number, problem) of each record left out.
        num_found: number of records found, including faulty ones.
        num_records: number of rows.
        num_replaced: number of characters replaced by X.
        is_dna: whether the first records look like nucleotides.
        checksums: checksums of the files that are written only here.
    """

    def __init__(
        self, directory: Path, options: ReadOptions, faults: Faults, *, is_survey: bool = False
    ) -> None:
        self.options = options
        self.faults = faults
        self.inputs: list[tuple[InputFile, list[int] | None]] = []
        self.names: list[str] = []
        self.starts: list[int] = []
        self.left_out: list[tuple[int, Problem]] = []
        self.num_found = self.num_records = self.num_replaced = 0
        self.checksums = {name: Checksums() for name in (NAMES, TOKENS)}
        self._is_survey = is_survey
        self.is_dna = False
        self._num_tested = DNA_RECORDS if options.force else 0
        self._num_residues = self._num_nucleotides = 0  # of the records tested
        self._first: tuple[int, Problem] | None = None  # first of these, without a reason
        self._stack = ExitStack()
        names = (RECORDS, NAMES, TOKENS, ID_HASHES, SEQUENCE_HASHES)
        self._files = {name: self._stack.enter_context((directory / name).open("wb")) for name in names}

    def read(
        self, paths: Sequence[str], chunk_size: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """Read all inputs. Inputs that cannot be read to their end are faults.

        Raises:
            InputError: an input was changed while it was being read.
            OSError: the directory cannot be written to.
        """
        with self._stack:
            for number, path in enumerate(paths):
                self.names.append(input_name(path))
                self.starts.append(self.num_records)
                try:
                    with ExitStack() as stack:
                        file = _Input(path, self.options.full_header, chunk_size, progress, stack)
                        self._read(number, file)
                        self.inputs.append((file.finish(), file.state))
                except UnreadableError as error:
                    self.faults.add_unreadable(number, str(error))
            self._judge()

    def _read(self, number: int, file: _Input) -> None:
        for block in file.blocks():
            if self.is_dna and not self._is_survey and file.num_read > MOST_READ_OF_DNA:
                num_read = file.num_read >> 20
                raise UnreadableError(f"{file.name}: not read beyond {num_read} MiB, as it looks like DNA")
            unreadable = text_fault(block)
            if unreadable is not None:
                if readable := record_begin(block, unreadable[0]):
                    self._add(number, file, parse_block(block[:readable], self.options))
                raise file.error(block, *unreadable)
            parsed = parse_block(block, self.options)
            self._add(number, file, parsed)
            file.line += parsed.num_lines

    def _add(self, number: int, file: _Input, parsed: ParsedBlock) -> None:
        """Record the contents of the newest block of an input."""
        is_sound = np.ones(len(parsed.lengths), dtype=np.bool_)
        is_sound[[fault.record for fault in parsed.faults]] = False
        self.num_found += len(is_sound)
        self.num_replaced += parsed.num_replaced
        problems = (
            (fault, Problem(parsed.name(fault.record), file.name, file.line + fault.line, fault.reason))
            for fault in parsed.faults
        )
        if self.options.invalid == "skip":
            firsts = (next(group) for _, group in groupby(problems, lambda found: found[0].record))
            self.left_out += ((number, problem) for _, problem in firsts)
            kept = is_sound
        else:
            listed = (Listed(number, problem.line, str(problem), fault.hint) for fault, problem in problems)
            self.faults.add("record", listed, len(parsed.faults))
            kept = parsed.name_ends > parsed.name_begins  # without a name there is nothing to compare
        token_ids = parsed.token_ids
        if not is_sound.all():
            token_ids = token_ids[np.repeat(is_sound, parsed.lengths)]
        tested = np.flatnonzero(is_sound)[: DNA_RECORDS - self._num_tested]
        if len(tested):
            record = int(tested[0])
            place = Problem(parsed.name(record), file.name, file.line + int(parsed.lines[record]), "")
            self._first = self._first or (number, place)
            residues = token_ids[: parsed.lengths[tested].sum()]
            self._num_residues += len(residues)
            self._num_nucleotides += count_nucleotides(residues)
            self._num_tested += len(tested)
            if self._num_tested == DNA_RECORDS:
                self._judge()
        if kept.any():
            self._write(file.line, parsed, np.where(is_sound, parsed.lengths, 0), kept, token_ids)

    def _write(
        self,
        line: int,
        parsed: ParsedBlock,
        lengths: Positions,
        kept: npt.NDArray[np.bool_],
        token_ids: npt.NDArray[np.uint8],
    ) -> None:
        """Append the rows of the `kept` records, their names and `token_ids`."""
        begins, name_bytes, lengths = parsed.name_begins[kept], parsed.name_ends[kept], lengths[kept]
        name_bytes -= begins
        name_ends, ends = np.cumsum(name_bytes), np.cumsum(lengths)
        places = np.repeat(begins - (name_ends - name_bytes), name_bytes) + np.arange(name_ends[-1])
        names = np.frombuffer(parsed.block, np.uint8)[places].tobytes()
        rows = np.zeros(len(begins), dtype=RECORD)
        rows["name"] = self.checksums[NAMES].num_bytes + name_ends - name_bytes
        rows["name_bytes"] = name_bytes
        rows["token"] = self.checksums[TOKENS].num_bytes + ends - lengths
        rows["length"] = lengths
        rows["line"] = line + parsed.lines[kept]
        rows["modified"] = parsed.modified[kept]
        tokens = token_ids.tobytes()
        self._files[RECORDS].write(rows.tobytes())
        id_hashes = hashes_of(names, name_ends - name_bytes, name_ends)
        self._files[ID_HASHES].write(hash_rows(id_hashes, self.num_records).tobytes())
        self._append(NAMES, names)
        if not self._is_survey:
            hashes = hashes_of(tokens, ends - lengths, ends)
            self._files[SEQUENCE_HASHES].write(hash_rows(hashes, self.num_records).tobytes())
            self._append(TOKENS, tokens)
        self.num_records += len(rows)

    def _append(self, name: str, content: bytes) -> None:
        self._files[name].write(content)
        self.checksums[name].update(content)

    def _judge(self) -> None:
        """Add a fault if the tested records look like nucleotides; called once enough or all are tested."""
        if self._first is None:  # nothing was tested, or already judged
            return
        number, first = self._first
        self._first = None
        share = self._num_nucleotides / self._num_residues
        self.is_dna = share > DNA_FRACTION
        if self.is_dna:
            reason = (
                f"this looks like DNA or RNA: {100 * share:.0f}% of the residues in the first records "
                f"(at most {DNA_RECORDS}) are A, C, G, T, U or N"
            )
            text = str(replace(first, reason=reason))
            self.faults.add("DNA", [Listed(number, first.line, text, "--force accepts it")], 1)


def input_name(path: str) -> str:
    """Return the name of an input for messages."""
    return "standard input" if path == STDIN else path


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise UnreadableError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UnreadableError(f"{path}: is a directory; give the FASTA files in it") from error
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be opened: {error.strerror}") from error
