"""The three threads of a device: what one meets, all end on, and nothing waits for ever or piles up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kept_shards import Shard, mean_arrays, run_pipeline

from esm_packed.config import ESM2Config
from esm_packed.numerics import PRECISIONS
from esm_packed.outputs import layer_of
from esm_packed.packing import SPECIAL_TOKENS, PackedBatch, plan_packs
from esm_packed.runners.compute import pipeline as pipeline_module
from esm_packed.runners.compute.pipeline import PACKS_AHEAD, PACKS_IN_FLIGHT, Pipeline
from esm_packed.runners.state.shard import STATUS_COMPUTED, STATUS_FAILED, STATUS_RECOMPUTED, ShardInput
from esm_packed.runners.system import queues
from esm_packed.runners.watch.metrics import RESULTS_AHEAD

HIDDEN_SIZE = 4
TIMEOUT_SECONDS = 20.0


class Model:
    """Stands in for ESM2: an embedding is the sum of the residues, their number and the first of them."""

    config = ESM2Config(2, HIDDEN_SIZE, 1)
    device = torch.device("cpu")
    precision, precision_mode = "fp16", PRECISIONS["fp16"]

    def __init__(self, before: Callable[[PackedBatch], None] = lambda batch: None) -> None:
        self.before = before
        self.packs = 0

    def embed_packed(
        self, batch: PackedBatch, names: Sequence[str], *rest: object
    ) -> dict[str, torch.Tensor]:
        self.packs += 1
        self.before(batch)
        bounds = batch.cu_seqlens.tolist()
        rows = []
        for start, stop in pairwise(bounds):
            residues = batch.input_ids[start + 1 : stop - 1].double()
            first = residues[0] if len(residues) else torch.tensor(0.0)
            rows.append([residues.sum(), float(len(residues)), first, 1.0])
        values = torch.tensor(rows, dtype=torch.float64).float()
        return {name: values * ((layer_of(name) or 0) + 1) for name in names}


def shard_input(number: int, lengths: Sequence[int]) -> ShardInput:
    rng = np.random.default_rng([number, *lengths])
    return ShardInput(number, [rng.integers(4, 24, length).astype(np.uint8) for length in lengths])


def expected_rows(shard: ShardInput) -> np.ndarray:
    return np.array(
        [[ids.sum(dtype=np.int64), len(ids), ids[0], 1] for ids in shard.token_ids], np.float32
    ).reshape(-1, HIDDEN_SIZE)


def new_pipeline(model: Any, budget: int = 64, **options: Any) -> Pipeline:
    store_dtype = options.pop("store_dtype", "float32")
    arrays = mean_arrays([1, 2], HIDDEN_SIZE, store_dtype)
    return Pipeline(model, arrays=arrays, **{"token_budget": budget} | options)


def run_in_time(
    pipeline: Pipeline, shards: Any, write: Callable[[int, Shard], None], store_dtype: str = "float32"
) -> None:
    """Run; a hang is a failure, and so is a thread that is left behind."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            run_pipeline(pipeline, shards, write, mean_arrays([1, 2], HIDDEN_SIZE, store_dtype))
        except BaseException as error:
            errors.append(error)

    before = set(threading.enumerate())
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    assert not thread.is_alive(), "the pipeline hangs"
    left = set(threading.enumerate()) - before
    assert not left, f"{left} are left"
    if errors:
        raise errors[0]


lengths_of_shards = st.lists(st.lists(st.integers(1, 90), min_size=0, max_size=12), max_size=8)


@given(lengths_of_shards, st.integers(1, 100), st.sampled_from(["float32", "float16"]))
def test_every_shard_is_written_once_in_order(
    lengths: list[list[int]], budget: int, store_dtype: str
) -> None:
    shards = [shard_input(number, each) for number, each in enumerate(lengths)]
    written: dict[int, Shard] = {}

    def write(number: int, shard: Shard) -> None:
        assert number not in written
        written[number] = shard

    pipeline = new_pipeline(Model(), budget, store_dtype=store_dtype)
    run_in_time(pipeline, iter(shards), write, store_dtype)
    # a shard without a sequence to compute (copies only) is written, too: the run waits for its file
    assert list(written) == list(range(len(shards)))
    for number, shard in written.items():
        rows = expected_rows(shards[number])
        for layer in (1, 2):
            np.testing.assert_array_equal(shard.embeddings[layer], (rows * (layer + 1)).astype(store_dtype))
        assert shard.status.tolist() == [STATUS_COMPUTED] * len(rows)
        assert not shard.reasons
    total = sum(map(sum, lengths))
    assert pipeline.times.residues == total
    assert pipeline.times.sequences == sum(map(len, lengths))
    assert pipeline.times.tokens == total + SPECIAL_TOKENS * pipeline.times.sequences
    packs = [
        int((np.array(each)[members] + SPECIAL_TOKENS).sum())
        for each in lengths
        for members in plan_packs(np.array(each) + SPECIAL_TOKENS, budget)
    ]
    assert pipeline.times.packs == len(packs)
    within = [tokens for tokens in packs if tokens <= budget]
    expected = sum(within) / (len(within) * budget) if within else 1.0
    assert pipeline.times.packing_efficiency == pytest.approx(expected)


@pytest.mark.parametrize("in_flight", [1, 2, 3, 50])
def test_results_do_not_depend_on_packs_in_flight(monkeypatch: pytest.MonkeyPatch, in_flight: int) -> None:
    monkeypatch.setattr(pipeline_module, "PACKS_IN_FLIGHT", in_flight)
    shards = [shard_input(number, [5, 40, 7, 61, 3, 3]) for number in range(6)]
    written: dict[int, Shard] = {}
    run_in_time(new_pipeline(Model()), iter(shards), written.__setitem__)
    assert list(written) == list(range(6))
    for number, shard in written.items():
        np.testing.assert_array_equal(shard.embeddings[1], expected_rows(shards[number]) * 2)


class Boom(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 5, 39])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, MemoryError, OSError])
def test_an_error_of_the_reader_surfaces(at: int, error: type[BaseException]) -> None:
    def shards() -> Iterator[ShardInput]:
        for number in range(at):
            yield shard_input(number, [20, 30])
        raise error("reading")

    written: dict[int, Shard] = {}
    with pytest.raises(error, match="reading"):
        run_in_time(new_pipeline(Model()), shards(), written.__setitem__)
    # what was whole before the fault is kept, apart from what was still on the device
    assert list(written) == list(range(len(written)))
    assert len(written) >= at - PACKS_IN_FLIGHT


@pytest.mark.parametrize("at", [1, 2, 7])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, RuntimeError])
def test_an_error_while_computing_surfaces(at: int, error: type[BaseException]) -> None:
    def fail(batch: PackedBatch) -> None:
        if model.packs == at:
            raise error("computing")

    model = Model(fail)
    written: dict[int, Shard] = {}
    drawn = 0

    def shards() -> Iterator[ShardInput]:
        nonlocal drawn
        for number in range(1000):
            drawn += 1
            yield shard_input(number, [20, 30])

    with pytest.raises(error, match="computing"):
        run_in_time(new_pipeline(model), shards(), written.__setitem__)
    assert list(written) == list(range(len(written)))
    assert len(written) >= at - 1 - PACKS_IN_FLIGHT
    assert drawn < 50, "reading goes on long after the failure"


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("error", [Boom, OSError])
def test_an_error_of_the_writer_surfaces(at: int, error: type[BaseException]) -> None:
    calls: list[int] = []

    def write(number: int, shard: Shard) -> None:
        calls.append(number)
        if number == at:
            raise error("writing")

    model = Model()
    with pytest.raises(error, match="writing"):
        run_in_time(new_pipeline(model), (shard_input(n, [20, 30]) for n in range(1000)), write)
    assert calls == list(range(at + 1)), "nothing is written behind a failed write"
    assert model.packs < at + 50, "computing goes on long after the failure"


def test_an_error_of_the_last_write_surfaces() -> None:
    def write(number: int, shard: Shard) -> None:
        time.sleep(0.05)  # everything else has ended by now
        raise Boom("writing")

    with pytest.raises(Boom):
        run_in_time(new_pipeline(Model()), [shard_input(0, [3])], write)


def test_errors_everywhere_at_once_end_the_run() -> None:
    def fail(batch: PackedBatch) -> None:
        if model.packs == 4:
            raise Boom("computing")

    def shards() -> Iterator[ShardInput]:
        for number in range(5):
            yield shard_input(number, [20, 30])
        raise Boom("reading")

    def write(number: int, shard: Shard) -> None:
        raise Boom("writing")

    model = Model(fail)
    with pytest.raises(Boom):
        run_in_time(new_pipeline(model), shards(), write)


@pytest.mark.parametrize("name", ["reader", "writer"])
def test_a_thread_that_cannot_start_ends_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    shards = [shard_input(number, [20, 30]) for number in range(100)]
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_in_time(new_pipeline(Model()), shards, lambda number, shard: None)


@pytest.mark.parametrize("num_shards", [0, 1, 100])
@pytest.mark.parametrize("name", ["reader", "writer"])
def test_a_thread_that_dies_ends_the_run(monkeypatch: pytest.MonkeyPatch, name: str, num_shards: int) -> None:
    """Without memory even the code that would hand its error over may fail."""
    thread = {"reader": queues.Ahead, "writer": queues.Behind}[name]
    monkeypatch.setattr(thread, "_run", lambda *call: None)
    monkeypatch.setattr(queues, "POLL_SECONDS", 0.05)
    shards = [shard_input(number, [20, 30]) for number in range(num_shards)]
    with pytest.raises(MemoryError, match=f"the {name} thread"):
        run_in_time(new_pipeline(Model()), shards, lambda number, shard: None)


def test_a_slow_writer_holds_the_others_back() -> None:
    """Memory is bounded: reading and computing wait for the writer, a few shards ahead of it."""
    drawn = 0
    most_ahead = 0
    written = 0

    def shards() -> Iterator[ShardInput]:
        nonlocal drawn
        for number in range(40):
            drawn += 1
            yield shard_input(number, [20, 30])

    def write(number: int, shard: Shard) -> None:
        nonlocal written, most_ahead
        time.sleep(0.01)
        most_ahead = max(most_ahead, drawn - written)
        written += 1

    run_in_time(new_pipeline(Model()), shards(), write)
    assert written == 40
    assert most_ahead <= PACKS_AHEAD + PACKS_IN_FLIGHT + RESULTS_AHEAD + 3


def test_a_slow_device_holds_the_reader_back() -> None:
    drawn = 0
    ahead: list[int] = []

    def shards() -> Iterator[ShardInput]:
        nonlocal drawn
        for number in range(30):
            drawn += 1
            yield shard_input(number, [20, 30])

    def look(batch: PackedBatch) -> None:
        time.sleep(0.01)
        ahead.append(drawn - model.packs)

    model = Model(look)
    run_in_time(new_pipeline(model), shards(), lambda number, shard: None)
    assert max(ahead) <= PACKS_AHEAD + 2


def test_a_pipeline_runs_again_after_a_failure() -> None:
    def fail(batch: PackedBatch) -> None:
        if model.packs == 3:
            raise Boom("computing")

    model = Model(fail)
    pipeline = new_pipeline(model)
    shards = [shard_input(number, [20, 30]) for number in range(8)]
    with pytest.raises(Boom):
        run_in_time(pipeline, shards, lambda number, shard: None)
    written: dict[int, Shard] = {}
    run_in_time(pipeline, shards, written.__setitem__)
    assert list(written) == list(range(8))


def test_no_shards_at_all() -> None:
    run_in_time(new_pipeline(Model()), [], lambda number, shard: pytest.fail("written"))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.integers(8, 70),
    st.sampled_from(OUT_OF_MEMORY),
)
def test_packs_that_do_not_fit_are_halved_until_they_do(
    lengths: list[int], room: int, error: Exception
) -> None:
    def limited(batch: PackedBatch) -> None:
        if batch.total_tokens > room:
            raise error

    shards = [shard_input(number, lengths) for number in range(3)]
    written: dict[int, Shard] = {}
    pipeline = new_pipeline(Model(limited), 128)
    run_in_time(pipeline, shards, written.__setitem__)
    assert list(written) == [0, 1, 2]
    fits = np.array(lengths) + SPECIAL_TOKENS <= room
    for number, shard in written.items():
        np.testing.assert_array_equal(shard.status == STATUS_FAILED, ~fits)
        rows = expected_rows(shards[number])
        np.testing.assert_array_equal(shard.embeddings[1][fits], rows[fits] * 2)
        assert np.isnan(shard.embeddings[1][~fits]).all()
        assert sorted(shard.reasons) == np.flatnonzero(~fits).tolist()
    # what did not fit was not computed
    assert pipeline.times.sequences == 3 * int(fits.sum())
    assert pipeline.times.residues == 3 * int(np.array(lengths)[fits].sum())


def test_only_what_is_not_finite_is_recomputed_and_the_model_loaded_once() -> None:
    class Overflowing(Model):
        def embed_packed(
            self, batch: PackedBatch, names: Sequence[str], *rest: object
        ) -> dict[str, torch.Tensor]:
            rows = super().embed_packed(batch, names)
            for values in rows.values():
                values[batch.cu_seqlens.diff() == 30 + SPECIAL_TOKENS, 1] = torch.inf
            return rows

    loaded: list[Model] = []

    def load() -> Any:
        loaded.append(Model())
        return loaded[-1]

    shards = [shard_input(number, [10, 30, 20, 30]) for number in range(4)]
    written: dict[int, Shard] = {}
    run_in_time(new_pipeline(Overflowing(), in_fp32=load), shards, written.__setitem__)
    assert len(loaded) == 1
    assert loaded[0].packs == 8
    for number, shard in written.items():
        assert shard.status.tolist() == [0, STATUS_RECOMPUTED, 0, STATUS_RECOMPUTED]
        np.testing.assert_array_equal(shard.embeddings[2], expected_rows(shards[number]) * 3)
        assert sorted(shard.reasons) == [1, 3]


def test_progress_is_told_of_every_residue_once() -> None:
    told: list[int] = []
    shards = [shard_input(number, [10, 30, 20, 100]) for number in range(4)]
    run_in_time(new_pipeline(Model(), on_pack=told.append), shards, lambda number, shard: None)
    assert sum(told) == 4 * 160
