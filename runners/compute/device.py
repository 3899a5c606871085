"""Sends packs to a device, computes them and copies the results back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.graphs import GraphedESM2
from esm_packed.layouts import Layout
from esm_packed.model import ESM2
from esm_packed.outputs import is_ragged, per_of
from esm_packed.packing import PackedBatch
from esm_packed.readout import FINITE
from esm_packed.runners.state.shard import Rows
from esm_packed.runners.watch.metrics import StageTimes


@dataclass
class Launched:
    """A launched pack.

    Args:
        rows: outputs by name, on the host; with a GPU they may not have arrived yet.
        events: before and after copying to the device, computing, and copying back.
    """

    rows: dict[str, torch.Tensor]
    events: tuple[torch.cuda.Event, ...] = ()


@dataclass(frozen=True)
class _Streams:
    """Streams of a GPU: packs and results are copied while other packs are computed."""

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
        model: the model.
        layout: layout of the packs.
        cuda_graphs: replay packs as CUDA graphs.
        times: seconds of `computing` and `copying` are added to it.
    """

    def __init__(self, model: ESM2, layout: Layout, cuda_graphs: bool, times: StageTimes) -> None:
        self._device = model.device
        self._computing = GraphedESM2(model) if cuda_graphs else layout.prepare(model)
        self._streams = _Streams.of(model.device) if model.device.type == "cuda" else None
        self._times = times

    def launch(
        self, batch: PackedBatch, names: Sequence[str], residue_dtype: torch.dtype | None = None
    ) -> Launched:
        """Start computing a pack; on a CPU it is finished when this returns.

        Args:
            batch: the pack.
            names: names of the outputs.
            residue_dtype: dtype of ragged outputs; None for the one they are computed in.
        """
        if self._streams is None:
            begin = time.monotonic()
            rows = self._computing.embed_packed(batch, names, residue_dtype)
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
        for tensor in (batch.input_ids, batch.cu_seqlens, batch.rows):
            if tensor is not None:
                tensor.record_stream(streams.compute)
        start.record(streams.compute)
        on_device = self._computing.embed_packed(batch, names, residue_dtype)
        end.record(streams.compute)
        streams.to_host.wait_event(end)
        with torch.cuda.stream(streams.to_host):
            returning.record()
            rows = {name: values.to("cpu", non_blocking=True) for name, values in on_device.items()}
            returned.record()
        for values in on_device.values():
            values.record_stream(streams.to_host)
        return Launched(rows, events)

    def take_back(
        self, launched: Launched, residue_bounds: npt.NDArray[np.int32], dtypes: Mapping[str, str]
    ) -> tuple[dict[str, Rows], npt.NDArray[np.bool_]]:
        """Wait for a pack.

        Args:
            launched: the pack.
            residue_bounds: bounds of its n sequences, as in `PackedBatch`.
            dtypes: dtypes of the outputs by name.

        Returns:
            Outputs by name, (rows of all sequences, columns), and a mask (n,) of the finite sequences.
        """
        if launched.events:
            going, gone, start, end, returning, returned = launched.events
            returned.synchronize()
            self._times.computing += start.elapsed_time(end) / 1000
            self._times.copying += (going.elapsed_time(gone) + returning.elapsed_time(returned)) / 1000
        begin = time.monotonic()
        with np.errstate(over="ignore"):  # overflow in FP16 gives Inf, which is checked for later
            rows = {
                name: _as_stored(name, launched.rows[name], residue_bounds, dtypes[name]) for name in dtypes
            }
        finite = np.ones(len(residue_bounds), np.bool_)
        if FINITE in launched.rows:
            finite &= launched.rows[FINITE].numpy()
        for name, values in rows.items():
            if not is_ragged(name):
                finite &= np.isfinite(values).all(axis=1)
        self._times.copying += time.monotonic() - begin
        return rows, finite

    def free_memory(self) -> None:
        """Release cached GPU memory."""
        if self._streams is not None:
            torch.cuda.empty_cache()

    def memory_and_utilization(self) -> tuple[int | None, int | None]:
        """Allocated bytes and utilization in percent; None where the device does not report them."""
        if self._streams is None:
            return None, None
        with suppress(Exception):  # the library that reports it may be missing or wrong
            return torch.cuda.memory_allocated(self._device), torch.cuda.utilization(self._device)
        return torch.cuda.memory_allocated(self._device), None


def _as_stored(name: str, tensor: torch.Tensor, residue_bounds: npt.NDArray[np.int32], dtype: str) -> Rows:
    """An output as it is stored; of an output with a row per token, only the rows of residues."""
    values = tensor.numpy()
    if per_of(name) != "residue":
        return values.astype(dtype)
    rows = np.empty(((residue_bounds[:, 1] - residue_bounds[:, 0]).sum(), values.shape[1]), dtype)
    start = 0
    for first, last in residue_bounds.tolist():
        rows[start : start + last - first] = values[first:last]
        start += last - first
    return rows
