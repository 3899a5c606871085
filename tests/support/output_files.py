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
from esm_packed.outputs import Per, per_of
from esm_packed.rows import row_counts
from esm_packed.runners.output.layout import FORMAT, FORMAT_VERSION, PROBLEM
from esm_packed.runners.output.names import KINDS, PARTS, RAGGED, STARTS, TOKENS_OF, datasets_of
from esm_packed.runners.output.parts import PART, PART_FORMAT
from esm_packed.runners.state.plan import plan_hash

IDENTITY = {"inputs": [{"size": 3, "sha256": "ab"}], "dtype": "fp32"}
LAYERS = (1, 6)
HIDDEN_SIZE = 8
IDS = ("a", "päf", "failed", "absent", "same as a", "long", "last")
_STATUS = (0, 1, 2, 3, 0, 0, 0)
_EMBEDDED_LENGTHS = (3, 5, 4, 6, 3, 9, 1)
_STARTS: dict[Per, tuple[int, ...]] = {
    "residue": (0, 3, 8, -1, 0, 12, 21),
    "pair": (0, 6, 21, -1, 0, 31, 76),
}
_NUM_ROWS: dict[Per, int] = {"sequence": len(IDS), "residue": 22, "pair": 77}
FAILED_REASON = "NaN in FP32, too"
ABSENT_REASON = "its shard is missing"


@dataclass(frozen=True)
class Output:
    """What was written.

    Args:
        path: the output; its parts are in `folder`.
        ids: (n,) of sequences: computed, recomputed, failed, not computed, equal to the first, cut, computed.
        status, lengths: (n,) columns; `lengths` are those embedded.
        starts: (n,) columns, by what a row is for.
        values: rows of each data set.
    """

    path: Path
    folder: Path
    ids: list[str]
    status: np.ndarray
    lengths: np.ndarray
    starts: dict[Per, np.ndarray]
    values: dict[str, np.ndarray]

    def value(self, dataset: str, sequence: int) -> np.ndarray:
        """What there is of a sequence, as `EmbeddingReader.value` gives it."""
        rows, per, length = self.values[dataset], per_of(dataset), int(self.lengths[sequence])
        if per == "sequence":
            return np.asarray(rows[sequence])
        start = self.starts[per][sequence]
        if per == "residue":
            return rows[start : start + length] if start >= 0 else np.full((length, rows.shape[1]), np.nan)
        matrix = np.full((length, length), np.nan, rows.dtype)
        if start >= 0:
            upper = np.triu_indices(length)
            matrix[upper] = matrix.T[upper] = rows[start : start + len(upper[0])]
        return matrix


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
    number = np.repeat(np.arange(repeats), len(IDS))
    starts = {per: np.tile(each, repeats) for per, each in _STARTS.items()}
    output = Output(
        path=path,
        folder=path.with_name(f"{path.name}.parts") / "1a2b3c4d",
        ids=[name + f".{number}" * (number > 0) for number in range(repeats) for name in IDS],
        status=np.tile(np.array(_STATUS, np.uint8), repeats),
        lengths=np.tile(np.array(_EMBEDDED_LENGTHS, np.int32), repeats),
        starts={per: np.where(each < 0, -1, each + number * _NUM_ROWS[per]) for per, each in starts.items()},
        values={},
    )
    rng = np.random.default_rng(0)
    ragged = [name for kind, _, name in datasets_of(kinds, LAYERS) if kind in RAGGED]
    for kind, _, name in datasets_of(kinds, LAYERS):
        is_flat = kind in ("unmasked_nll", "contacts")
        columns = () if is_flat else (len(TOKENS_OF.get(kind, range(HIDDEN_SIZE))),)
        rows = rng.standard_normal((repeats * _NUM_ROWS[per_of(kind)], *columns))
        output.values[name] = rows.astype("float32" if kind == "unmasked_nll" else store_dtype)
        for sequence in range(len(output.ids)):
            if name not in ragged and output.status[sequence] >= 2:
                output.values[name][sequence] = np.nan
            elif output.status[sequence] == 2:
                start = output.starts[per_of(kind)][sequence]
                count = row_counts(output.lengths)[per_of(kind)][sequence]
                output.values[name][start : start + count] = np.nan
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
    for per in {per_of(kind) for kind in kinds if kind in RAGGED}:
        file[STARTS[per]] = output.starts[per].astype(np.int64)


def _write_parts(
    file: h5py.File, output: Output, names: list[str], num_parts: int, options: dict[str, Any]
) -> None:
    """Cut the rows between sequences, one of each part, the rest of the last one."""
    output.folder.mkdir(parents=True)
    bounds: dict[Per, list[tuple[int, int]]] = {}
    for per in dict.fromkeys(map(per_of, names)):
        starts = output.starts[per]
        begins = np.unique(starts[starts >= 0])[:num_parts].tolist()
        assert len(begins) == num_parts
        num_rows = len(next(output.values[name] for name in names if per_of(name) == per))
        bounds[per] = list(pairwise([*begins, num_rows]))
    paths = [output.folder / f"{number:05d}.h5" for number in range(num_parts)]
    for number, path in enumerate(paths):
        with h5py.File(path, "w") as part:
            part.attrs["format"] = PART_FORMAT
            part.attrs["plan_hash"] = plan_hash(IDENTITY)
            for name in names:
                rows = output.values[name][slice(*bounds[per_of(name)][number])]
                part.create_dataset(name, data=rows, **options)
    folder = str(output.folder.relative_to(output.path.parent))
    file.attrs["parts"] = folder
    for per, each in bounds.items():
        records = [
            (path.name, path.stat().st_size, begin, end - begin)
            for path, (begin, end) in zip(paths, each, strict=True)
        ]
        file.create_dataset(PARTS[per], data=np.array(records, dtype=PART))
    for name in names:
        rows = output.values[name]
        layout = h5py.VirtualLayout(rows.shape, rows.dtype)
        for path, (begin, end) in zip(paths, bounds[per_of(name)], strict=True):
            shape = (end - begin, *rows.shape[1:])
            layout[begin:end] = h5py.VirtualSource(f"{folder}/{path.name}", name, shape, rows.dtype)
        file.create_virtual_dataset(name, layout)
