"""One device at work: records are read ahead, packs computed one behind the other, shards written aside.

    reader thread   reads residues, plans packs, lays them end to end in pinned memory
    this thread     sends packs to the device, computes, takes results back
    writer thread   writes finished shards

The queues between them are short, so memory stays bounded; whichever stage is slowest, the others wait for
it, and the time each spends at work tells which one it was. On a GPU packs and results travel on streams of
their own; the device is waited for once per pack, for a result one pack old, while it computes the next.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.errors import UsageError
from esm_packed.graphs import GraphedESM2
from esm_packed.layouts import LAYOUTS, Layout
from esm_packed.model import ESM2
from esm_packed.numerics import is_out_of_memory
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch, pack
from esm_packed.rescue import Rescue
from esm_packed.runners.state.run import ShardInput
from esm_packed.runners.state.shard import (
    STATUS_COMPUTED,
    STATUS_FAILED,
    STATUS_RECOMPUTED,
    Comparison,
    Shard,
)
from esm_packed.runners.system.memory import page_rows
from esm_packed.runners.watch.metrics import SHARDS_AHEAD, Snapshot, StageTimes

PACKS_AHEAD = 4
PACKS_IN_FLIGHT = 2
POLL_SECONDS = 1.0
"""How often a thread that waits looks whether the other one is still there."""

_Item = TypeVar("_Item")

TokenIds = npt.NDArray[np.uint8]


class _Done:
    """Marks the end of a queue, and carries what went wrong."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


@dataclass
class _Progress:
    """A shard while it is computed."""

    shard: ShardInput
    rows: dict[int, npt.NDArray[np.floating[Any]]]
    status: npt.NDArray[np.uint8]
    packs_left: int
    reasons: dict[int, str] = field(default_factory=dict)
    comparisons: dict[int, Comparison] = field(default_factory=dict)


@dataclass
class _Pack:
    progress: _Progress
    members: npt.NDArray[np.int64]
    batch: PackedBatch


@dataclass
class _InFlight:
    pack: _Pack
    rows: dict[int, torch.Tensor]
    events: tuple[torch.cuda.Event, ...] = ()
    """Before and after copying to the device, computing, and copying back."""


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


class Pipeline:
    """Embeds shards on the device of `model`.

    Args:
        model: computes.
        layers: to keep.
        store_dtype: of the embeddings, "float32" or "float16".
        token_budget: tokens in a pack.
        in_fp32: loads the model in FP32, for sequences whose embedding is not finite and for those that are
            compared; called at most once. None where the model computes in FP32 or better already.
        on_pack: told of residues as a pack of them is done.
        layout: one of `LAYOUTS`.
        cuda_graphs: replay packs of the layout `fixed` as CUDA graphs; on a GPU.
    """

    def __init__(
        self,
        model: ESM2,
        layers: Sequence[int],
        store_dtype: str,
        token_budget: int,
        in_fp32: Callable[[], ESM2] | None = None,
        on_pack: Callable[[int], None] = lambda residues: None,
        layout: Layout = LAYOUTS["packed"],
        cuda_graphs: bool = False,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.store_dtype = np.dtype(store_dtype)
        self.token_budget = token_budget
        self.times = StageTimes()
        self._rescue = Rescue(in_fp32)
        self._on_pack = on_pack
        self._layout = layout
        self._computing = GraphedESM2(model) if cuda_graphs else layout.prepare(model)
        self._streams = _Streams.of(model.device) if model.device.type == "cuda" else None
        self._stopping = threading.Event()
        self._packs: queue.Queue[_Pack | _Progress | _Done] = queue.Queue(PACKS_AHEAD)
        self._finished: queue.Queue[tuple[int, Shard] | _Done] = queue.Queue(SHARDS_AHEAD)
        self._began: float | None = None
        self._shard: int | None = None

    def run(self, shards: Iterable[ShardInput], write: Callable[[int, Shard], None]) -> None:
        """Compute `shards` in their order.

        Args:
            shards: drawn from in the reader thread, a few packs ahead.
            write: called in the writer thread with the number of a shard and what it gave.

        Raises:
            Exception: whatever `shards` or `write` raised; shards not yet handed to `write` are dropped.
        """
        self._began = time.monotonic()
        packs = self._packs = queue.Queue(PACKS_AHEAD)
        finished = self._finished = queue.Queue(SHARDS_AHEAD)
        failure: list[BaseException] = []
        self._stopping.clear()
        reader = threading.Thread(target=self._read, args=(shards, packs), name="reader", daemon=True)
        writer = threading.Thread(
            target=self._write, args=(finished, write, failure), name="writer", daemon=True
        )
        try:
            reader.start()
            writer.start()
            self._compute(packs, reader, finished, writer, failure)
        finally:
            self._stopping.set()
            while reader.is_alive():
                with suppress(queue.Empty):
                    packs.get(timeout=0.05)
            with suppress(MemoryError):  # its own error, or the one below, says more
                _put(finished, _Done(), writer)
            if writer.ident is not None:
                writer.join()
            self.times.wall += time.monotonic() - self._began
            self._began = self._shard = None
        if failure:
            raise failure[0]
        if not finished.empty():
            raise _died(writer)

    def snapshot(self) -> Snapshot:
        """Where the work is; may be called from any thread."""
        times = replace(self.times)
        if (began := self._began) is not None:
            times.wall += time.monotonic() - began
        memory = utilization = None
        if self._streams is not None:
            memory = torch.cuda.memory_allocated(self.model.device)
            with suppress(Exception):  # the library that knows is not always there, nor always right
                utilization = torch.cuda.utilization(self.model.device)
        return Snapshot(times, self._shard, self._packs.qsize(), self._finished.qsize(), memory, utilization)

    def _read(self, shards: Iterable[ShardInput], packs: queue.Queue[_Pack | _Progress | _Done]) -> None:
        try:
            for pack_ready in self._make_packs(shards):
                packs.put(pack_ready)
                if self._stopping.is_set():
                    return
        except BaseException as error:
            packs.put(_Done(error))
        else:
            packs.put(_Done())

    def _make_packs(self, shards: Iterable[ShardInput]) -> Iterator[_Pack | _Progress]:
        begin = time.monotonic()
        for shard in shards:
            lengths = np.fromiter(map(len, shard.token_ids), np.int64, len(shard.token_ids))
            members_of = self._layout.plan(lengths + SPECIAL_TOKENS, self.token_budget)
            shape = (len(lengths), self.model.config.hidden_size)
            progress = _Progress(
                shard,
                {layer: page_rows(shape, self.store_dtype) for layer in self.layers},
                np.full(len(lengths), STATUS_COMPUTED, np.uint8),
                len(members_of),
            )
            if not members_of:
                yield progress  # copies only: there is nothing to compute
            for members in members_of:
                batch = self._lay_out(shard, members)
                self.times.reading += time.monotonic() - begin
                yield _Pack(progress, members, batch)
                begin = time.monotonic()
        self.times.reading += time.monotonic() - begin

    def _lay_out(self, shard: ShardInput, members: npt.NDArray[np.int64]) -> PackedBatch:
        token_ids = [shard.token_ids[member] for member in members.tolist()]
        batch = self._layout.lay_out(token_ids, self.token_budget)
        if self.model.device.type != "cuda":
            return batch
        return replace(
            batch, input_ids=batch.input_ids.pin_memory(), cu_seqlens=batch.cu_seqlens.pin_memory()
        )

    def _compute(
        self,
        packs: queue.Queue[_Pack | _Progress | _Done],
        reader: threading.Thread,
        finished: queue.Queue[tuple[int, Shard] | _Done],
        writer: threading.Thread,
        failure: list[BaseException],
    ) -> None:
        in_flight: deque[_InFlight] = deque()

        def take_back() -> None:
            progress = self._take_back(in_flight.popleft())
            if progress is not None:
                _put(finished, (progress.shard.number, self._finish(progress)), writer)

        while not failure:
            self.times.packs_queued += packs.qsize()
            item = _take(packs, reader)
            if isinstance(item, _Done):
                if item.error is not None:
                    raise item.error
                break
            if isinstance(item, _Progress):
                while in_flight:
                    take_back()
                _put(finished, (item.shard.number, self._finish(item)), writer)
                continue
            self._shard = item.progress.shard.number
            for part in self._parts_that_fit(item, in_flight, take_back):
                in_flight.append(part)
                while len(in_flight) >= PACKS_IN_FLIGHT:
                    take_back()
        while in_flight and not failure:
            take_back()

    def _parts_that_fit(
        self, item: _Pack, in_flight: deque[_InFlight], take_back: Callable[[], None]
    ) -> Iterator[_InFlight]:
        """Start `item` on the device, in halves where its memory does not suffice."""
        try:
            launched = self._launch(item)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            launched = None
        if launched is not None:
            yield launched
            return
        while in_flight:
            take_back()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        is_within_budget = item.batch.total_tokens <= self.token_budget
        if self._layout.name == "fixed" and is_within_budget:
            raise UsageError(
                f"--reproducible: a pack of {item.batch.total_tokens:,} tokens does not fit into the memory "
                f"of {self.model.device}, and packs must not be halved; choose a smaller --token-budget"
            )
        self.times.num_halved += 1
        if len(item.members) == 1:
            self._fail_row(
                item.progress,
                int(item.members[0]),
                f"{item.batch.max_seqlen - SPECIAL_TOKENS:,} residues do not fit into the memory of "
                f"{self.model.device}; --max-length cuts such sequences",
            )
            yield _InFlight(item, {})
            return
        half = len(item.members) // 2
        item.progress.packs_left += 1
        for members in (item.members[:half], item.members[half:]):
            part = _Pack(item.progress, members, self._lay_out(item.progress.shard, members))
            yield from self._parts_that_fit(part, in_flight, take_back)

    def _launch(self, item: _Pack) -> _InFlight:
        if self._streams is None:
            begin = time.monotonic()
            rows = self._computing.embed_packed(item.batch, self.layers)
            self.times.computing += time.monotonic() - begin
            return _InFlight(item, rows)
        streams = self._streams
        events = tuple(
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(6)
        )
        going, gone, start, end, returning, returned = events
        with torch.cuda.stream(streams.to_device):
            going.record()
            batch = item.batch.to(self.model.device, non_blocking=True)
            gone.record()
        streams.compute.wait_event(gone)
        for tensor in (batch.input_ids, batch.cu_seqlens):
            tensor.record_stream(streams.compute)
        start.record(streams.compute)
        on_device = self._computing.embed_packed(batch, self.layers)
        end.record(streams.compute)
        streams.to_host.wait_event(end)
        with torch.cuda.stream(streams.to_host):
            returning.record()
            rows = {layer: values.to("cpu", non_blocking=True) for layer, values in on_device.items()}
            returned.record()
        for values in on_device.values():
            values.record_stream(streams.to_host)
        return _InFlight(item, rows, events)

    def _take_back(self, done: _InFlight) -> _Progress | None:
        """Put the rows of a pack into its shard; the shard if it is complete with that."""
        item, progress = done.pack, done.pack.progress
        if done.events:
            going, gone, start, end, returning, returned = done.events
            returned.synchronize()
            self.times.computing += start.elapsed_time(end) / 1000
            self.times.copying += (going.elapsed_time(gone) + returning.elapsed_time(returned)) / 1000
        begin = time.monotonic()
        for layer, rows in done.rows.items():
            with np.errstate(over="ignore"):  # too large for FP16 becomes Inf, which is looked for below
                progress.rows[layer][item.members] = rows.numpy()
        self.times.copying += time.monotonic() - begin
        self._check_finite(item)
        self._compare(item)
        residues = sum(len(progress.shard.token_ids[member]) for member in item.members.tolist())
        if done.rows:
            tokens = residues + SPECIAL_TOKENS * len(item.members)
            self.times.tokens += tokens
            self.times.residues += residues
            self.times.sequences += len(item.members)
            self.times.packs += 1
            if item.batch.total_tokens > self.token_budget:
                self.times.overlong_packs += 1
            else:
                self.times.tokens_in_budget += tokens
        self._on_pack(residues)
        progress.packs_left -= 1
        return progress if progress.packs_left == 0 else None

    def _check_finite(self, item: _Pack) -> None:
        progress = item.progress
        for member in item.members[~self._finite(progress, item.members)].tolist():
            if progress.status[member] == STATUS_FAILED:
                continue
            rescued, reason = self._rescue.replace(
                {layer: rows[member] for layer, rows in progress.rows.items()},
                partial(self._alone, progress.shard.token_ids[member]),
                f"dtype {self.model.precision}, stored as {self.store_dtype}",
            )
            progress.status[member] = STATUS_RECOMPUTED if rescued else STATUS_FAILED
            progress.reasons[member] = f"the embedding is {reason}"

    def _compare(self, item: _Pack) -> None:
        """Hold sampled rows against the same sequences in FP32, each on its own."""
        progress = item.progress
        for member in progress.shard.compared:
            if member not in item.members or progress.status[member] != STATUS_COMPUTED:
                continue
            try:
                alone = self._alone(progress.shard.token_ids[member], self._rescue.model or self.model)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                continue  # a row less to compare
            truth = alone[self.layers[-1]].astype(np.float64)
            row = progress.rows[self.layers[-1]][member].astype(np.float64)
            norms = float(np.linalg.norm(row)), float(np.linalg.norm(truth))
            progress.comparisons[member] = Comparison(
                cosine=float(row @ truth) / (norms[0] * norms[1]),
                max_error=float(np.abs(row - truth).max()),
                relative_error=float(np.linalg.norm(row - truth)) / norms[1],
            )

    def _alone(self, token_ids: TokenIds, model: ESM2) -> dict[int, npt.NDArray[np.float32]]:
        """Embeddings by layer of one sequence in a pack of its own."""
        rows_by_layer = model.embed_packed(pack([token_ids]).to(model.device), self.layers)
        return {layer: rows[0].cpu().numpy() for layer, rows in rows_by_layer.items()}

    def _finite(self, progress: _Progress, members: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        finite = np.ones(len(members), dtype=np.bool_)
        for rows in progress.rows.values():
            finite &= np.isfinite(rows[members]).all(axis=1)
        return finite

    def _fail_row(self, progress: _Progress, member: int, reason: str) -> None:
        progress.status[member] = STATUS_FAILED
        progress.reasons[member] = reason
        for rows in progress.rows.values():
            rows[member] = np.nan

    def _finish(self, progress: _Progress) -> Shard:
        return Shard(progress.status, progress.rows, progress.reasons, progress.comparisons)

    def _write(
        self,
        finished: queue.Queue[tuple[int, Shard] | _Done],
        write: Callable[[int, Shard], None],
        failure: list[BaseException],
    ) -> None:
        while not isinstance(item := finished.get(), _Done):
            if failure:
                continue
            begin = time.monotonic()
            try:
                write(*item)
            except BaseException as error:
                failure.append(error)
            self.times.writing += time.monotonic() - begin


def _put(items: queue.Queue[_Item], item: _Item, taker: threading.Thread) -> None:
    while True:
        with suppress(queue.Full):
            return items.put(item, timeout=POLL_SECONDS)
        if not taker.is_alive():
            raise _died(taker)


def _take(items: queue.Queue[_Item], giver: threading.Thread) -> _Item:
    while True:
        with suppress(queue.Empty):
            return items.get(timeout=POLL_SECONDS)
        if not giver.is_alive() and items.empty():
            raise _died(giver)


def _died(thread: threading.Thread) -> MemoryError:
    """What is left to say of a thread that could not even hand over its error."""
    return MemoryError(f"the {thread.name} thread has died")
