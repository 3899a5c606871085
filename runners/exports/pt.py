"""One file for torch: a dict from ID to tensor."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.watch.console import Advance


def write(selection: Selection, path: Path, advance: Advance) -> None:
    """Write `path` for `torch.load(weights_only=True)`: {ID: (D,) or (L, columns) tensor}.

    All tensors are views of one storage, written from a temporary file next to `path`, so their values need
    not fit into memory.

    Raises:
        OSError: the disk is full or fails.
    """
    places: list[tuple[str, int, tuple[int, ...]]] = []
    num_values = 0
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        for block in selection.blocks():
            for sequence_id, value in zip(block.ids, block.values, strict=True):
                places.append((sequence_id, num_values, value.shape))
                num_values += value.size
                scratch.write(np.ascontiguousarray(value).data)
                advance(1)
        scratch.flush()
        # copy-on-write, as torch has no read-only tensors
        storage = torch.from_numpy(np.memmap(scratch, selection.dtype, "c", shape=(num_values,)))
        tensors = {
            sequence_id: storage[start : start + int(np.prod(shape))].view(shape)
            for sequence_id, start, shape in places
        }
        with path.open("wb") as file:
            torch.save(tensors, file)
