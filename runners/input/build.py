"""FASTA files to an index, or to a list of their faults."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.blocks import METADATA, seal
from esm_packed.runners.input.duplicates import (
    ROW,
    HashRows,
    confirm_firsts,
    copies,
    hashes_of,
    records_with,
    sort_rows,
    write_firsts,
)
from esm_packed.runners.input.fasta import InputError, Positions, ReadOptions
from esm_packed.runners.input.index import (
    FIRST_SAME,
    NAMES,
    RECORD,
    RECORDS,
    TOKENS,
    FastaIndex,
    Problem,
    write_metadata,
)
from esm_packed.runners.input.scan import (
    ID_HASHES,
    MOST_LISTED,
    SEQUENCE_HASHES,
    Faults,
    Listed,
    Scan,
)

_FIRST_IDS = "first_ids.bin"
_KEPT = "kept.bin"
_NEXT_COPIES = "next_copies.bin"
_STORED = (RECORDS, TOKENS, NAMES, FIRST_SAME)
_CHUNK_BYTES = 1 << 22
_ROWS_AT_ONCE = 1 << 17
_HINT_DUPLICATES = "--duplicates first keeps the first record of an ID, --duplicates rename adds __2, __3 ..."


def build_index(
    paths: Sequence[str],
    work_dir: Path,
    options: ReadOptions,
    *,
    progress: Callable[[int], None] | None = None,
    chunk_size: int = _CHUNK_BYTES,
) -> FastaIndex:
    """Read all of `paths` once, check every record, and leave an index in `work_dir`.

    Args:
        paths: FASTA files, plain or gzip (told by content), or `-` for standard input.
        work_dir: made if missing; an index already in it is replaced.
        options: what to do about faults.
        progress: told how many more bytes of the inputs (as they are, compressed or not) have been read.
        chunk_size: bytes to read at a time.

    Raises:
        InputError: there are faults that `options` does not allow; the message names file, line and record
            of the first ones, a line for each if there are several.
        OSError: `work_dir` cannot be written.
    """
    if not paths:
        raise InputError("no input files were given; name FASTA files, or - for standard input")
    work_dir.mkdir(parents=True, exist_ok=True)
    _clear(work_dir)
    scan = Scan(work_dir, options, Faults(MOST_LISTED))
    scan.read(paths, chunk_size, progress)
    ids = _Ids(scan, work_dir) if scan.num_records else None
    if ids is not None and options.duplicates == "error":
        ids.add_faults()
    if scan.faults.count:
        raise scan.faults.error()
    if ids is None:
        raise InputError(
            f"no record is left, all {len(scan.left_out):,} were left out; the first is {scan.left_out[0][1]}"
        )
    if options.duplicates == "rename":
        ids.rename()
    elif options.duplicates == "first":
        scan.left_out += ids.keep_first()
    ids.remove_files()
    num_identical = _find_identical(work_dir)
    records = np.memmap(work_dir / RECORDS, dtype=RECORD, mode="r")
    problems = [problem for _, problem in sorted(scan.left_out, key=lambda found: (found[0], found[1].line))]
    metadata = {
        "options": asdict(options),
        "inputs": [{"file": file, "state": state} for file, state in scan.inputs],
        "total_residues": int(records["length"].sum(dtype=np.int64)),
        "num_identical": num_identical,
        "num_replaced": scan.num_replaced,
        "num_duplicates": ids.num_duplicates,
        "mean_id_bytes": float(records["name_bytes"].mean()),
        "problems": [astuple(problem) for problem in problems],
        "files": {name: seal(work_dir / name, scan.checksums.get(name)) for name in _STORED},
    }
    return write_metadata(work_dir, metadata)


@dataclass(frozen=True)
class Survey:
    """What a FASTA file holds; `size` in bytes and `sha256` (hex) are of the file as it is on disk.

    Args:
        size, sha256: of the file.
        num_records: sound and faulty ones.
        lengths: (number of sound records,) int32, residues after cleaning.
        is_dna: the first records look like nucleotides.
        faults: what keeps it from being embedded.
    """

    size: int
    sha256: str
    num_records: int
    lengths: npt.NDArray[np.int32]
    is_dna: bool
    faults: Faults


def survey(
    path: str,
    work_dir: Path,
    most_listed: int | None = MOST_LISTED,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Read a FASTA file to its end, whatever faults its records have, with files in `work_dir` meanwhile.

    Args:
        path: as `build_index` takes it.
        work_dir: an empty folder.
        most_listed: faults to keep; None keeps all.
        progress: as in `build_index`.

    Raises:
        InputError: it cannot be read to its end; the message lists the faults up to there.
        OSError: `work_dir` cannot be written.
    """
    scan = Scan(work_dir, ReadOptions(), Faults(most_listed), is_survey=True)
    scan.read([path], _CHUNK_BYTES, progress)
    lengths = np.empty(0, dtype=np.int32)
    if scan.num_records:
        ids = _Ids(scan, work_dir)
        ids.add_faults()
        lengths = np.array(ids.records["length"])
        lengths = lengths[(lengths > 0) & (ids.firsts == np.arange(len(lengths)))]
    if scan.faults.is_unreadable:
        raise scan.faults.error()
    (file, _), *_ = scan.inputs
    return Survey(file.size, file.sha256, scan.num_found, lengths, scan.is_dna, scan.faults)


class _Ids:
    """The IDs of the records of a scan, those that are there more than once, and what becomes of these.

    Attributes:
        records: (n,) the rows of the records, mapped.
        firsts: (n,) int64, the first record of the same ID.
        num_duplicates: records that have the ID of an earlier one.
    """

    def __init__(self, scan: Scan, work_dir: Path) -> None:
        self._scan = scan
        self._work_dir = work_dir
        self._mapped = np.memmap(work_dir / RECORDS, dtype=RECORD, mode="r+")
        self.records = np.asarray(self._mapped)  # single elements of a memmap itself are slow to reach
        sort_rows(work_dir / ID_HASHES)
        self._sorted: HashRows = np.asarray(np.memmap(work_dir / ID_HASHES, dtype=ROW, mode="r"))
        self.firsts = write_firsts(self._sorted, work_dir / _FIRST_IDS)
        self._names = _Pieces(work_dir / NAMES, self.records, "name", "name_bytes")
        self.num_duplicates = confirm_firsts(self.firsts, self._names.of)

    def add_faults(self) -> None:
        """Make each record whose ID an earlier one has a fault."""
        listed = (
            Listed(number, problem.line, str(problem), _HINT_DUPLICATES)
            for _, number, problem in self._duplicates()
        )
        self._scan.faults.add("duplicate", listed, self.num_duplicates)

    def keep_first(self) -> list[tuple[int, Problem]]:
        """Leave out all but the first record of each ID; number of the input and problem of each other."""
        if not self.num_duplicates:
            return []
        is_kept = np.ones(len(self.firsts), dtype=np.bool_)
        left_out = []
        for record, number, problem in self._duplicates():
            is_kept[record] = False
            left_out.append((number, problem))
        _drop_rows(self._work_dir / RECORDS, self.records, is_kept)
        hashes = np.memmap(self._work_dir / SEQUENCE_HASHES, dtype=ROW, mode="r")
        _drop_rows(self._work_dir / SEQUENCE_HASHES, hashes, is_kept)
        return left_out

    def rename(self) -> None:
        """Number the records of an ID from 2 on, past the IDs that the inputs already have."""
        if not self.num_duplicates:
            return
        path = self._work_dir / _NEXT_COPIES
        next_copies = np.asarray(np.memmap(path, dtype=np.int32, mode="w+", shape=self.firsts.shape))
        for batch in self._batches():
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
                    if not self._has(wanted, halves if wanted == new_name else _hashes_of_names([wanted])[0]):
                        break
                    copy += 1
                self.records["copy"][record] = copy
                next_copies[first] = copy + 1
        self._mapped.flush()

    def remove_files(self) -> None:
        """Remove what only the search for duplicates needed."""
        self._names.close()
        for name in (ID_HASHES, _FIRST_IDS, _NEXT_COPIES):
            (self._work_dir / name).unlink(missing_ok=True)

    def _has(self, name: bytes, hash_halves: Sequence[int]) -> bool:
        return name in self._names.of(records_with(self._sorted, *hash_halves))

    def _batches(self) -> Iterator[list[tuple[int, int, bytes]]]:
        """Batches of (record, first record of its ID, ID) of all whose ID an earlier one has, in order."""
        for records, firsts in copies(self.firsts):
            yield list(zip(records.tolist(), firsts.tolist(), self._names.of(records), strict=True))

    def _duplicates(self) -> Iterator[tuple[int, int, Problem]]:
        """Each record whose ID an earlier one has, number of its input, and why it is left out or refused."""
        for record, first, name in chain.from_iterable(self._batches()):
            number, file, line = self._place(record)
            _, first_file, first_line = self._place(first)
            reason = f"the same ID as in {first_file}, line {first_line}"
            yield record, number, Problem(name.decode("utf-8"), file, line, reason)

    def _place(self, record: int) -> tuple[int, str, int]:
        """Number and name of the input, and the line of the header."""
        number = bisect_right(self._scan.starts, record) - 1
        return number, self._scan.names[number], int(self.records["line"][record])


class _Pieces:
    """Names or residues of the records of an index that is being made, from a mapped file."""

    def __init__(self, path: Path, records: npt.NDArray[Any], begin: str, size: str) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._records = records
        self._begin = begin
        self._size = size

    def of(self, wanted: Positions) -> Iterator[bytes]:
        """The pieces of these records."""
        rows = self._records[wanted]
        for begin, size in zip(rows[self._begin].tolist(), rows[self._size].tolist(), strict=True):
            yield self._content[begin : begin + size]

    def close(self) -> None:
        self._content.close()


def _clear(work_dir: Path) -> None:
    """Remove an earlier index, first what vouches for it; a process that has it open keeps its files."""
    for pattern in (METADATA, f"{METADATA}.*", "*.bin", "*.bin.spare"):
        for path in work_dir.glob(pattern):
            path.unlink()


def _drop_rows(path: Path, rows: npt.NDArray[Any], is_kept: npt.NDArray[np.bool_]) -> None:
    """Write anew the file of `rows` without those that are not kept; hashes get their new record numbers."""
    num_kept = 0
    kept_path = path.with_name(_KEPT)
    with kept_path.open("wb") as file:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            kept = rows[start : start + _ROWS_AT_ONCE][is_kept[start : start + _ROWS_AT_ONCE]]
            if rows.dtype == ROW:
                kept["record"] = np.arange(num_kept, num_kept + len(kept))
            file.write(kept.tobytes())
            num_kept += len(kept)
    kept_path.replace(path)


def _hashes_of_names(names: list[bytes]) -> list[list[int]]:
    ends = np.cumsum([len(name) for name in names])
    hashes: list[list[int]] = hashes_of(b"".join(names), np.append(0, ends[:-1]), ends).tolist()
    return hashes


def _find_identical(work_dir: Path) -> int:
    """Write the first record of each sequence; the number of records that are copies of an earlier one."""
    records = np.asarray(np.memmap(work_dir / RECORDS, dtype=RECORD, mode="r"))
    sort_rows(work_dir / SEQUENCE_HASHES)
    rows = np.asarray(np.memmap(work_dir / SEQUENCE_HASHES, dtype=ROW, mode="r"))
    firsts = write_firsts(rows, work_dir / FIRST_SAME)
    residues = _Pieces(work_dir / TOKENS, records, "token", "length")
    num_identical = confirm_firsts(firsts, residues.of)
    residues.close()
    (work_dir / SEQUENCE_HASHES).unlink()
    return num_identical
