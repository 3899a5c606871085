"""The data sets of an output: names, types, chunks and sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import h5py
import numpy as np

from esm_packed.runners.state.shard import Comparison

FORMAT = "esm-packed"
FORMAT_VERSION = 1
TEXT = h5py.string_dtype()
PROBLEM = np.dtype([("sequence_id", TEXT), ("file", TEXT), ("line", np.int64), ("reason", TEXT)])
COMPARISON = np.dtype(
    [("sequence_id", TEXT), ("cosine", "f8"), ("max_error", "f8"), ("relative_error", "f8")]
)
COLUMN_KINDS = {
    "lengths": "i4",
    "embedded_lengths": "i4",
    "truncated": "b1",
    "status": "u1",
    "modified": "u1",
}


_CHUNK_BYTES = 1 << 18
RECORDS_IN_CHUNK = 1024
_REFERENCE_BYTES = 16
"""Of a text in a data set, which leads to the text in a heap."""
_HEAP_BYTES = 20
"""Of a text in a heap beside its own: 16, and half of the 8 it is rounded up to."""
_EMPTY_FILE_BYTES = 24_000


def chunk_rows(rows: int, row_bytes: int) -> int:
    return min(max(rows, 1), max(1, _CHUNK_BYTES // row_bytes))


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
    hidden_size: int,
    num_layers: int,
    store_dtype: str,
    *,
    problems: Sequence[Sequence[object]] = (),
    num_compared: int = 0,
) -> int:
    """Size of an output file in bytes, to within a tenth and 32 kB.

    Args:
        num_sequences: rows.
        mean_id_bytes: mean size of a sequence ID in bytes of UTF-8.
        hidden_size: columns of the embeddings.
        num_layers: layers kept.
        store_dtype: "float32" or "float16".
        problems: records left out, each as the fields of a `StoredProblem`.
        num_compared: sequences compared with FP32.
    """

    def columns(rows: int, chunk_rows: int, row_bytes: int) -> int:
        return math.ceil(rows / chunk_rows) * chunk_rows * row_bytes

    row_bytes = [np.dtype(dtype).itemsize for dtype in COLUMN_KINDS.values()]
    row_bytes += [hidden_size * np.dtype(store_dtype).itemsize] * num_layers
    num_ids = num_sequences + num_compared
    texts = [field for problem in problems for field in problem if isinstance(field, str)]
    return (
        _EMPTY_FILE_BYTES
        + sum(columns(num_sequences, chunk_rows(num_sequences, size), size) for size in row_bytes)
        + columns(num_sequences, chunk_rows(num_sequences, TEXT.itemsize), _REFERENCE_BYTES)
        + columns(len(problems), RECORDS_IN_CHUNK, 3 * _REFERENCE_BYTES + 8)
        + columns(num_compared, RECORDS_IN_CHUNK, _REFERENCE_BYTES + 3 * 8)
        + num_ids * _HEAP_BYTES
        + math.ceil(num_ids * mean_id_bytes)
        + sum(_HEAP_BYTES + len(text.encode("utf-8", "replace")) for text in texts)
    )
