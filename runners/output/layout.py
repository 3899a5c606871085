"""The datasets of an output: names, types, chunks and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import h5py
import numpy as np

from esm_packed.outputs import Per
from esm_packed.runners.state.shard import Array, Comparison, arrays_bytes

FORMAT = "esm-packed"
FORMAT_VERSION = 1
TEXT = h5py.string_dtype()
PROBLEM = np.dtype([("sequence_id", TEXT), ("file", TEXT), ("line", np.int64), ("reason", TEXT)])
COMPARISON = np.dtype(
    [("sequence_id", TEXT), ("cosine", "f8"), ("max_error", "f8"), ("relative_error", "f8")]
)
HASH = np.dtype("S32")
COLUMN_KINDS = {
    "lengths": "i4",
    "embedded_lengths": "i4",
    "truncated": "b1",
    "status": "u1",
    "modified": "u1",
}


CHUNK_BYTES = 1 << 18
"""Chunk size of compressed datasets: about one protein's residues, so reading it decompresses little else."""
RECORDS_IN_CHUNK = 1024
_REFERENCE_BYTES = 16
"""Size of a string's entry in a dataset, which refers to the string in a heap."""
_HEAP_BYTES = 20
"""Overhead of a string in a heap: 16, plus half of the 8 to which its size is rounded up."""
_EMPTY_FILE_BYTES = 24_000


class StoredProblem(NamedTuple):
    """A record that has no embedding, or only a row of NaN, and why."""

    sequence_id: str
    file: str
    line: int
    reason: str


class StoredComparison(NamedTuple):
    """A sampled sequence and how its embedding compares with FP32."""

    sequence_id: str
    comparison: Comparison


def output_bytes(
    num_sequences: int,
    mean_id_bytes: float,
    arrays: Sequence[Array],
    num_rows: Mapping[Per, int],
    *,
    problems: Sequence[Sequence[object]] = (),
    num_compared: int = 0,
) -> int:
    """Estimate the size of an uncompressed output file in bytes, to within 10% plus 32 kB.

    Args:
        num_sequences: number of sequences in the input.
        mean_id_bytes: mean size of a sequence ID in bytes of UTF-8.
        arrays: the arrays kept.
        num_rows: number of rows of the ragged arrays, by what a row stands for.
        problems: records left out, each as the fields of a `StoredProblem`.
        num_compared: number of sequences compared with FP32.
    """

    def chunked(rows: int, row_bytes: int) -> int:
        return math.ceil(rows / RECORDS_IN_CHUNK) * RECORDS_IN_CHUNK * row_bytes

    row_bytes = [np.dtype(dtype).itemsize for dtype in COLUMN_KINDS.values()]
    row_bytes += [_REFERENCE_BYTES, HASH.itemsize]
    row_bytes += [np.dtype(np.int64).itemsize for _ in {array.per for array in arrays if array.is_ragged}]
    num_ids = num_sequences + num_compared
    texts = [field for problem in problems for field in problem if isinstance(field, str)]
    return (
        _EMPTY_FILE_BYTES
        + num_sequences * sum(row_bytes)
        + arrays_bytes(arrays, {**num_rows, "sequence": num_sequences})
        + chunked(len(problems), 3 * _REFERENCE_BYTES + 8)
        + chunked(num_compared, _REFERENCE_BYTES + 3 * 8)
        + num_ids * _HEAP_BYTES
        + math.ceil(num_ids * mean_id_bytes)
        + sum(_HEAP_BYTES + len(text.encode("utf-8", "replace")) for text in texts)
    )
