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

from esm_packed.alphabet import TOKENS
from esm_packed.runners.output.layout import FORMAT, FORMAT_VERSION, PROBLEM
from esm_packed.runners.output.names import KINDS, RAGGED, TOKENS_OF, datasets_of
from esm_packed.runners.output.parts import PART, PART_FORMAT
from esm_packed.runners.state.plan import plan_hash

IDENTITY = {"inputs": [{"size": 3, "sha256": "ab"}], "dtype": "fp32"}
LAYERS = (1, 6)
HIDDEN_SIZE = 8
IDS = ("a", "päf", "failed", "absent", "same as a", "long", "last")
_STATUS = (0, 1, 2, 3, 0, 0, 0)
_EMBEDDED_LENGTHS = (3, 5, 4, 6, 3, 9, 1)
_STARTS = (0, 3, 8, -1, 0, 12, 21)
_NUM_ROWS = 22
FAILED_REASON = "NaN in FP32, too"
ABSENT_REASON = "its shard is missing"


@dataclass(frozen=True)
class Output:
    """What was written.

    Args:
        path: the output; its parts are in `folder`.
        ids: (n,) of sequences: computed, recomputed, failed, not computed, equal to the first, cut, computed.
        status, lengths, starts: (n,) columns; `lengths` are those embedded.
        values: rows of each data set.
    """

    path: Path
    folder: Path
    ids: list[str]
    status: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    values: dict[str, np.ndarray]

    def value(self, dataset: str, sequence: int) -> np.ndarray:
        """What there is of a sequence, as `EmbeddingReader.value` gives it."""
        rows = self.values[dataset]
        if len(rows) == len(self.ids):
            return np.asarray(rows[sequence])
        start, length = self.starts[sequence], self.lengths[sequence]
        return rows[start : start + length] if start >= 0 else np.full((length, rows.shape[1]), np.nan)


def write_output(
    path: Path,
    kinds: Sequence[str] = KINDS,
    *,
    num_parts: int = 0,
    repeats: int = 1,
    store_dtype: str = "float32",
    options: dict[str, Any] | None = None,
    change: Callable[[h5py.File], None] | None = None,
) -> Output:
    """Write an output of `kinds`, the ragged ones in parts if there are any.

    Args:
        path: the output.
        kinds: of what.
        num_parts: at most 5 for each of the `repeats`, or 0 for a single file.
        repeats: how often there are the sequences `IDS`, from the second time on as `a.1` and so on.
        store_dtype: "float32" or "float16".
        options: of h5py's `create_dataset`, for the values.
        change: called with the open file at the end.
    """
    offsets = np.repeat(np.arange(repeats), len(IDS)) * _NUM_ROWS
    starts = np.tile(_STARTS, repeats)
    output = Output(
        path=path,
        folder=path.with_name(f"{path.name}.parts") / "1a2b3c4d",
        ids=[name + f".{number}" * (number > 0) for number in range(repeats) for name in IDS],
        status=np.tile(np.array(_STATUS, np.uint8), repeats),
        lengths=np.tile(np.array(_EMBEDDED_LENGTHS, np.int32), repeats),
        starts=np.where(starts < 0, -1, starts + offsets),
        values={},
    )
    rng = np.random.default_rng(0)
    ragged = [name for kind, _, name in datasets_of(kinds, LAYERS) if kind in RAGGED]
    for kind, _, name in datasets_of(kinds, LAYERS):
        columns = () if kind == "unmasked_nll" else (len(TOKENS_OF.get(kind, range(HIDDEN_SIZE))),)
        rows = rng.standard_normal((repeats * _NUM_ROWS if name in ragged else len(output.ids), *columns))
        output.values[name] = rows.astype("float32" if kind == "unmasked_nll" else store_dtype)
        for sequence in range(len(output.ids)):
            if name not in ragged and output.status[sequence] >= 2:
                output.values[name][sequence] = np.nan
            elif output.status[sequence] == 2:
                output.value(name, sequence)[:] = np.nan
    with h5py.File(path, "w") as file:
        _write_columns(file, output, kinds)
        for name, rows in output.values.items():
            if not num_parts or name not in ragged:
                file.create_dataset(name, data=rows, **options or {})
        if num_parts:
            _write_parts(file, output, ragged, num_parts, options or {})
        if "logits" in kinds:
            file["logits"].attrs["tokens"] = list("LAGVSERTIDPKQNFYMHWC")
        if "logits_all" in kinds:
            file["logits_all"].attrs["tokens"] = list(TOKENS)
        if change is not None:
            change(file)
    return output


def _write_columns(file: h5py.File, output: Output, kinds: Sequence[str]) -> None:
    text = h5py.string_dtype()
    is_cut = np.array([name.startswith("long") for name in output.ids])
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["layers"] = np.array(LAYERS, np.int32)
    file.attrs["kinds"] = np.array(kinds, text)
    file.attrs["plan_hash"] = plan_hash(IDENTITY)
    file.attrs["model_name"] = "m"
    file.create_dataset("sequence_ids", data=np.array(output.ids, object), dtype=text)
    file["lengths"] = output.lengths + 2 * is_cut.astype(np.int32)
    file["embedded_lengths"] = output.lengths
    file["truncated"] = is_cut
    file["status"] = output.status
    file["modified"] = np.zeros(len(output.ids), np.uint8)
    problems = [
        ("failed", "in.fasta", 9, "the same ID as in in.fasta, line 5"),
        ("failed", "", 0, FAILED_REASON),
        ("absent", "", 0, ABSENT_REASON),
    ]
    file.create_dataset("problems", data=np.array(problems, dtype=PROBLEM))
    plan = {"identity": IDENTITY, "input_names": ["in.fasta"]}
    file.create_dataset("plan", data=json.dumps(plan), dtype=text)
    if any(kind in RAGGED for kind in kinds):
        file["starts"] = output.starts.astype(np.int64)


def _write_parts(
    file: h5py.File, output: Output, names: list[str], num_parts: int, options: dict[str, Any]
) -> None:
    """Cut the rows between sequences, one of each part, the rest of the last one."""
    output.folder.mkdir(parents=True)
    num_rows = len(output.values[names[0]])
    begins = np.unique(output.starts[output.starts >= 0])[:num_parts].tolist()
    assert len(begins) == num_parts
    records = []
    for number, (begin, end) in enumerate(pairwise([*begins, num_rows])):
        path = output.folder / f"{number:05d}.h5"
        with h5py.File(path, "w") as part:
            part.attrs["format"] = PART_FORMAT
            part.attrs["plan_hash"] = plan_hash(IDENTITY)
            for name in names:
                part.create_dataset(name, data=output.values[name][begin:end], **options)
        records.append((path.name, path.stat().st_size, begin, end - begin))
    folder = str(output.folder.relative_to(output.path.parent))
    file.attrs["parts"] = folder
    file.create_dataset("parts", data=np.array(records, dtype=PART))
    for name in names:
        rows = output.values[name]
        layout = h5py.VirtualLayout(rows.shape, rows.dtype)
        for part_name, _, begin, count in records:
            source = h5py.VirtualSource(f"{folder}/{part_name}", name, (count, rows.shape[1]), rows.dtype)
            layout[begin : begin + count] = source
        file.create_virtual_dataset(name, layout)
