"""One device at work: records are read ahead, packs computed one behind the other, shards written aside.

    reader thread   reads residues, plans packs, lays them end to end in pinned memory
    this thread     sends packs to the device, computes, takes results back
    writer thread   writes finished shards

The queues between them are short, so memory stays bounded; whichever stage is slowest, the others wait for
it, and the time each spends at work tells which one it was. The device is waited for once per pack, for a
result that is one pack old, while it computes the next.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.model import ESM2
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch, pack, plan_packs
from esm_packed.runners.store import STATUS_COMPUTED, STATUS_FAILED, STATUS_RECOMPUTED, Shard

PACKS_AHEAD = 4
SHARDS_AHEAD = 2
PACKS_IN_FLIGHT = 2

TokenIds = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ShardInput:
    """What a shard computes: the residues of each of its records."""

    number: int
    token_ids: Sequence[TokenIds]


@dataclass
class StageTimes:
    """Seconds each stage was at work, and tokens computed."""

    reading: float = 0.0
    copying: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    wall: float = 0.0
    tokens: int = 0
    residues: int = 0
    sequences: int = 0
    pack_tokens: list[int] = field(default_factory=list)
    num_halved: int = 0

    def add(self, other: StageTimes) -> None:
        """Count what `other` measured, too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def describe(self) -> str:
        """Shares of the wall time, and which stage was at work for the longest."""
        stages = ("reading", "copying", "computing", "writing")
        wall = max(self.wall, 1e-9)
        shares = ", ".join(f"{stage} {getattr(self, stage) / wall:.0%}" for stage in stages)
        return f"{shares} of the time; {max(stages, key=lambda stage: getattr(self, stage))} was the slowest"


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
    """Before and after computing, and after the copies back."""


class Pipeline:
    """Embeds shards on the device of `model`.

    Args:
        model: computes.
        layers: to keep.
        store_dtype: of the embeddings, "float32" or "float16".
        token_budget: tokens in a pack.
        in_fp32: loads the model in FP32 for sequences whose embedding is not finite; called at most once.
            None where the model computes in FP32 or better already.
        on_residues: told of residues as they are computed.
    """

    def __init__(
        self,
        model: ESM2,
        layers: Sequence[int],
        store_dtype: str,
        token_budget: int,
        in_fp32: Callable[[], ESM2] | None = None,
        on_residues: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.store_dtype = np.dtype(store_dtype)
        self.token_budget = token_budget
        self.times = StageTimes()
        self._load_fp32 = in_fp32
        self._fp32_model: ESM2 | None = None
        self._on_residues = on_residues
        self._stopping = threading.Event()

    def run(self, shards: Iterable[ShardInput], write: Callable[[int, Shard], None]) -> None:
        """Compute `shards` in their order.

        Args:
            shards: drawn from in the reader thread, a few packs ahead.
            write: called in the writer thread with the number of a shard and what it gave.

        Raises:
            Exception: whatever `shards` or `write` raised; shards not yet handed to `write` are dropped.
        """
        begin = time.monotonic()
        packs: queue.Queue[_Pack | _Progress | _Done] = queue.Queue(PACKS_AHEAD)
        finished: queue.Queue[tuple[int, Shard] | _Done] = queue.Queue(SHARDS_AHEAD)
        failure: list[BaseException] = []
        self._stopping.clear()
        reader = threading.Thread(target=self._read, args=(shards, packs), name="reader", daemon=True)
        writer = threading.Thread(
            target=self._write, args=(finished, write, failure), name="writer", daemon=True
        )
        reader.start()
        writer.start()
        try:
            self._compute(packs, finished, failure)
        finally:
            self._stopping.set()
            while reader.is_alive():
                with suppress(queue.Empty):
                    packs.get(timeout=0.05)
            finished.put(_Done())
            writer.join()
            self.times.wall += time.monotonic() - begin
        if failure:
            raise failure[0]

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
            members_of = plan_packs(lengths + SPECIAL_TOKENS, self.token_budget)
            shape = (len(lengths), self.model.config.hidden_size)
            progress = _Progress(
                shard,
                {layer: np.empty(shape, self.store_dtype) for layer in self.layers},
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
        batch = pack([shard.token_ids[member] for member in members.tolist()])
        if self.model.device.type != "cuda":
            return batch
        return PackedBatch(batch.input_ids.pin_memory(), batch.cu_seqlens.pin_memory(), batch.max_seqlen)

    def _compute(
        self,
        packs: queue.Queue[_Pack | _Progress | _Done],
        finished: queue.Queue[tuple[int, Shard] | _Done],
        failure: list[BaseException],
    ) -> None:
        in_flight: deque[_InFlight] = deque()

        def take_back() -> None:
            progress = self._take_back(in_flight.popleft())
            if progress is not None:
                finished.put((progress.shard.number, self._finish(progress)))

        while not failure:
            item = packs.get()
            if isinstance(item, _Done):
                if item.error is not None:
                    raise item.error
                break
            if isinstance(item, _Progress):
                while in_flight:
                    take_back()
                finished.put((item.shard.number, self._finish(item)))
                continue
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
        except RuntimeError as error:
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
        begin = time.monotonic()
        device = self.model.device
        batch = item.batch.to(device, non_blocking=True)
        copied = time.monotonic()
        if device.type != "cuda":
            rows = self.model.embed_packed(batch, self.layers)
            self.times.copying += copied - begin
            self.times.computing += time.monotonic() - copied
            return _InFlight(item, rows)
        stream = torch.cuda.current_stream(device)
        start, end, copied_back = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        start.record(stream)
        on_device = self.model.embed_packed(batch, self.layers)
        end.record(stream)
        rows = {layer: values.to("cpu", non_blocking=True) for layer, values in on_device.items()}
        copied_back.record(stream)
        return _InFlight(item, rows, (start, end, copied_back))

    def _take_back(self, done: _InFlight) -> _Progress | None:
        """Put the rows of a pack into its shard; the shard if it is complete with that."""
        item, progress = done.pack, done.pack.progress
        if done.events:
            start, end, copied_back = done.events
            copied_back.synchronize()
            self.times.computing += start.elapsed_time(end) / 1000
        begin = time.monotonic()
        for layer, rows in done.rows.items():
            with np.errstate(over="ignore"):  # too large for FP16 becomes Inf, which is looked for below
                progress.rows[layer][item.members] = rows.numpy()
        self._check_finite(item)
        residues = item.batch.total_tokens - SPECIAL_TOKENS * len(item.members)
        if done.rows:
            self.times.tokens += item.batch.total_tokens
            self.times.residues += residues
            self.times.sequences += len(item.members)
            self.times.pack_tokens.append(item.batch.total_tokens)
        self.times.copying += time.monotonic() - begin
        self._on_residues(residues)
        progress.packs_left -= 1
        return progress if progress.packs_left == 0 else None

    def _check_finite(self, item: _Pack) -> None:
        progress = item.progress
        for member in item.members[~self._finite(progress, item.members)].tolist():
            if progress.status[member] == STATUS_FAILED:
                continue
            reason = (
                f"the embedding is not finite (dtype {self.model.precision}, stored as {self.store_dtype})"
            )
            model = self._in_fp32()
            if model is not None:
                alone = pack([progress.shard.token_ids[member]]).to(model.device)
                for layer, rows in model.embed_packed(alone, self.layers).items():
                    with np.errstate(over="ignore"):
                        progress.rows[layer][member] = rows[0].cpu().numpy()
                if self._finite(progress, np.array([member]))[0]:
                    progress.status[member] = STATUS_RECOMPUTED
                    progress.reasons[member] = f"{reason}; recomputed in fp32"
                    continue
                reason += ", nor is that in fp32"
            self._fail_row(progress, member, reason)

    def _finite(self, progress: _Progress, members: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        finite = np.ones(len(members), dtype=np.bool_)
        for rows in progress.rows.values():
            finite &= np.isfinite(rows[members]).all(axis=1)
        return finite

    def _in_fp32(self) -> ESM2 | None:
        if self._fp32_model is None and self._load_fp32 is not None:
            self._fp32_model = self._load_fp32()
        return self._fp32_model

    def _fail_row(self, progress: _Progress, member: int, reason: str) -> None:
        progress.status[member] = STATUS_FAILED
        progress.reasons[member] = reason
        for rows in progress.rows.values():
            rows[member] = math.nan

    def _finish(self, progress: _Progress) -> Shard:
        return Shard(progress.status, progress.rows, progress.reasons)

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
