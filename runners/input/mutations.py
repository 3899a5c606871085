"""Tables of mutants: CSV or TSV with a header and one row per mutant, as in ProteinGym.

The column `mutant` holds mutants such as `A24G` or `A24G:K30R`. `mutated_sequence`, the mutant's residues, is
checked against it or replaces it. A column named in `ID_COLUMNS` identifies the FASTA record of each mutant,
by ID or UniProt accession; it is optional if there is only one record. Other columns are copied as text.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.errors import UsageError
from esm_packed.files import sha256_of
from esm_packed.mutations import Mutant, NumberingError, WildType
from esm_packed.runners.input.fasta import accession_of, shorten
from esm_packed.runners.input.index import FastaIndex
from esm_packed.runners.system.paths import resolved
from esm_packed.runners.system.terminal import counted

ID_COLUMNS = ("sequence_id", "id", "protein")
MUTANT = "mutant"
SEQUENCE = "mutated_sequence"
SCORE = "score"
"""The column that the output adds."""

_MOST_LISTED = 10
_IDS_AT_ONCE = 1 << 14


class TableProblem(NamedTuple):
    """Why a row cannot be used; `row` is the line on which it ends, counting the header as line 1."""

    row: int
    column: str
    reason: str

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"row {self.row}{column}: {self.reason}"


@dataclass(frozen=True)
class Mutants:
    """The mutants of a table, in table order.

    Args:
        path: the table.
        sha256: its checksum, formed before its rows were read.
        columns: its header.
        rows: (n,) int64 line of each mutant in the table, ascending.
        records: (n,) int64 FASTA record of each mutant.
        starts: (n + 1,) int64; the substitutions of mutant i are starts[i] to starts[i + 1].
        sites: (num_substitutions,) int32, 0-based, ascending within a mutant.
        wild_types, mutants: (num_substitutions,) uint8 token ids.
        problems: rows that were left out.
    """

    path: Path
    sha256: str
    columns: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    records: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    sites: npt.NDArray[np.int32]
    wild_types: npt.NDArray[np.uint8]
    mutants: npt.NDArray[np.uint8]
    problems: tuple[TableProblem, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """(num_substitutions,) mutant that each substitution belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def sums(self, effects: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """Return (n,) scores from the (num_substitutions,) effects of the substitutions."""
        return np.bincount(self.owners, effects, len(self)).astype(np.float64)

    def table_rows(self) -> Iterator[list[str]]:
        """Yield the cells of each mutant's row, reading the table again.

        Raises:
            UsageError: the table has changed.
        """
        place = 0
        rows = _rows(self.path) if _checksum(self.path) == self.sha256 else ()
        for row, cells in rows:
            if place < len(self) and row == self.rows[place]:
                if len(cells) != len(self.columns):
                    break
                place += 1
                yield cells
        if place < len(self):
            raise UsageError(
                f"{self.path}: was changed while its mutants were scored; rerun the same command"
            )


def read_mutants(
    path: Path,
    index: FastaIndex,
    *,
    offset: int = 1,
    max_span: int | None = None,
    skip_bad: bool = False,
) -> Mutants:
    """Read a table and check it against the proteins.

    Args:
        path: a file; its columns are separated by tabs if the header contains one, else by commas.
        index: index of the FASTA file.
        offset: number of the first residue of each protein.
        max_span: maximum number of residues from the first to the last site of a mutant; the window size
            if sites are masked together.
        skip_bad: leave out rows with faults and list them instead of raising an error.

    Raises:
        UsageError: a row has a fault, or the table has no rows or lacks a required column; the message names
            the table, and the row and column of the first faults.
        OSError: the table cannot be read.
    """
    reader = _Reader(path, index, offset, max_span)
    most = None if skip_bad else _MOST_LISTED
    mutants = reader.read(most)
    repeated = _repeated(mutants)
    problems = reader.problems
    for later, earlier in list(repeated.items())[:most]:
        reason = f"row {mutants.rows[earlier]} is the same mutant"
        problems.append(TableProblem(int(mutants.rows[later]), reader.mutant_column, reason))
    problems.sort()
    keep = np.ones(len(mutants), np.bool_)
    keep[list(repeated)] = False
    num_problems = reader.num_problems + len(repeated)
    if num_problems and (not skip_bad or not keep.any()):
        hint = "no row can be used" if skip_bad else "--skip-bad skips such rows and lists them"
        if reader.has_other_numbers:
            hint = f"--offset is the number of the first residue; {hint}"
        raise _error(path, num_problems, problems[:_MOST_LISTED], hint)
    if not keep.any():
        raise UsageError(f"{path}: no rows below the header")
    return _chosen(mutants, keep, problems)


def _error(path: Path, count: int, listed: Sequence[TableProblem], hint: str) -> UsageError:
    if count == 1:
        return UsageError(f"{path}, {listed[0]} ({hint})")
    more = [f"and {count - len(listed):,} more"] if count > len(listed) else []
    return UsageError(f"{path}: {count:,} rows cannot be used:", [*map(str, listed), *more, hint])


def _chosen(mutants: Mutants, keep: npt.NDArray[np.bool_], problems: Sequence[TableProblem]) -> Mutants:
    """Return the mutants for which `keep` (n,) is True."""
    counts = np.diff(mutants.starts)
    of_chosen = np.repeat(keep, counts)
    return replace(
        mutants,
        rows=mutants.rows[keep],
        records=mutants.records[keep],
        starts=np.concatenate([mutants.starts[:1], np.cumsum(counts[keep])]),
        sites=mutants.sites[of_chosen],
        wild_types=mutants.wild_types[of_chosen],
        mutants=mutants.mutants[of_chosen],
        problems=tuple(problems),
    )


def _repeated(mutants: Mutants) -> dict[int, int]:
    """Map each repeated mutant to its first occurrence; compare only mutants with equal sums of hashes."""
    mixed = (mutants.sites.astype(np.uint64) * np.uint64(32) + mutants.mutants) * np.uint64(
        0x9E3779B97F4A7C15
    )
    mixed ^= mixed >> np.uint64(29)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])  # sums may overflow
    keys = sums[mutants.starts[1:]] - sums[mutants.starts[:-1]] + mutants.records.astype(np.uint64)
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    first: dict[tuple[int, bytes, bytes], int] = {}
    repeated = {}
    for place in np.flatnonzero(counts[inverse] > 1).tolist():
        own = slice(*mutants.starts[place : place + 2].tolist())
        key = int(mutants.records[place]), mutants.sites[own].tobytes(), mutants.mutants[own].tobytes()
        if first.setdefault(key, place) != place:
            repeated[place] = first[key]
    return repeated


class _Fault(Exception):
    """What is wrong with a row."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(reason)
        self.column, self.reason = column, reason


def _difference(sequence: str, expected: str, mutant: str) -> str:
    if len(sequence) != len(expected):
        return f"{len(sequence)} residues, but the protein has {len(expected)}"
    place = next(place for place, letter in enumerate(expected) if sequence[place] != letter)
    return f"letter {place + 1} is {sequence[place]}, but the protein with {mutant} has {expected[place]}"


class _Reader:
    """Reads a table; `problems` holds the first of the `num_problems` unusable rows.

    `has_other_numbers` says whether a residue was not the one that its number says.
    """

    def __init__(self, path: Path, index: FastaIndex, offset: int, max_span: int | None) -> None:
        self._path, self._max_span = path, max_span
        self.sha256 = _checksum(path)  # first: a change from here on will show
        self.columns = tuple(next(_rows(path), (0, list[str]()))[1])
        self._check_columns()
        self._mutant, self._sequence = self._place(MUTANT), self._place(SEQUENCE)
        places = [place for name in ID_COLUMNS if (place := self._place(name)) is not None]
        self._id = places[0] if places else None
        self.mutant_column = SEQUENCE if self._mutant is None else MUTANT
        self._first_id = shorten(index.sequence_ids(0, 1)[0])
        self._ambiguous = set[str]()
        self._proteins = {
            name: (record, WildType(index.token_ids(record, record + 1)[0], offset))
            for name, record in self._records(index).items()
        }
        self.problems: list[TableProblem] = []
        self.num_problems = 0
        self.has_other_numbers = False

    def read(self, most_listed: int | None) -> Mutants:
        """Read all usable rows, without checking for repeated mutants."""
        rows, records, counts = array("q"), array("q"), array("q")
        substitutions = array("i")
        for row, cells in self._below_header():
            try:
                record, mutant = self._parse(cells)
            except _Fault as fault:
                self.num_problems += 1
                if most_listed is None or len(self.problems) < most_listed:
                    self.problems.append(TableProblem(row, fault.column, fault.reason))
                continue
            rows.append(row)
            records.append(record)
            counts.append(len(mutant))
            for substitution in mutant:
                substitutions.extend(substitution)
        sites, wild_types, mutants = np.array(substitutions, np.int32).reshape(-1, 3).T
        return Mutants(
            self._path,
            self.sha256,
            self.columns,
            np.array(rows, np.int64),
            np.array(records, np.int64),
            np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            sites.copy(),
            wild_types.astype(np.uint8),
            mutants.astype(np.uint8),
        )

    def _below_header(self) -> Iterator[tuple[int, list[str]]]:
        rows = _rows(self._path)
        next(rows, None)
        return rows

    def _parse(self, cells: Sequence[str]) -> tuple[int, Mutant]:
        """Return the record and substitutions of a row.

        Raises:
            _Fault: the row cannot be used.
        """
        if len(cells) != len(self.columns):
            raise _Fault("", f"{counted(len(cells), 'cell')}, but the header has {len(self.columns)}")
        name = "" if self._id is None else cells[self._id].strip()
        if name not in self._proteins:
            assert self._id is not None
            reason = f"{shorten(name)} is not a record of the FASTA file, whose first is {self._first_id}"
            if name in self._ambiguous:
                reason = f"{shorten(name)} is the accession of several records; give their whole IDs"
            raise _Fault(self.columns[self._id], reason)
        record, wild_type = self._proteins[name]
        try:
            if self._mutant is not None:
                mutant = wild_type.mutant(cells[self._mutant].strip())
            else:
                assert self._sequence is not None
                mutant = wild_type.difference(cells[self._sequence].strip())
        except ValueError as error:
            self.has_other_numbers |= isinstance(error, NumberingError)
            raise _Fault(self.mutant_column, str(error)) from None
        span = mutant[-1].site - mutant[0].site + 1 if mutant else 0
        if self._max_span is not None and span > self._max_span:
            reason = f"its sites span {span:,} residues, but a window has {self._max_span:,}"
            raise _Fault(self.mutant_column, reason)
        if self._mutant is not None and self._sequence is not None:
            expected, sequence = wild_type.mutated(mutant), cells[self._sequence].strip().upper()
            if sequence != expected:
                raise _Fault(SEQUENCE, _difference(sequence, expected, cells[self._mutant].strip()))
        return record, mutant

    def _check_columns(self) -> None:
        if len(self.columns) == 1 and ";" in self.columns[0]:
            raise UsageError(f"{self._path}: separated by semicolons; save it with commas or tabs")
        shown = ", ".join(map(shorten, self.columns[:_MOST_LISTED])) or "nothing"
        if MUTANT not in self.columns and SEQUENCE not in self.columns:
            raise UsageError(
                f"{self._path}: no column {MUTANT} (such as A24G or A24G:K30R) and no column {SEQUENCE}; the "
                f"header has {shown}"
            )
        for column in self.columns:
            if self.columns.count(column) > 1:
                raise UsageError(f"{self._path}: the column {shorten(column)} appears twice; rename one")
        if SCORE in self.columns:
            raise UsageError(f"{self._path}: rename the column {SCORE}, as the output adds one of this name")

    def _place(self, column: str) -> int | None:
        return self.columns.index(column) if column in self.columns else None

    def _records(self, index: FastaIndex) -> dict[str, int]:
        """Return the records named in the table; without an ID column, the only record is named "".

        Raises:
            UsageError: there is no ID column but more than one record.
        """
        if self._id is None:
            if index.num_records != 1:
                raise UsageError(
                    f"{self._path}: needs a column {', '.join(ID_COLUMNS[:-1])} or {ID_COLUMNS[-1]}, because "
                    f"the FASTA file has {index.num_records:,} records"
                )
            return {"": 0}
        named = {cells[self._id].strip() for _, cells in self._below_header() if len(cells) > self._id}
        by_id, by_accession = dict[str, int](), dict[str, int]()
        for start in range(0, index.num_records, _IDS_AT_ONCE):
            names = index.sequence_ids(start, min(start + _IDS_AT_ONCE, index.num_records))
            for record, name in enumerate(names, start):
                if name in named:
                    by_id[name] = record
                accession = accession_of(name)
                if accession in named and by_accession.setdefault(accession, record) != record:
                    self._ambiguous.add(accession)
        self._ambiguous.difference_update(by_id)
        for accession in self._ambiguous:
            del by_accession[accession]
        return {**by_accession, **by_id}


def _checksum(path: Path) -> str:
    """SHA-256 (hex) of a table; empty if it cannot be read."""
    try:
        return sha256_of(resolved(path))
    except OSError:
        return ""


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the non-blank rows of a table, header first, with the lines on which they end.

    Raises:
        UsageError: the file does not exist, is not text, or has a row that is not valid CSV.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: not a regular file, but the table is read more than once")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                for cells in reader:
                    if cells:
                        yield reader.line_num, cells
            except csv.Error as error:
                raise UsageError(f"{path}, row {reader.line_num}: {error}") from error
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text; a table of mutants is CSV or TSV in UTF-8") from error
