"""CUDA graphs: the hundreds of launches of a forward pass recorded once, and replayed as one.

Small models spend more time launching kernels than computing; a replay costs one launch. A graph serves one
shape, so it needs batches of the `fixed` layout; their numbers of segments and longest sequences are rounded
up to powers of two, which leaves a handful of shapes.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from esm_packed.model import ESM2
from esm_packed.outputs import is_ragged
from esm_packed.packing import PackedBatch

LEAST_MAX_SEQLEN = 64
WARM_UPS = 2


@dataclass(frozen=True)
class Shape:
    """Shape that a graph is recorded for: all sizes that kernels receive as numbers."""

    total_tokens: int
    num_segments: int
    max_seqlen: int
    names: tuple[str, ...]
    residue_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, batch: PackedBatch, names: Sequence[str], residue_dtype: torch.dtype | None = None) -> Shape:
        """The shape that serves `batch`."""
        return cls(
            batch.total_tokens,
            _power_of_two(batch.cu_seqlens.numel() - 1),
            min(batch.total_tokens, _power_of_two(max(batch.max_seqlen, LEAST_MAX_SEQLEN))),
            tuple(names),
            residue_dtype,
        )


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    rows: dict[str, torch.Tensor]


class GraphedESM2:
    """`ESM2.embed_packed`, replayed. A shape is recorded when it is first met.

    Args:
        model: on a GPU, with an attention backend that does not wait for the device.
    """

    def __init__(self, model: ESM2) -> None:
        self.model = model
        self._recorded: dict[Shape, _Recorded] = {}
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    @property
    def num_graphs(self) -> int:
        """Shapes recorded so far."""
        return len(self._recorded)

    def embed_packed(
        self, batch: PackedBatch, names: Sequence[str], residue_dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """As `ESM2.embed_packed`."""
        shape = Shape.of(batch, names, residue_dtype)
        if shape not in self._recorded:
            self._recorded[shape] = self._record(shape, batch)
        recorded = self._recorded[shape]
        load(recorded.batch, batch)
        recorded.graph.replay()
        # The next replay overwrites the rows.
        in_use = slice(batch.cu_seqlens.numel() - 1)
        return {
            name: (rows if is_ragged(name) else rows[in_use][batch.segments]).clone()
            for name, rows in recorded.rows.items()
        }

    def _record(self, shape: Shape, batch: PackedBatch) -> _Recorded:
        static = empty_batch(shape, batch)
        load(static, batch)
        stream = torch.cuda.current_stream(self.model.device)
        self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self.model.embed_packed(static, shape.names, shape.residue_dtype)
        stream.wait_stream(self._stream)
        gc.collect()  # freeing another model's graphs must not fall into the recording
        graph = torch.cuda.CUDAGraph()
        # Without a stream of this device's, the current device would be recorded, which may be another one.
        # Other threads pin memory meanwhile, which the default mode forbids. Replays follow each other on one
        # stream, so graphs may share their memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            rows = self.model.embed_packed(static, shape.names, shape.residue_dtype)
        self._pool = graph.pool()
        return _Recorded(graph, static, rows)


def empty_batch(shape: Shape, like: PackedBatch) -> PackedBatch:
    """A batch of `shape` on the device and with the dtypes of `like`, its contents undefined."""
    return PackedBatch(
        torch.empty_like(like.input_ids),
        like.cu_seqlens.new_empty(shape.num_segments + 1),
        shape.max_seqlen,
    )


def load(static: PackedBatch, batch: PackedBatch) -> None:
    """Copy `batch` into a batch of its `Shape`; the segments left over are empty ones at the end."""
    bounds = batch.cu_seqlens.numel()
    static.input_ids.copy_(batch.input_ids)
    static.cu_seqlens[:bounds].copy_(batch.cu_seqlens)
    static.cu_seqlens[bounds:].fill_(batch.total_tokens)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
