"""NumPy archives: IDs and a matrix."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.watch.console import Advance


def write(selection: Selection, path: Path, advance: Advance) -> None:
    """Write `path` for `np.load`: `ids` (n,) text and `embeddings` (n, D).

    Raises:
        OSError: the disk is full or fails.
    """
    id_type = np.dtype(f"U{max(map(len, selection.ids()))}")
    number = len(selection)
    with zipfile.ZipFile(path, "w") as archive:
        with _array(archive, "ids", id_type, (number,)) as file:
            for block in selection.blocks():
                file.write(np.array(block.ids, id_type))
        with _array(archive, "embeddings", selection.dtype, (number, selection.width)) as file:
            for block in selection.blocks():
                file.write(np.ascontiguousarray(block.values))
                advance(len(block.ids))


@contextmanager
def _array(
    archive: zipfile.ZipFile, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> Iterator[IO[Any]]:
    """An array to be filled from first value to last."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        description = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, description)
        yield file
