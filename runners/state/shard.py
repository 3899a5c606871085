"""The file of a finished shard, and what it holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from esm_packed.errors import UserError
from esm_packed.runners.system.files import open_regular, whole_or_nothing
from esm_packed.runners.system.hdf5 import hdf5_output
from esm_packed.runners.system.memory import RowBuffers, Rows

SHARD_FORMAT = "esm-packed shard"
STATUS_COMPUTED = 0
STATUS_RECOMPUTED = 1
STATUS_FAILED = 2
STATUS_NOT_COMPUTED = 3
_EMPTY_SHARD_BYTES = 8_192


class StoreError(UserError, ValueError):
    """A file that is not a whole esm-packed output."""


class Comparison(NamedTuple):
    """How far a mean embedding is from the same in FP32.

    Args:
        cosine: similarity of the two.
        max_error: largest difference of a component.
        relative_error: L2 norm of the difference over that of the FP32 embedding.
    """

    cosine: float
    max_error: float
    relative_error: float


@dataclass(frozen=True)
class Shard:
    """What was computed of one shard of a run, a row for each record that was not left to a copy.

    Args:
        status: (n,) uint8, STATUS values.
        embeddings: layer to (n, hidden_size).
        reasons: row to why it failed or was recomputed.
        comparisons: sampled row to how it compares with FP32.
        made_by: the device, attention backend and versions that computed it.
    """

    status: npt.NDArray[np.uint8]
    embeddings: Mapping[int, npt.NDArray[np.floating[Any]]]
    reasons: Mapping[int, str]
    comparisons: Mapping[int, Comparison] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)


def shards_bytes(
    num_shards: int, num_computed: int, hidden_size: int, num_layers: int, store_dtype: str
) -> int:
    """Size in bytes of the files of `num_shards` shards, in which `num_computed` sequences are computed."""
    row = 1 + hidden_size * num_layers * np.dtype(store_dtype).itemsize
    return num_shards * _EMPTY_SHARD_BYTES + num_computed * row


def write_shard(path: Path, scratch: Path, shard: Shard, number: int, plan: str) -> None:
    """Write a finished shard: on disk whole, or not at all.

    Args:
        path: the file to make; one that is there is replaced.
        scratch: a folder on the same file system for the unfinished file.
        shard: what it holds.
        number: of the shard in its plan.
        plan: hash of the plan.

    Raises:
        OSError: the disk is full or fails.
    """
    with whole_or_nothing(path, scratch) as temporary:
        with hdf5_output(temporary) as file:
            file.attrs["format"] = SHARD_FORMAT
            file.attrs["plan_hash"] = plan
            file.attrs["shard"] = number
            file.create_dataset("status", data=shard.status)
            for layer, rows in shard.embeddings.items():
                file.create_dataset(f"mean/{layer}", data=rows)
            for name in ("reasons", "comparisons", "made_by"):
                file.create_dataset(
                    name, data=json.dumps(dict(getattr(shard, name))), dtype=h5py.string_dtype()
                )
        # HDF5 does not mind what stands behind its own end of a file.
        with temporary.open("r+b") as raw:
            digest = hashlib.file_digest(raw, "sha256").digest()
            raw.write(digest)


def read_shard(path: Path, number: int, plan: str, buffers: RowBuffers | None = None) -> Shard:
    """Read a finished shard and see that it is what was written.

    Args:
        path: its file.
        number: of the shard in its plan.
        plan: hash of the plan.
        buffers: hold the embeddings, until the next shard is read into them; None for memory of their own.

    Raises:
        StoreError: it is cut short, altered, or another run's.
        FileNotFoundError: it is not there.
    """
    with open_regular(path) as raw:
        digest = hashlib.sha256()
        remaining = max(0, os.fstat(raw.fileno()).st_size - digest.digest_size)
        while remaining and (block := raw.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        is_whole = raw.read() == digest.digest()
    if not is_whole:  # HDF5 can hang on a damaged file, so it must not see one
        raise StoreError(f"{path}: damaged or cut short")
    with h5py.File(path, "r") as file:
        attributes = dict(file.attrs)
        if attributes != {"format": SHARD_FORMAT, "plan_hash": plan, "shard": number}:
            raise StoreError(f"{path}: another shard, or another run's")
        notes = {name: json.loads(file[name].asstr()[()]) for name in ("reasons", "comparisons", "made_by")}
        return Shard(
            status=file["status"][:],
            embeddings={
                int(layer): _read_rows(rows, int(layer), buffers or RowBuffers())
                for layer, rows in file["mean"].items()
            },
            reasons={int(row): text for row, text in notes["reasons"].items()},
            comparisons={int(row): Comparison(*values) for row, values in notes["comparisons"].items()},
            made_by=notes["made_by"],
        )


def _read_rows(dataset: Any, layer: int, buffers: RowBuffers) -> Rows:
    rows = buffers.rows(layer, dataset.shape, dataset.dtype)
    if dataset.size:
        dataset.read_direct(rows)
    return rows
