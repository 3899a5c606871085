"""One device at work: sequences are read ahead, packs computed one behind the other, results written aside.

    reader thread   reads residues, plans packs, lays them end to end in pinned memory
    this thread     sends packs to the device, computes, takes results back
    writer thread   writes what packs give to the files of their shards

The queues between them are short, so memory stays bounded; whichever stage is slowest, the others wait for
it, and the time each spends at work tells which one it was. On a GPU packs and results travel on streams of
their own; the device is waited for once per pack, for a result one pack old, while it computes the next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from esm_packed.layouts import LAYOUTS, Layout
from esm_packed.model import ESM2
from esm_packed.numerics import is_out_of_memory
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch
from esm_packed.runners.compute.device import Device, Launched
from esm_packed.runners.compute.guard import Guard, TokenIds
from esm_packed.runners.state.shard import (
    STATUS_FAILED,
    Comparison,
    ItemStatus,
    Rows,
    ShardInput,
    ShardWriter,
    mean_of,
)
from esm_packed.runners.system.queues import Ahead, Behind
from esm_packed.runners.watch.metrics import RESULTS_AHEAD, Snapshot, StageTimes

PACKS_AHEAD = 4
PACKS_IN_FLIGHT = 2

OpenShard = Callable[[int], AbstractContextManager[ShardWriter]]


class PackTooLargeError(RuntimeError):
    """A pack of the layout `fixed` does not fit into the memory of the device, and must not be halved.

    Args:
        tokens: in the pack.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(f"a pack of {tokens:,} tokens does not fit into memory")
        self.tokens = tokens


@dataclass
class _Progress:
    """A shard while it is computed."""

    shard: ShardInput
    packs_left: int


@dataclass
class _Pack:
    """Items of a shard, laid out; a shard with nothing to compute is one pack without items and batch."""

    progress: _Progress
    items: npt.NDArray[np.int64]
    token_ids: Sequence[TokenIds] = ()
    batch: PackedBatch | None = None


@dataclass(frozen=True)
class _Result:
    """What a pack gave; there are no rows if it could not be computed."""

    shard: int
    items: npt.NDArray[np.int64]
    rows: dict[str, Rows] = field(default_factory=dict)
    statuses: dict[int, ItemStatus] = field(default_factory=dict)
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    is_last: bool = False


@dataclass(frozen=True)
class _InFlight:
    """A pack that is on the device; `launched` is None if there is nothing to wait for."""

    pack: _Pack
    launched: Launched | None = None
    failure: str = ""


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
        *,
        layers: Sequence[int],
        store_dtype: str,
        token_budget: int,
        in_fp32: Callable[[], ESM2] | None = None,
        on_pack: Callable[[int], None] = lambda residues: None,
        layout: Layout = LAYOUTS["packed"],
        cuda_graphs: bool = False,
    ) -> None:
        self.times = StageTimes()
        self._layers = list(layers)
        self._store_dtype = np.dtype(store_dtype)
        self._token_budget = token_budget
        self._on_pack = on_pack
        self._layout = layout
        self._guard = Guard(model, layers, in_fp32)
        self._device = Device(model, layers, layout, cuda_graphs, self.times)
        self._device_name = str(model.device)
        self._pins = model.device.type == "cuda"
        self._queues: tuple[Ahead[_Pack], Behind[_Result]] | None = None
        self._began = 0.0
        self._shard: int | None = None

    def run(self, shards: Iterable[ShardInput], open_shard: OpenShard) -> None:
        """Compute `shards` in their order.

        Args:
            shards: drawn from in the reader thread, a few packs ahead.
            open_shard: called in the writer thread with the number of a shard; gives the file to fill.

        Raises:
            PackTooLargeError: see there.
            Exception: whatever `shards` or `open_shard` raised; shards not yet whole are dropped.
        """
        self._began = time.monotonic()
        try:
            with (
                Ahead(self._packs_of(shards), PACKS_AHEAD, "reader") as packs,
                Behind(partial(self._write, open_shard), RESULTS_AHEAD, "writer") as results,
            ):
                self._queues = packs, results
                self._compute(packs, results)
        finally:
            self.times.wall += time.monotonic() - self._began
            self._queues = self._shard = None

    def snapshot(self) -> Snapshot:
        """Where the work is; may be called from any thread."""
        times, waiting = replace(self.times), (0, 0)
        if (queues := self._queues) is not None:
            times.wall += time.monotonic() - self._began
            waiting = len(queues[0]), len(queues[1])
        return Snapshot(times, self._shard, *waiting, *self._device.memory_and_utilization())

    def _packs_of(self, shards: Iterable[ShardInput]) -> Iterator[_Pack]:
        begin = time.monotonic()
        for shard in shards:
            lengths = np.fromiter(map(len, shard.token_ids), np.int64, len(shard.token_ids))
            items_of = self._layout.plan(lengths + SPECIAL_TOKENS, self._token_budget)
            progress = _Progress(shard, max(1, len(items_of)))
            if not items_of:
                yield _Pack(progress, np.zeros(0, np.int64))
            for items in items_of:
                pack = self._lay_out(progress, items)
                self.times.reading += time.monotonic() - begin
                yield pack
                begin = time.monotonic()
        self.times.reading += time.monotonic() - begin

    def _lay_out(self, progress: _Progress, items: npt.NDArray[np.int64]) -> _Pack:
        token_ids = [progress.shard.token_ids[item] for item in items.tolist()]
        batch = self._layout.lay_out(token_ids, self._token_budget)
        if self._pins:
            pinned = batch.input_ids.pin_memory(), batch.cu_seqlens.pin_memory()
            batch = replace(batch, input_ids=pinned[0], cu_seqlens=pinned[1])
        return _Pack(progress, items, token_ids, batch)

    def _compute(self, packs: Ahead[_Pack], results: Behind[_Result]) -> None:
        in_flight: deque[_InFlight] = deque()

        def take_back(most_left: int) -> None:
            while len(in_flight) > most_left:
                results.put(self._take_back(in_flight.popleft()))

        taken = iter(packs)
        while True:
            num_ready = len(packs)
            if (pack := next(taken, None)) is None:
                break
            self.times.packs_queued += num_ready
            self._shard = pack.progress.shard.number
            for launched in self._launch(pack, lambda: take_back(0)):
                in_flight.append(launched)
                take_back(PACKS_IN_FLIGHT - 1)
        take_back(0)

    def _launch(self, pack: _Pack, drain: Callable[[], None]) -> Iterator[_InFlight]:
        """Start a pack on the device, in halves where its memory does not suffice.

        Args:
            pack: to start.
            drain: takes back all that is on the device.
        """
        batch = pack.batch
        if batch is None:
            yield _InFlight(pack)
            return
        try:
            launched = self._device.launch(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            launched = None
        if launched is not None:
            yield _InFlight(pack, launched)
            return
        drain()
        self._device.free_memory()
        if self._layout.name == "fixed" and batch.total_tokens <= self._token_budget:
            raise PackTooLargeError(batch.total_tokens)
        self.times.num_halved += 1
        if len(pack.items) == 1:
            residues = batch.max_seqlen - SPECIAL_TOKENS
            yield _InFlight(
                pack,
                failure=f"{residues:,} residues do not fit into the memory of {self._device_name}; "
                "--max-length cuts such sequences",
            )
            return
        half = len(pack.items) // 2
        pack.progress.packs_left += 1
        for items in (pack.items[:half], pack.items[half:]):
            yield from self._launch(self._lay_out(pack.progress, items), drain)

    def _take_back(self, done: _InFlight) -> _Result:
        """Wait for a pack and see that what it gave is sound."""
        pack, progress = done.pack, done.pack.progress
        progress.packs_left -= 1
        result = _Result(progress.shard.number, pack.items, is_last=progress.packs_left == 0)
        items, residues = pack.items.tolist(), sum(map(len, pack.token_ids))
        if done.failure:
            result.statuses[items[0]] = ItemStatus(STATUS_FAILED, done.failure)
        if done.launched is not None:
            rows = self._device.take_back(done.launched, self._store_dtype)
            for place, status in self._guard.rescue(rows, pack.token_ids).items():
                result.statuses[items[place]] = status
            for place, item in enumerate(items):
                if item in progress.shard.compared and item not in result.statuses:
                    comparison = self._guard.compare(rows[self._layers[-1]][place], pack.token_ids[place])
                    if comparison is not None:
                        result.comparisons[item] = comparison
            result.rows.update((mean_of(layer), values) for layer, values in rows.items())
            self._count(pack, residues)
        self._on_pack(residues)
        return result

    def _count(self, pack: _Pack, residues: int) -> None:
        assert pack.batch is not None
        times, tokens = self.times, residues + SPECIAL_TOKENS * len(pack.items)
        times.tokens += tokens
        times.residues += residues
        times.sequences += len(pack.items)
        times.packs += 1
        if pack.batch.total_tokens > self._token_budget:
            times.overlong_packs += 1
        else:
            times.tokens_in_budget += tokens
            times.token_room += self._token_budget

    def _write(self, open_shard: OpenShard, results: Iterator[_Result]) -> None:
        with ExitStack() as stack:
            output = None
            for result in results:
                begin = time.monotonic()
                if output is None:
                    output = stack.enter_context(open_shard(result.shard))
                if result.rows:
                    output.write(result.items, result.rows, result.statuses, result.comparisons)
                else:
                    for item, status in result.statuses.items():
                        output.write_failed(item, status.reason)
                if result.is_last:
                    stack.close()
                    output = None
                self.times.writing += time.monotonic() - begin
            if output is not None:
                raise RuntimeError("the work ended before the shard was whole")
