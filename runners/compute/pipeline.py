"""The pipeline of one device: reading ahead, computing packs, and writing results in the background.

    reader thread   reads residues, plans packs, concatenates them in pinned memory
    this thread     sends packs to the device, computes, copies results back
    writer thread   writes the results of packs to the files of their shards

The queues between them are short, so memory stays bounded. All stages wait for the slowest one, and the time
each spends working shows which one that was. On a GPU packs and results are copied on separate streams; the
host waits once per pack, for the result of the previous pack, while the device computes the next.
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
import torch

from esm_packed.layouts import LAYOUTS, Layout
from esm_packed.model import ESM2
from esm_packed.numerics import is_out_of_memory
from esm_packed.outputs import is_ragged, per_of
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch
from esm_packed.rescue import is_finite
from esm_packed.rows import row_counts
from esm_packed.runners.compute.blending import Blends
from esm_packed.runners.compute.device import Device, Launched
from esm_packed.runners.compute.guard import Guard, TokenIds
from esm_packed.runners.state.shard import (
    STATUS_FAILED,
    Array,
    Comparison,
    Items,
    ItemStatus,
    Rows,
    ShardInput,
    ShardWriter,
)
from esm_packed.runners.system.queues import Ahead, Behind
from esm_packed.runners.watch.metrics import RESULTS_AHEAD, Snapshot, StageTimes
from esm_packed.windows import Windows, names_in_windows

PACKS_AHEAD = 4
PACKS_IN_FLIGHT = 2

OpenShard = Callable[[int], AbstractContextManager[ShardWriter]]


class PackTooLargeError(RuntimeError):
    """A pack of the layout `fixed` does not fit into the memory of the device, and must not be halved.

    Args:
        tokens: number of tokens in the pack.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(f"a pack of {tokens:,} tokens does not fit into memory")
        self.tokens = tokens


@dataclass
class _Progress:
    """A shard being computed."""

    shard: ShardInput
    packs_left: int


@dataclass
class _Pack:
    """Items of a shard, or windows of long items, packed together.

    Args:
        progress: state of the shard.
        items: (n,) items in the pack.
        starts: (n,) first residue of each window; None if the items are whole.
        token_ids: residues of each item or window.
        batch: the packed batch; None for a shard with nothing to compute.
    """

    progress: _Progress
    items: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64] | None = None
    token_ids: Sequence[TokenIds] = ()
    batch: PackedBatch | None = None


@dataclass(frozen=True)
class _Result:
    """The result of a pack; it has no rows if the pack could not be computed."""

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
        model: the model.
        arrays: the arrays to keep.
        token_budget: tokens in a pack.
        windows: how items longer than a window are cut; None to leave them whole.
        in_fp32: loads the model in FP32, for sequences whose embedding is not finite and for those that are
            compared; called at most once. None if the model already computes in FP32 or better.
        on_pack: called with the number of residues when a pack is done.
        layout: one of `LAYOUTS`.
        cuda_graphs: replay packs of the layout `fixed` as CUDA graphs, on a GPU.
    """

    def __init__(
        self,
        model: ESM2,
        *,
        arrays: Sequence[Array],
        token_budget: int,
        windows: Windows | None = None,
        in_fp32: Callable[[], ESM2] | None = None,
        on_pack: Callable[[int], None] = lambda residues: None,
        layout: Layout = LAYOUTS["packed"],
        cuda_graphs: bool = False,
    ) -> None:
        self.times = StageTimes()
        self._dtypes = {array.name: array.dtype for array in arrays}
        halves = any(array.is_ragged and array.dtype == "float16" for array in arrays)
        self._residue_dtype = torch.float16 if halves else None
        self._arrays, self._windows = arrays, windows
        self._blends: Blends | None = None
        self._token_budget = token_budget
        self._on_pack = on_pack
        self._layout = layout
        self._guard = Guard(model, list(self._dtypes), in_fp32, windows)
        self._device = Device(model, layout, cuda_graphs, self.times)
        self._device_name = str(model.device)
        self._pins = model.device.type == "cuda"
        self._queues: tuple[Ahead[_Pack], Behind[_Result]] | None = None
        self._began = 0.0
        self._shard: int | None = None

    def run(self, shards: Iterable[ShardInput], open_shard: OpenShard) -> None:
        """Compute `shards` in order.

        Args:
            shards: consumed in the reader thread, a few packs ahead.
            open_shard: called in the writer thread with the number of a shard; returns the file to fill.

        Raises:
            PackTooLargeError: a pack of the layout `fixed` does not fit into memory.
            Exception: whatever `shards` or `open_shard` raised; incomplete shards are dropped.
        """
        self._began = time.monotonic()
        self._blends = Blends(self._windows, self._arrays) if self._windows else None
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
        """The current state; may be called from any thread."""
        times, waiting = replace(self.times), (0, 0)
        if (queues := self._queues) is not None:
            times.wall += time.monotonic() - self._began
            waiting = len(queues[0]), len(queues[1])
        return Snapshot(times, self._shard, *waiting, *self._device.memory_and_utilization())

    def _packs_of(self, shards: Iterable[ShardInput]) -> Iterator[_Pack]:
        begin = time.monotonic()
        for shard in shards:
            packs = self._plan(shard)
            progress = _Progress(shard, max(1, len(packs)))
            if not packs:
                yield _Pack(progress, np.zeros(0, np.int64))
            for items, starts in packs:
                pack = self._lay_out(progress, items, starts)
                self.times.reading += time.monotonic() - begin
                yield pack
                begin = time.monotonic()
        self.times.reading += time.monotonic() - begin

    def _plan(self, shard: ShardInput) -> list[tuple[Items, Items | None]]:
        """Items of each pack of a shard and the starts of their windows; whole items come first."""
        lengths = _lengths(shard, np.arange(len(shard.token_ids)))
        is_long = lengths > self._windows.size if self._windows else np.zeros(len(lengths), np.bool_)
        is_whole = ~is_long
        if shard.given is not None:
            is_long, is_whole = is_long & ~shard.given, is_whole & ~shard.given
        whole = np.flatnonzero(is_whole)
        packs: list[tuple[Items, Items | None]] = [
            (whole[members], None)
            for members in self._layout.packs(
                lengths[whole] + SPECIAL_TOKENS, self._token_budget, self._dtypes
            )
        ]
        if self._windows and is_long.any():
            starts_of = {
                item: self._windows.starts(int(lengths[item])) for item in np.flatnonzero(is_long).tolist()
            }
            items = np.repeat(list(starts_of), [len(starts) for starts in starts_of.values()])
            starts = np.concatenate(list(starts_of.values()))
            tokens = np.full(len(items), self._windows.size + SPECIAL_TOKENS)
            packs += [
                (items[members], starts[members])
                for members in self._layout.packs(tokens, self._token_budget, self._dtypes)
            ]
        return packs

    def _lay_out(self, progress: _Progress, items: Items, starts: Items | None) -> _Pack:
        token_ids = [progress.shard.token_ids[item] for item in items.tolist()]
        if starts is not None and self._windows is not None:
            size = self._windows.size
            token_ids = [
                ids[start : start + size] for ids, start in zip(token_ids, starts.tolist(), strict=True)
            ]
        batch = self._layout.lay_out(token_ids, self._token_budget)
        if (sites := progress.shard.sites) is not None:
            batch = batch.read_at([sites[item] for item in items.tolist()])
        if self._pins:
            batch = batch.pinned()
        return _Pack(progress, items, starts, token_ids, batch)

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
        """Start a pack on the device, in halves if its memory does not suffice.

        Args:
            pack: the pack to start.
            drain: takes back everything that is on the device.
        """
        batch = pack.batch
        if batch is None:
            yield _InFlight(pack)
            return
        try:
            launched = (
                self._device.launch(batch, list(self._dtypes), self._residue_dtype)
                if pack.starts is None
                else self._device.launch(batch, names_in_windows(self._dtypes))
            )
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
            remedy = "use --max-length to truncate it" if pack.starts is None else "use smaller --windows"
            failure = f"{residues:,} residues do not fit into the memory of {self._device_name}; {remedy}"
            yield _InFlight(pack, failure=failure)
            return
        half = len(pack.items) // 2
        pack.progress.packs_left += 1
        for part in (slice(None, half), slice(half, None)):
            starts = None if pack.starts is None else pack.starts[part]
            yield from self._launch(self._lay_out(pack.progress, pack.items[part], starts), drain)

    def _take_back(self, done: _InFlight) -> _Result:
        """Wait for a pack and check its results."""
        pack, progress = done.pack, done.pack.progress
        progress.packs_left -= 1
        result = _Result(progress.shard.number, pack.items, is_last=progress.packs_left == 0)
        residues = sum(map(len, pack.token_ids))
        if pack.batch is not None and pack.starts is not None:
            result = self._blend(done, pack.batch, pack.starts, result)
        elif pack.batch is not None and done.launched is not None:
            bounds = pack.batch.residue_bounds
            rows, finite = self._device.take_back(done.launched, bounds, self._dtypes)
            result.rows.update(rows)
            self._judge(progress.shard, result, finite)
        elif done.failure:
            result.statuses[int(pack.items[0])] = ItemStatus(STATUS_FAILED, done.failure)
        if pack.batch is not None and done.launched is not None:
            self._count(pack, pack.batch.total_tokens, residues)
        self._on_pack(residues)
        return result

    def _blend(self, done: _InFlight, batch: PackedBatch, starts: Items, result: _Result) -> _Result:
        """Add windows to their items; return the items that are now complete."""
        assert self._blends is not None
        shard, items = done.pack.progress.shard, result.items
        rows: dict[str, Rows] = {}
        if done.launched is not None:
            dtypes = dict.fromkeys(names_in_windows(self._dtypes), "float32")
            rows, _ = self._device.take_back(done.launched, batch.residue_bounds, dtypes)
        lengths = _lengths(shard, items)
        whole, rows, failures = self._blends.add(items, starts, lengths, rows, done.failure)
        statuses = {item: ItemStatus(STATUS_FAILED, reason) for item, reason in failures.items()}
        result = replace(result, items=np.array(whole, np.int64), rows=rows, statuses=statuses)
        finite = np.ones(len(whole), np.bool_)
        for place in range(len(whole)):
            finite[place] = is_finite(self._outputs_of(shard, result, place))
        self._judge(shard, result, finite)
        return result

    def _judge(self, shard: ShardInput, result: _Result, finite: npt.NDArray[np.bool_]) -> None:
        """Recompute non-finite items, and compare sampled ones."""
        for place, item in enumerate(result.items.tolist()):
            if item in result.statuses or (finite[place] and item not in shard.compared):
                continue
            rows, token_ids = self._outputs_of(shard, result, place), shard.token_ids[item]
            if not finite[place]:
                result.statuses[item] = self._guard.rescue(rows, token_ids, shard.sites_of(item))
            elif (comparison := self._guard.compare(rows, token_ids, shard.sites_of(item))) is not None:
                result.comparisons[item] = comparison

    @staticmethod
    def _outputs_of(shard: ShardInput, result: _Result, place: int) -> dict[str, Rows]:
        """Views of the outputs of one item of a result."""
        items = result.items[: place + 1]
        sites = None if shard.sites is None else [shard.sites[item] for item in items.tolist()]
        counts = row_counts(_lengths(shard, items), sites)
        ends = {per: (int(each[:-1].sum()), int(each.sum())) for per, each in counts.items()}
        return {
            name: values[slice(*ends[per_of(name)])] if is_ragged(name) else values[place]
            for name, values in result.rows.items()
        }

    def _count(self, pack: _Pack, total_tokens: int, residues: int) -> None:
        times, tokens = self.times, residues + SPECIAL_TOKENS * len(pack.items)
        times.tokens += tokens
        times.residues += residues
        times.sequences += len(pack.items)
        times.packs += 1
        if total_tokens > self._token_budget:
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
                raise RuntimeError("the computation ended before the shard was complete")


def _lengths(shard: ShardInput, items: Items) -> Items:
    return np.fromiter((len(shard.token_ids[item]) for item in items.tolist()), np.int64, len(items))
