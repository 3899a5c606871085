"""Packs on a device: sent there, computed, and what they give taken back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from esm_packed.graphs import GraphedESM2
from esm_packed.layouts import Layout
from esm_packed.model import ESM2
from esm_packed.packing import PackedBatch
from esm_packed.runners.state.shard import Rows
from esm_packed.runners.watch.metrics import StageTimes


@dataclass
class Launched:
    """A pack on its way.

    Args:
        rows: layer to what it gives, on the host; on a GPU they may not have arrived yet.
        events: before and after copying to the device, computing, and copying back.
    """

    rows: dict[int, torch.Tensor]
    events: tuple[torch.cuda.Event, ...] = ()


@dataclass(frozen=True)
class _Streams:
    """Of a GPU: packs go there, and results come back, while others are computed."""

    to_device: torch.cuda.Stream
    compute: torch.cuda.Stream
    to_host: torch.cuda.Stream

    @classmethod
    def of(cls, device: torch.device) -> _Streams:
        to_device, to_host = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        return cls(to_device, torch.cuda.current_stream(device), to_host)


class Device:
    """The device of a model.

    Args:
        model: computes.
        layers: to keep.
        layout: of the packs.
        cuda_graphs: replay packs as CUDA graphs.
        times: seconds of `computing` and `copying` are added to it.
    """

    def __init__(
        self, model: ESM2, layers: Sequence[int], layout: Layout, cuda_graphs: bool, times: StageTimes
    ) -> None:
        self._device = model.device
        self._layers = list(layers)
        self._computing = GraphedESM2(model) if cuda_graphs else layout.prepare(model)
        self._streams = _Streams.of(model.device) if model.device.type == "cuda" else None
        self._times = times

    def launch(self, batch: PackedBatch) -> Launched:
        """Begin to compute a pack; on a CPU it is computed when this returns."""
        if self._streams is None:
            begin = time.monotonic()
            rows = self._computing.embed_packed(batch, self._layers)
            self._times.computing += time.monotonic() - begin
            return Launched(rows)
        streams = self._streams
        events = tuple(
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(6)
        )
        going, gone, start, end, returning, returned = events
        with torch.cuda.stream(streams.to_device):
            going.record()
            batch = batch.to(self._device, non_blocking=True)
            gone.record()
        streams.compute.wait_event(gone)
        for tensor in (batch.input_ids, batch.cu_seqlens):
            tensor.record_stream(streams.compute)
        start.record(streams.compute)
        on_device = self._computing.embed_packed(batch, self._layers)
        end.record(streams.compute)
        streams.to_host.wait_event(end)
        with torch.cuda.stream(streams.to_host):
            returning.record()
            rows = {layer: values.to("cpu", non_blocking=True) for layer, values in on_device.items()}
            returned.record()
        for values in on_device.values():
            values.record_stream(streams.to_host)
        return Launched(rows, events)

    def take_back(self, launched: Launched, store_dtype: np.dtype[Any]) -> dict[int, Rows]:
        """Wait for a pack; layer to (n, hidden_size), as it is stored."""
        if launched.events:
            going, gone, start, end, returning, returned = launched.events
            returned.synchronize()
            self._times.computing += start.elapsed_time(end) / 1000
            self._times.copying += (going.elapsed_time(gone) + returning.elapsed_time(returned)) / 1000
        begin = time.monotonic()
        with np.errstate(over="ignore"):  # too large for FP16 becomes Inf, which is looked for later
            rows = {layer: each.numpy().astype(store_dtype) for layer, each in launched.rows.items()}
        self._times.copying += time.monotonic() - begin
        return rows

    def free_memory(self) -> None:
        """Give back what is held for later."""
        if self._streams is not None:
            torch.cuda.empty_cache()

    def memory_and_utilization(self) -> tuple[int | None, int | None]:
        """Bytes allocated, and percent of the time in use; None where the device does not say."""
        if self._streams is None:
            return None, None
        with suppress(Exception):  # the library that knows is not always there, nor always right
            return torch.cuda.memory_allocated(self._device), torch.cuda.utilization(self._device)
        return torch.cuda.memory_allocated(self._device), None
