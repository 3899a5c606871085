"""HDF5 files like UniProt's: a dataset for each protein, named by its accession."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from esm_packed.errors import UsageError
from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.input.fasta import accession_of, shorten
from esm_packed.runners.system.hdf5 import NewFile
from esm_packed.runners.watch.console import Advance

ORIGINAL_ID = "original_id"
"""Attribute of a dataset whose name is not its ID."""


def write(selection: Selection, path: Path, advance: Advance) -> None:
    """Write `path`, per protein (D,) or per residue (L, columns).

    Datasets are named by accession where an ID is a UniProt header, else by ID, with `/` as `%2F` and an ID
    `.` as `%2E`; `original_id` holds an ID that was changed.

    Raises:
        UsageError: two IDs would get the same name.
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
    name = accession_of(sequence_id).replace("/", "%2F")  # a / would create groups
    return "%2E" if name == "." else name


def _check_names(selection: Selection) -> None:
    """Check that no two IDs have the same name, in 8 bytes of memory per ID."""
    hashes = np.fromiter((hash(_name(each)) for each in selection.ids()), np.int64, len(selection))
    hashes.sort()
    shared = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[str, str] = {}
    for sequence_id in selection.ids() if shared else ():
        name = _name(sequence_id)
        if hash(name) in shared and seen.setdefault(name, sequence_id) != sequence_id:
            raise UsageError(
                f"{shorten(seen[name])} and {shorten(sequence_id)} would both be named {shorten(name)}; "
                "change one of the IDs, or use --to pt or --to npz, which keep full IDs"
            )
