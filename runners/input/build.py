"""Build an index from FASTA files, or list their faults."""

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
    """Read all of `paths` once, check every record, and write an index to `work_dir`.

    Args:
        paths: FASTA files, plain or gzip (detected by content), or `-` for standard input.
        work_dir: created if missing; an existing index in it is replaced.
        options: how to handle faults.
        progress: called with the number of additional input bytes read (compressed bytes if compressed).
        chunk_size: bytes to read at a time.

    Raises:
        InputError: there are faults that `options` does not allow; the message names the file, line and
            record of the first ones, one per line if there are several.
        OSError: `work_dir` cannot be written.
    """
    if not paths:
        raise InputError("no input files; give FASTA files, or - for standard input")
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
            f"all {len(scan.left_out):,} records were left out; the first: {scan.left_out[0][1]}"
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
    """Summary of a FASTA file.

    Args:
        size, sha256: size in bytes and hash (hex) of the file on disk.
        num_records: number of records, valid and faulty.
        lengths: (number of valid records,) int32, residues after cleaning.
        is_dna: whether the first records look like nucleotides.
        faults: what prevents the file from being embedded.
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
    """Read a FASTA file to its end despite faulty records, using temporary files in `work_dir`.

    Args:
        path: as in `build_index`.
        work_dir: an empty directory.
        most_listed: number of faults to keep; None keeps all.
        progress: as in `build_index`.

    Raises:
        InputError: the file cannot be read to its end; the message lists the faults up to that point.
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
    """Finds and handles duplicate IDs among the records of a scan.

    Attributes:
        records: (n,) rows of the records, memory-mapped.
        firsts: (n,) int64, the first record with the same ID.
        num_duplicates: number of records with the same ID as an earlier one.
    """

    def __init__(self, scan: Scan, work_dir: Path) -> None:
        self._scan = scan
        self._work_dir = work_dir
        self._mapped = np.memmap(work_dir / RECORDS, dtype=RECORD, mode="r+")
        self.records = np.asarray(self._mapped)  # indexing single elements of a memmap is slow
        sort_rows(work_dir / ID_HASHES)
        self._sorted: HashRows = np.asarray(np.memmap(work_dir / ID_HASHES, dtype=ROW, mode="r"))
        self.firsts = write_firsts(self._sorted, work_dir / _FIRST_IDS)
        self._names = _Pieces(work_dir / NAMES, self.records, "name", "name_bytes")
        self.num_duplicates = confirm_firsts(self.firsts, self._names.of)

    def add_faults(self) -> None:
        """Report each record with the ID of an earlier one as a fault."""
        listed = (
            Listed(number, problem.line, str(problem), _HINT_DUPLICATES)
            for _, number, problem in self._duplicates()
        )
        self._scan.faults.add("duplicate", listed, self.num_duplicates)

    def keep_first(self) -> list[tuple[int, Problem]]:
        """Drop all but the first record of each ID; return (input number, problem) of each dropped record."""
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
        """Number repeated IDs from 2 on, skipping IDs that already occur in the inputs."""
        if not self.num_duplicates:
            return
        path = self._work_dir / _NEXT_COPIES
        next_copies = np.asarray(np.memmap(path, dtype=np.int32, mode="w+", shape=self.firsts.shape))
        for batch in self._batches():
            # Hash the names expected if none is taken in one call: one at a time takes ten times as long.
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
        """Remove the files that only the search for duplicates needs."""
        self._names.close()
        for name in (ID_HASHES, _FIRST_IDS, _NEXT_COPIES):
            (self._work_dir / name).unlink(missing_ok=True)

    def _has(self, name: bytes, hash_halves: Sequence[int]) -> bool:
        return name in self._names.of(records_with(self._sorted, *hash_halves))

    def _batches(self) -> Iterator[list[tuple[int, int, bytes]]]:
        """Yield batches of (record, first record with its ID, ID) for all duplicates, in order."""
        for records, firsts in copies(self.firsts):
            yield list(zip(records.tolist(), firsts.tolist(), self._names.of(records), strict=True))

    def _duplicates(self) -> Iterator[tuple[int, int, Problem]]:
        """Yield each duplicate record, its input number, and why it is left out or rejected."""
        for record, first, name in chain.from_iterable(self._batches()):
            number, file, line = self._place(record)
            _, first_file, first_line = self._place(first)
            reason = f"the same ID as in {first_file}, line {first_line}"
            yield record, number, Problem(name.decode("utf-8"), file, line, reason)

    def _place(self, record: int) -> tuple[int, str, int]:
        """Return the number and name of the input, and the line of the header."""
        number = bisect_right(self._scan.starts, record) - 1
        return number, self._scan.names[number], int(self.records["line"][record])


class _Pieces:
    """Names or residues of the records of an unfinished index, from a memory-mapped file."""

    def __init__(self, path: Path, records: npt.NDArray[Any], begin: str, size: str) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._records = records
        self._begin = begin
        self._size = size

    def of(self, wanted: Positions) -> Iterator[bytes]:
        """Yield the pieces of the given records."""
        rows = self._records[wanted]
        for begin, size in zip(rows[self._begin].tolist(), rows[self._size].tolist(), strict=True):
            yield self._content[begin : begin + size]

    def close(self) -> None:
        self._content.close()


def _clear(work_dir: Path) -> None:
    """Remove an earlier index, metadata first; a process that has it open can still read its files."""
    for pattern in (METADATA, f"{METADATA}.*", "*.bin", "*.bin.spare"):
        for path in work_dir.glob(pattern):
            path.unlink()


def _drop_rows(path: Path, rows: npt.NDArray[Any], is_kept: npt.NDArray[np.bool_]) -> None:
    """Rewrite the file of `rows` with only the rows to keep, renumbering the records of hashes."""
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
    """Write the first record of each sequence; return the number of records that copy an earlier one."""
    records = np.asarray(np.memmap(work_dir / RECORDS, dtype=RECORD, mode="r"))
    sort_rows(work_dir / SEQUENCE_HASHES)
    rows = np.asarray(np.memmap(work_dir / SEQUENCE_HASHES, dtype=ROW, mode="r"))
    firsts = write_firsts(rows, work_dir / FIRST_SAME)
    residues = _Pieces(work_dir / TOKENS, records, "token", "length")
    num_identical = confirm_firsts(firsts, residues.of)
    residues.close()
    (work_dir / SEQUENCE_HASHES).unlink()
    return num_identical
