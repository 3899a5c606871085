"""AnnData's files, written without anndata in its on-disk format 0.1.0.

https://anndata.readthedocs.io/en/stable/fileformat-prose.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esm_packed.runners.exports.selection import Selection
from esm_packed.runners.output.layout import TEXT
from esm_packed.runners.output.reader import STATUS_LABELS
from esm_packed.runners.system.hdf5 import NewFile
from esm_packed.runners.watch.console import Advance

_INDEX = "sequence_id"


def write(selection: Selection, path: Path, advance: Advance) -> None:
    """Write `path`: `X` (n, D), `obs` by ID with the columns of `EmbeddingReader.columns`, and `uns`.

    Raises:
        OSError: the disk is full or fails.
    """
    with NewFile(path) as output:
        with output.writing():
            _mark(output.file, "anndata", "0.1.0")
            _fill(output.file, selection)
        start = 0
        for block in selection.blocks():
            rows = slice(start, start := start + len(block.ids))
            with output.writing():
                output.file["X"][rows] = block.values
                output.file[f"obs/{_INDEX}"][rows] = block.ids
                for name, column in block.columns.items():
                    dataset = output.file["obs"][name]
                    (dataset["codes"] if name == "status" else dataset)[rows] = column
            advance(len(block.ids))


def _fill(file: Any, selection: Selection) -> None:
    """Create the whole structure; the rows of `X` and `obs` are still empty."""
    number = len(selection)
    _mark(file.create_dataset("X", (number, selection.width), selection.dtype), "array")
    columns = selection.reader.columns(0, 0)
    obs = _frame(file, "obs", list(columns))
    _mark(obs.create_dataset(_INDEX, (number,), TEXT), "string-array")
    for name, empty in columns.items():
        if name == "status":
            _categorical(obs, name, number, STATUS_LABELS)
        else:
            _mark(obs.create_dataset(name, (number,), empty.dtype), "array")
    var = _frame(file, "var", [])
    _text(var, _INDEX, [str(column) for column in range(selection.width)])
    for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
        _mark(file.create_group(name), "dict", "0.1.0")
    for name, value in selection.provenance.items():
        dataset = file["uns"].create_dataset(name, data=value)
        _mark(dataset, "string" if isinstance(value, str) else "numeric-scalar")


def _mark(item: Any, kind: str, version: str = "0.2.0") -> None:
    item.attrs["encoding-type"] = kind
    item.attrs["encoding-version"] = version


def _frame(file: Any, name: str, columns: list[str]) -> Any:
    frame = file.create_group(name)
    _mark(frame, "dataframe")
    frame.attrs["_index"] = _INDEX
    frame.attrs.create("column-order", np.array(columns, object), dtype=TEXT)
    return frame


def _categorical(obs: Any, name: str, number: int, labels: Mapping[int, str]) -> None:
    """A column of codes, which are indices into `labels`."""
    group = obs.create_group(name)
    _mark(group, "categorical")
    group.attrs["ordered"] = False
    _mark(group.create_dataset("codes", (number,), np.int8), "array")
    _text(group, "categories", [labels[code] for code in range(len(labels))])


def _text(group: Any, name: str, texts: list[str]) -> None:
    values: npt.NDArray[Any] = np.array(texts, object)
    _mark(group.create_dataset(name, data=values, dtype=TEXT), "string-array")
