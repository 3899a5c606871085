"""The stored form of FASTA records, and how to reopen it.

An index is a directory: `tokens.bin`, the residues of all records, a byte each; `names.bin`, their IDs as in
the files; `records.bin`, 37 bytes per record that locate it in those two; `first_same.bin`, 8 bytes per
record with the first record of the same sequence; and `index.json`, which is written last, protects the
checksums of the others with hashes, and says what the index was made from. The inputs are opened again only
to check that they are unchanged when a later process reuses the index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.files import read_regular, sha256_of, whole_or_nothing
from esm_packed.runners.input.blocks import METADATA, SealedFile, StoredRows
from esm_packed.runners.input.fasta import DamagedIndexError, Modified, ReadOptions, shorten

STDIN = "-"

RECORDS = "records.bin"
TOKENS = "tokens.bin"
NAMES = "names.bin"
FIRST_SAME = "first_same.bin"

# `token` and `name` are positions in their files; `line` is the line of the header; `copy` is 0, or the
# number in the `__2` suffix that distinguishes this record from an earlier one with the same ID; `modified`
# holds the `fasta.Modified` flags except RENAMED, which follows from `copy`.
RECORD = np.dtype(
    [
        ("token", "<i8"),
        ("name", "<i8"),
        ("line", "<i8"),
        ("length", "<i4"),
        ("name_bytes", "<i4"),
        ("copy", "<i4"),
        ("modified", "u1"),
    ]
)

_FORMAT_VERSION = 3
_CHECKSUM_BYTES = hashlib.sha256().digest_size * 2
_NO_INDEX = (OSError, ValueError, TypeError, KeyError)
"""Errors raised when the index to be read is missing, incomplete or of another version."""


@dataclass(frozen=True)
class Problem:
    """A record that was left out; `line` is the 1-based line of the fault."""

    sequence_id: str
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, record {shorten(self.sequence_id)}: {self.reason}"


class InputFile(NamedTuple):
    """One input, as named by the user; `size` (bytes) and `sha256` (hex) refer to the file on disk."""

    path: str
    size: int
    sha256: str


class FastaIndex:
    """The records of one or more FASTA files in input order; made by `build_index`.

    Args:
        work_dir: the directory of the index.
        metadata: the content of `index.json`.

    Attributes:
        num_records: number of records, excluding those left out.
        lengths: (num_records,) int32, residues after cleaning.
        first_same: (num_records,) int64, the first record with the same residues, possibly the record itself.
        total_residues: sum of `lengths`.
        num_identical: number of records with the same residues as an earlier one.
        num_replaced: number of characters replaced by X, including those in duplicates that were left out.
        num_duplicates: number of records with the same ID as an earlier one.
        mean_id_bytes: mean size of an ID as read, in bytes of UTF-8.
        problems: the records left out, in input order.
        options: the rules used to build the index.
        inputs: path, size in bytes and sha256 of each input.
        num_bytes: size on disk.
    """

    def __init__(self, work_dir: Path, metadata: dict[str, Any]) -> None:
        self._files = {name: SealedFile(work_dir / name, seal) for name, seal in metadata["files"].items()}
        self._records = StoredRows(self._files[RECORDS], RECORD)
        self.num_records = len(self._records)
        self.lengths = StoredRows(self._files[RECORDS], RECORD, "length")
        self.first_same = StoredRows(self._files[FIRST_SAME], np.dtype(np.int64))
        self.total_residues: int = metadata["total_residues"]
        self.num_identical: int = metadata["num_identical"]
        self.num_replaced: int = metadata["num_replaced"]
        self.num_duplicates: int = metadata["num_duplicates"]
        self.mean_id_bytes: float = metadata["mean_id_bytes"]
        self.problems = [Problem(*problem) for problem in metadata["problems"]]
        self.options = ReadOptions(**metadata["options"])
        self.inputs = [InputFile(*entry["file"]) for entry in metadata["inputs"]]
        self.num_bytes = sum(file.num_bytes for file in self._files.values())

    def token_ids(self, start: int, stop: int, max_length: int = 0) -> list[npt.NDArray[np.uint8]]:
        """Return the residues of records [start, stop).

        Args:
            start, stop: record numbers, 0 <= start <= stop <= num_records.
            max_length: cut each sequence to its first `max_length` residues; 0 keeps them whole.

        Returns:
            For each record, (num_residues,) uint8 ids into `alphabet.TOKENS`, without BOS and EOS.

        Raises:
            ValueError: the range is out of bounds, or `max_length` is negative.
            InputError: the index is damaged.
        """
        if max_length < 0:
            raise ValueError(f"max_length must be 0 (no limit) or positive; got {max_length}")
        rows = self._rows(start, stop)
        lengths = np.minimum(rows["length"], max_length) if max_length else rows["length"]
        return [np.frombuffer(part, np.uint8) for part in self._parts(TOKENS, rows["token"], lengths)]

    def sequence_ids(self, start: int, stop: int) -> list[str]:
        """Return the IDs of records [start, stop), including suffixes such as `__2`.

        Raises:
            ValueError: the range is out of bounds.
            InputError: the index is damaged.
        """
        rows = self._rows(start, stop)
        names = self._parts(NAMES, rows["name"], rows["name_bytes"])
        return [
            str(name, "utf-8") + (f"__{copy}" if copy else "")
            for name, copy in zip(names, rows["copy"].tolist(), strict=True)
        ]

    def modified(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return (stop - start,) uint8 `Modified` flags: what was changed in records [start, stop).

        Raises:
            ValueError: the range is out of bounds.
            InputError: the index is damaged.
        """
        rows = self._rows(start, stop)
        is_renamed = (rows["copy"] > 0).astype(np.uint8)
        modified: npt.NDArray[np.uint8] = rows["modified"] | is_renamed * np.uint8(Modified.RENAMED)
        return modified

    def close(self) -> None:
        """Close the files of the index; network file systems keep open files even after deletion."""
        for file in self._files.values():
            file.close()

    def _rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        if not 0 <= start <= stop <= self.num_records:
            raise ValueError(
                f"start, stop must be within 0 to {self.num_records} and ordered; got {start}, {stop}"
            )
        return self._records[start:stop]

    def _parts(
        self, name: str, begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int32]
    ) -> list[memoryview]:
        """Return ascending, nearby pieces of a file, using one read."""
        if not len(begins):
            return []
        ends = begins + sizes
        first = int(begins[0])
        content = self._files[name].read(first, int(ends[-1]))
        places = zip((begins - first).tolist(), (ends - first).tolist(), strict=True)
        return [content[begin:end] for begin, end in places]


def write_metadata(work_dir: Path, metadata: dict[str, Any]) -> FastaIndex:
    """Finish the index in `work_dir`, whose files are sealed, and open it.

    Raises:
        OSError: the disk is full or has failed.
    """
    metadata = {"format_version": _FORMAT_VERSION, **metadata}
    text = json.dumps(metadata).encode("ascii")
    with whole_or_nothing(work_dir / METADATA, work_dir) as temporary:
        temporary.write_bytes(text + hashlib.sha256(text).hexdigest().encode())
    return FastaIndex(work_dir, metadata)


def open_index(paths: Sequence[str], work_dir: Path, options: ReadOptions) -> FastaIndex | None:
    """Open the index that `build_index` left in `work_dir`, if it is complete and matches inputs and options.

    A file that may have been modified is hashed and must have the same content. Standard input is not checked
    and may be omitted from `paths`; the caller must know whether it holds anything new. A named pipe never
    counts as unchanged.
    """
    try:
        metadata = _read_metadata(work_dir)
        inputs = [entry for entry in metadata["inputs"] if entry["file"][0] != STDIN]
        if (
            metadata["options"] != asdict(options)
            or [entry["file"][0] for entry in inputs] != [path for path in paths if path != STDIN]
            or not all(map(_is_unchanged, inputs))
        ):
            return None
        return FastaIndex(work_dir, metadata)
    except _NO_INDEX:
        return None


def reopen_index(work_dir: Path) -> FastaIndex:
    """Open the index in `work_dir`, without checking the inputs it was made from.

    Raises:
        DamagedIndexError: the index cannot be read.
    """
    try:
        return FastaIndex(work_dir, _read_metadata(work_dir))
    except _NO_INDEX:
        raise DamagedIndexError(f"{work_dir}: damaged or missing") from None


def file_state(status: os.stat_result) -> list[int]:
    """Return size in bytes, mtime and ctime in ns, and inode, which together identify an unchanged file."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_metadata(work_dir: Path) -> dict[str, Any]:
    """Read `index.json` and verify its checksum.

    Raises:
        OSError, ValueError, TypeError, KeyError: it is missing, incomplete or of another version.
    """
    content = read_regular(work_dir / METADATA)
    text, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise ValueError("damaged")
    metadata: dict[str, Any] = json.loads(text)
    if metadata["format_version"] != _FORMAT_VERSION:
        raise ValueError("of another version")
    return metadata


def _is_unchanged(entry: dict[str, Any]) -> bool:
    path, _, sha256 = InputFile(*entry["file"])
    if entry["state"] is None:
        return False
    if file_state(Path(path).stat()) == entry["state"]:
        return True
    return sha256_of(Path(path).resolve()) == sha256  # the user may have named a link
