"""What a pipeline writes, read back shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import numpy as np

from esm_packed.outputs import layer_of, mean_of
from esm_packed.rows import row_counts
from esm_packed.runners.compute.pipeline import Pipeline
from esm_packed.runners.state.shard import (
    Array,
    Comparison,
    Rows,
    ShardInput,
    ShardReader,
    ShardShape,
    ShardWriter,
)


class Shard(NamedTuple):
    status: np.ndarray[Any, Any]
    embeddings: dict[int | None, Rows]
    reasons: dict[int, str]
    comparisons: Mapping[int, Comparison]


def mean_arrays(layers: Sequence[int], hidden_size: int, store_dtype: str = "float32") -> list[Array]:
    """Arrays of the mean embeddings of some layers."""
    return [Array(mean_of(layer), store_dtype, hidden_size) for layer in layers]


def read_all(reader: ShardReader, name: str) -> Rows:
    """All rows of an array."""
    array = reader.shape.arrays[name]
    blocks = [
        reader.block(array, start, stop, bytearray(reader.shape.block_bytes))
        for start, stop in reader.shape.blocks(array)
    ]
    return np.concatenate(blocks)


def run_pipeline(
    pipeline: Pipeline,
    inputs: Iterable[ShardInput],
    write: Callable[[int, Shard], object],
    arrays: Sequence[Array],
) -> None:
    """Run a pipeline; `write` is called in its writer thread with each shard, from a file that is whole."""
    shapes: dict[int, ShardShape] = {}

    def seen() -> Iterator[ShardInput]:
        for each in inputs:
            shapes[each.number] = ShardShape(arrays, row_counts(list(map(len, each.token_ids))))
            yield each

    @contextmanager
    def output(number: int) -> Iterator[ShardWriter]:
        with NamedTemporaryFile(buffering=0) as file:
            writer = ShardWriter(file, shapes[number])  # type: ignore[arg-type]
            yield writer
            writer.complete(number, "plan")
            with ShardReader(Path(file.name), number, "plan", shapes[number]) as reader:
                rows = {layer_of(array.name): read_all(reader, array.name) for array in arrays}
                reasons = {item: status.reason for item, status in reader.statuses.items()}
                write(number, Shard(reader.status, rows, reasons, reader.comparisons))

    pipeline.run(seen(), output)
