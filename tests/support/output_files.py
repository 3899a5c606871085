"""Outputs of every kind, whole and in parts, written with h5py alone: the reader's truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from esm_packed.outputs import COLUMNS
from esm_packed.runners.output.layout import COMPARISON, FORMAT, FORMAT_VERSION, PROBLEM
from esm_packed.runners.output.names import KINDS, RAGGED, datasets_of
from esm_packed.runners.output.parts import PART, PART_FORMAT
from esm_packed.runners.state.plan import plan_hash

IDENTITY = {"inputs": [{"size": 3, "sha256": "ab"}], "dtype": "fp32"}
LAYERS = (1, 6)
HIDDEN_SIZE = 8
IDS = ("a", "päf", "failed", "absent", "same as a", "long", "last")
STATUS = (0, 1, 2, 3, 0, 0, 0)
EMBEDDED_LENGTHS = (3, 5, 4, 6, 3, 9, 1)
STARTS = (0, 3, 8, -1, 0, 12, 21)
NUM_ROWS = 22
FAILED_REASON = "NaN in FP32, too"


@dataclass(frozen=True)
class Output:
    """What was written: `values` are the rows of each data set, `folder` holds the parts."""

    path: Path
    values: dict[str, np.ndarray]
    folder: Path

    def residues(self, name: str, sequence: int) -> np.ndarray:
        """The rows of one sequence in a ragged data set; NaN if it was not computed."""
        start, length = STARTS[sequence], EMBEDDED_LENGTHS[sequence]
        rows = self.values[name]
        return rows[start : start + length] if start >= 0 else np.full((length, rows.shape[1]), np.nan)


def write_output(
    path: Path,
    kinds: Sequence[str] = KINDS,
    *,
    num_parts: int = 0,
    store_dtype: str = "float32",
    options: dict[str, Any] | None = None,
    change: Callable[[h5py.File], None] | None = None,
) -> Output:
    """Write `IDS` in all of `kinds`, the ragged ones in parts if there are any.

    Args:
        path: the output.
        kinds: of what.
        num_parts: at least 2, or 0 for a single file.
        store_dtype: "float32" or "float16".
        options: of h5py's `create_dataset`, for the values.
        change: called with the open file at the end.
    """
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {}
    is_missing = np.isin(STATUS, (2, 3))
    for kind, name in datasets_of(kinds, LAYERS):
        columns = () if kind == "unmasked_nll" else (len(COLUMNS.get(kind, range(HIDDEN_SIZE))),)
        rows = rng.standard_normal((NUM_ROWS if kind in RAGGED else len(IDS), *columns))
        values[name] = rows.astype("float32" if kind == "unmasked_nll" else store_dtype)
        if kind in RAGGED:
            values[name][STARTS[2] : STARTS[2] + EMBEDDED_LENGTHS[2]] = np.nan
        else:
            values[name][is_missing] = np.nan
            values[name][4] = values[name][0]
    folder = path.with_name(f"{path.name}.parts") / "1a2b3c4d"
    ragged = [name for kind, name in datasets_of(kinds, LAYERS) if kind in RAGGED]
    with h5py.File(path, "w") as file:
        _write_columns(file, kinds)
        for name, rows in values.items():
            if not num_parts or name not in ragged:
                file.create_dataset(name, data=rows, **options or {})
        if num_parts:
            _write_parts(file, folder, {name: values[name] for name in ragged}, num_parts, options or {})
        if "logits" in kinds:
            file["logits"].attrs["tokens"] = "LAGVSERTIDPKQNFYMHWC"
        if "logits_all" in kinds:
            file["logits_all"].attrs["tokens"] = list(COLUMNS["logits_all"])
        if change is not None:
            change(file)
    return Output(path, values, folder)


def _write_columns(file: h5py.File, kinds: Sequence[str]) -> None:
    text = h5py.string_dtype()
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["layers"] = np.array(LAYERS, np.int32)
    file.attrs["kinds"] = np.array(kinds, text)
    file.attrs["plan_hash"] = plan_hash(IDENTITY)
    file.attrs["model_name"] = "m"
    file.create_dataset("sequence_ids", data=np.array(IDS, object), dtype=text)
    file["lengths"] = np.array(EMBEDDED_LENGTHS, np.int32) + np.array([0, 0, 0, 0, 0, 2, 0], np.int32)
    file["embedded_lengths"] = np.array(EMBEDDED_LENGTHS, np.int32)
    file["truncated"] = np.array([name == "long" for name in IDS])
    file["status"] = np.array(STATUS, np.uint8)
    file["modified"] = np.array([0, 0, 0, 0, 0, 0, 4], np.uint8)
    file.create_dataset(
        "problems",
        data=np.array([("x", "in.fasta", 9, "gap"), ("failed", "in.fasta", 5, FAILED_REASON)], dtype=PROBLEM),
    )
    file.create_dataset("fp32_compare", data=np.array([("a", 1.0, 0.0, 0.0)], dtype=COMPARISON))
    plan = {"identity": IDENTITY, "input_names": ["in.fasta"]}
    file.create_dataset("plan", data=json.dumps(plan), dtype=text)
    if any(kind in RAGGED for kind in kinds):
        file["starts"] = np.array(STARTS, np.int64)


def _write_parts(
    file: h5py.File, folder: Path, values: dict[str, np.ndarray], num_parts: int, options: dict[str, Any]
) -> None:
    """Cut the rows between sequences, one of each part, the rest of the last one."""
    folder.mkdir(parents=True)
    bounds = [*sorted({start for start in STARTS if start >= 0})[:num_parts], NUM_ROWS]
    records = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        part = folder / f"{number:05d}.h5"
        with h5py.File(part, "w") as part_file:
            part_file.attrs["format"] = PART_FORMAT
            part_file.attrs["plan_hash"] = plan_hash(IDENTITY)
            for name, rows in values.items():
                part_file.create_dataset(name, data=rows[begin:end], **options)
        records.append((part.name, part.stat().st_size, begin, end - begin))
    file.attrs["parts"] = str(folder.relative_to(Path(file.filename).parent))
    file.create_dataset("parts", data=np.array(records, dtype=PART))
    for name, rows in values.items():
        layout = h5py.VirtualLayout(rows.shape, rows.dtype)
        for part_name, _, begin, num_rows in records:
            place = f"{file.attrs['parts']}/{part_name}"
            layout[begin : begin + num_rows] = h5py.VirtualSource(
                place, name, (num_rows, *rows.shape[1:]), rows.dtype
            )
        file.create_virtual_dataset(name, layout)
