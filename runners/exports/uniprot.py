"""UniProt's HDF5 files: a data set for each protein, called by its accession."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from esm_packed.errors import UsageError
from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.input.fasta import shorten
from esm_packed.runners.output.ids import accession_of
from esm_packed.runners.system.hdf5 import NewFile
from esm_packed.runners.watch.console import Advance

ORIGINAL_ID = "original_id"
"""Attribute of a data set that is not called by its ID."""


def write(selection: Selection, path: Path, advance: Advance) -> None:
    """Write `path`, per protein (D,) or per residue (L, columns).

    Data sets are called by accession where an ID is a UniProt header, else by ID, with `/` as `%2F` and an ID
    `.` as `%2E`; `original_id` holds an ID that is changed.

    Raises:
        UsageError: two IDs would be called the same.
        OSError: the disk is full or fails.
    """
    _check_names(selection)
    with NewFile(path) as output:
        with output.writing():
            output.file.attrs.update(selection.provenance)
        for block in selection.blocks():
            for sequence_id, value in zip(block.ids, block.values, strict=True):
                with output.writing():
                    name = _name(sequence_id)
                    dataset = output.file.create_dataset(name, data=value)
                    if name != sequence_id:
                        dataset.attrs[ORIGINAL_ID] = sequence_id
                advance(1)


def _name(sequence_id: str) -> str:
    name = accession_of(sequence_id).replace("/", "%2F")  # a / makes groups
    return "%2E" if name == "." else name


def _check_names(selection: Selection) -> None:
    """See that no two IDs have one name, with 8 bytes for each."""
    hashes = np.fromiter((hash(_name(each)) for each in selection.ids()), np.int64, len(selection))
    hashes.sort()
    shared = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[str, str] = {}
    for sequence_id in selection.ids() if shared else ():
        name = _name(sequence_id)
        if hash(name) in shared and seen.setdefault(name, sequence_id) != sequence_id:
            raise UsageError(
                f"{shorten(seen[name])} and {shorten(sequence_id)} would both be called {shorten(name)}; "
                "give them other IDs, or export to pt or npz, which keep whole IDs"
            )
