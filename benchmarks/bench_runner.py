"""The runner around the forward pass: overhead, speed of merging, scaling with Ray workers.

All on the CPU, with one thread per worker. `--full` uses the sizes that the targets are stated for: 10,000
proteins of 50 residues, a GB of embeddings, and half a minute for each measurement on Ray.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from contenders.contest import worst_relative_error
from contenders.processes import PlainProcesses
from measuring import record
from workloads import RESIDUE_COUNTS, proteins, write_fasta

from esm_packed.checkpoints import Checkpoint, load_checkpoint
from esm_packed.config import DEFAULT_TOKEN_BUDGETS, ESM2_MODELS, ESM2Config
from esm_packed.layouts import LAYOUTS
from esm_packed.model import ESM2
from esm_packed.outputs import mean_of
from esm_packed.packing import SPECIAL_TOKENS
from esm_packed.runners.compute.device import Device, Launched
from esm_packed.runners.compute.worker import Worker
from esm_packed.runners.input.build import build_index
from esm_packed.runners.output.merge import MergeOptions, merge_run
from esm_packed.runners.planning import new_plan, run_identity
from esm_packed.runners.state.cut import FLOPS_PER_SHARD, sequence_flops
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.metrics import STAGES, StageTimes
from esm_packed.runners.watch.watch import watching

SMALL = "random:esm2_t6_8M_UR50D"
CPU = torch.device("cpu")
QUIET = Console(quiet=True)
TOKEN_BUDGET = DEFAULT_TOKEN_BUDGETS["cpu"]
MAX_RELATIVE_ERROR = 1e-5

SHORT_RESIDUES = 50
SHORT_PROTEINS = {False: 500, True: 10_000}
TARGET_OVERHEAD = 0.10

MERGED_CONFIG = ESM2_MODELS["esm2_t33_650M_UR50D"]
MERGED_ROWS = {False: 50_000, True: 200_000}
TARGET_MERGE = 500e6

SCALING_TOKENS = {False: 12_000, True: 200_000}
SCALING_SHARDS = 24
"""Even, so that two workers have equal work."""

TARGET_SCALING = 1.8


def parameters(config: pytest.Config) -> dict[str, list[Any]]:
    return {
        "model": [SMALL, "demo"],
        "provider": ["copy", "crc32", "merge"],
        "engine": ["plain_processes", "ray"],
        "workers": [1, 2],
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def full(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full"))


def short_proteins(count: int, residues: int) -> list[str]:
    """Random proteins with the residue frequencies of UniRef50."""
    shares = np.array(list(RESIDUE_COUNTS.values()))
    letters = np.frombuffer("".join(RESIDUE_COUNTS).encode(), dtype=np.uint8)
    drawn = np.random.default_rng(0).choice(letters, (count, residues), p=shares / shares.sum())
    return [row.tobytes().decode() for row in drawn]


def request_for(fasta: Path, output: Path, model: str) -> EmbedRequest:
    return EmbedRequest(
        (str(fasta),), output, model=model, device="cpu", threads=1, token_budget=TOKEN_BUDGET
    )


def index_and_plan(
    request: EmbedRequest,
    checkpoint: Checkpoint,
    config: ESM2Config,
    device_type: str,
    parts: dict[str, float],
) -> Run:
    """A run as created by `embed_files`.

    Args:
        request: what to embed.
        checkpoint: checkpoint of the model, for its hash.
        config: shape of the embeddings, and their cost.
        device_type: device type that shards are cut for.
        parts: gets the seconds of `indexing` and `planning`.
    """
    directory = RunDirectory(request.output)
    directory.make()
    begin = time.perf_counter()
    index = build_index(request.inputs, directory.index_path, request.read)
    parts["indexing"] = time.perf_counter() - begin
    begin = time.perf_counter()
    identity = run_identity(request, index, checkpoint, CPU, TOKEN_BUDGET)
    identity["layers"] = [config.num_layers]
    shaped = replace(checkpoint, config=config)
    plan = new_plan(identity, index, shaped, torch.device(device_type), directory, "")
    plan.write(directory.plan_path, directory.scratch_path)
    parts["planning"] = time.perf_counter() - begin
    return Run(directory, plan, index)


def check_rows(rows: npt.NDArray[np.float32], model: ESM2, sequences: Sequence[str]) -> float:
    """Worst relative L2 error of `rows` relative to their sequences embedded one by one.

    Raises:
        AssertionError: it is larger than the order of summation explains.
    """
    alone = np.array([model.embed([sequence])[0] for sequence in sequences])
    error = worst_relative_error(torch.from_numpy(rows), torch.from_numpy(alone))
    assert error <= MAX_RELATIVE_ERROR, f"relative error is {error:.1e}, above {MAX_RELATIVE_ERROR}"
    return error


def timed_forward(worker: Worker, run: Run) -> tuple[list[dict[str, torch.Tensor]], float, float]:
    """Results of each pack of a run, in order; wall and processor seconds of the forward passes."""
    layout, names = LAYOUTS["packed"], run.plan.outputs
    batches = []
    for shard in range(run.plan.num_shards):
        residues = run.input_of(shard).token_ids
        lengths = [len(each) + SPECIAL_TOKENS for each in residues]
        for members in layout.plan(lengths, TOKEN_BUDGET):
            batches.append(layout.lay_out([residues[member] for member in members.tolist()], TOKEN_BUDGET))
    worker.model.embed_packed(batches[0], names)
    begin, begin_processor = time.perf_counter(), time.process_time()
    results = [worker.model.embed_packed(batch, names) for batch in batches]
    return results, time.perf_counter() - begin, time.process_time() - begin_processor


def compute_and_merge(worker: Worker, run: Run, parts: dict[str, float]) -> StageTimes:
    """Compute all shards and the output; `parts` gets the seconds of `pipeline` and `merging`."""
    begin = time.perf_counter()
    opened = worker.open(run)
    opened.compute(range(run.plan.num_shards))
    parts["pipeline"] = time.perf_counter() - begin
    begin = time.perf_counter()
    merge_run(run, QUIET, MergeOptions(overwrite=True))
    parts["merging"] = time.perf_counter() - begin
    return opened.pipeline.times


def test_overhead(
    block: int, model: str, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark: Any
) -> None:
    """Everything except the forward pass: FASTA to HDF5 with precomputed results."""
    benchmark.group = "overhead"
    sequences = short_proteins(SHORT_PROTEINS[full], SHORT_RESIDUES)
    fasta = tmp_path / "proteins.fasta"
    write_fasta(fasta, sequences)
    request = request_for(fasta, tmp_path / "out.h5", model)
    checkpoint = load_checkpoint(model)
    worker = Worker(request, checkpoint, CPU)
    parts: dict[str, float] = {}

    def plan() -> Run:
        return index_and_plan(request, checkpoint, checkpoint.config, "cpu", parts)

    results, forward_seconds, forward_processor_seconds = timed_forward(worker, plan())
    recalled = cycle(results)  # packs come in the same order
    monkeypatch.setattr(Device, "launch", lambda device, batch, *outputs: Launched(next(recalled)))
    measured: list[tuple[float, StageTimes]] = []

    def run_without_forward() -> None:
        begin = time.process_time()
        times = compute_and_merge(worker, plan(), parts)
        measured.append((time.process_time() - begin, times))

    run_without_forward()
    checked = [0, len(sequences) // 3, len(sequences) - 1]
    with h5py.File(request.output) as file:
        rows = file["embeddings"][:]
    assert np.isfinite(rows).all()
    error = check_rows(rows[checked], worker.model, [sequences[index] for index in checked])
    benchmark.pedantic(run_without_forward, rounds=1)

    seconds = sum(parts.values())
    processor_seconds, times = measured[-1]
    record(
        benchmark,
        seconds,
        suite="runner",
        block=block,
        provider="without_forward",
        model=model,
        dtype="fp32",
        layout="packed",
        token_budget=TOKEN_BUDGET,
        backend=worker.model.attention_backend,
        sequences=len(sequences),
        useful_tokens=len(sequences) * (SHORT_RESIDUES + SPECIAL_TOKENS),
        relative_error=error,
        parts=parts,
        pipeline_stages={stage: getattr(times, stage) for stage in STAGES},
        forward_seconds=forward_seconds,
        ratio=seconds / forward_seconds,
        processor_seconds=processor_seconds,
        forward_processor_seconds=forward_processor_seconds,
        processor_ratio=processor_seconds / forward_processor_seconds,
        target=TARGET_OVERHEAD,
    )


def merged_rows(run: Run, shard: int) -> npt.NDArray[np.float32]:
    start, stop = run.plan.records(shard)
    rng = np.random.default_rng(shard)
    return rng.standard_normal((stop - start, run.plan.hidden_size), dtype=np.float32)


@pytest.fixture(scope="module")
def finished(full: bool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with all shards finished, of random embeddings; its merged output has been checked."""
    directory = tmp_path_factory.mktemp("merge")
    fasta = directory / "proteins.fasta"
    write_fasta(fasta, short_proteins(MERGED_ROWS[full], SHORT_RESIDUES))
    request = request_for(fasta, directory / "out.h5", "demo")
    run = index_and_plan(request, load_checkpoint("demo"), MERGED_CONFIG, "cuda", {})
    made_by = dict.fromkeys(("device", "attention_backend", "matmul", "versions", "disabled"), "")
    for number in range(run.plan.num_shards):
        rows = merged_rows(run, number)
        assert len(rows) == len(run.computed(number))
        with run.output(number) as shard:
            shard.write(np.arange(len(rows)), {mean_of(run.plan.layers[-1]): rows})
            shard.made_by = made_by
    merge_run(run, QUIET, MergeOptions(overwrite=True))
    with h5py.File(request.output) as file:
        for number in range(run.plan.num_shards):
            start, stop = run.plan.records(number)
            assert np.array_equal(file["embeddings"][start:stop], merged_rows(run, number))
        assert file["sequence_ids"].asstr()[[0, -1]].tolist() == ["p0", f"p{run.index.num_records - 1}"]
        assert not file["status"][:].any()
    return run


def test_merge(block: int, provider: str, finished: Run, tmp_path: Path, benchmark: Any) -> None:
    """Merging finished shards, compared with a plain copy and with checksums, all in the page cache."""
    benchmark.group = "merge"
    paths = [finished.directory.shard_path(shard) for shard in range(finished.plan.num_shards)]

    def copy() -> None:
        for path in paths:
            target = tmp_path / path.name
            shutil.copyfile(path, target)
            with target.open("rb") as file:
                os.fsync(file.fileno())

    def crc32() -> None:
        for shard in range(finished.plan.num_shards):
            assert finished.is_whole(shard)

    def merge() -> None:
        merge_run(finished, QUIET, MergeOptions(overwrite=True))

    processor_seconds = []

    def timed() -> None:
        begin = time.process_time()
        {"copy": copy, "crc32": crc32, "merge": merge}[provider]()
        processor_seconds.append(time.process_time() - begin)

    # the blocks of an existing file would be freed while the clock runs
    finished.directory.output.unlink(missing_ok=True)
    benchmark.pedantic(timed, rounds=1)
    for path in paths:
        (tmp_path / path.name).unlink(missing_ok=True)  # so that the next one can reuse its memory
    record(
        benchmark,
        suite="runner",
        block=block,
        provider=provider,
        dtype="fp32",
        sequences=finished.index.num_records,
        bytes=finished.index.num_records * finished.plan.hidden_size * np.dtype(np.float32).itemsize,
        processor_seconds=processor_seconds[-1],
        shards=len(paths),
        target=TARGET_MERGE if provider == "merge" else None,
    )


@pytest.fixture(scope="module")
def tokens_per_second() -> defaultdict[tuple[int, str], dict[int, float]]:
    """Tokens per second by block and engine, for each number of workers."""
    return defaultdict(dict)


def test_scaling(
    block: int,
    engine: str,
    workers: int,
    full: bool,
    tmp_path: Path,
    tokens_per_second: dict[tuple[int, str], dict[int, float]],
    monkeypatch: pytest.MonkeyPatch,
    benchmark: Any,
) -> None:
    """Workers that are running and warmed up, on unfinished shards.

    Plain processes show what the machine itself gains from a second process: cores may share a clock, a cache
    and memory.
    """
    benchmark.group = "scaling"
    if block and not full:
        pytest.skip("a trial takes one block; --full takes all")
    sequences = proteins("proteome", SCALING_TOKENS[full])
    tokens = sum(map(len, sequences)) + SPECIAL_TOKENS * len(sequences)
    fasta = tmp_path / "proteins.fasta"
    write_fasta(fasta, sequences)
    error = None
    with ExitStack() as stack:
        if engine == "plain_processes":
            processes = PlainProcesses(SMALL, fasta, TOKEN_BUDGET, stack, count=workers)
            benchmark.pedantic(processes.compute, rounds=1)
            tokens *= workers
        else:
            error = scale_ray(workers, sequences, fasta, stack, monkeypatch, benchmark)
    if benchmark.stats is None:  # --benchmark-disable
        return
    rates = tokens_per_second[block, engine]
    rates[workers] = tokens / benchmark.stats.stats.median
    record(
        benchmark,
        suite="runner",
        block=block,
        provider=engine,
        model=SMALL,
        workload="proteome",
        dtype="fp32",
        layout="packed",
        token_budget=TOKEN_BUDGET,
        sequences=len(sequences),
        useful_tokens=tokens,
        relative_error=error,
        workers=workers,
        ratio=rates[workers] / rates[1] if 1 in rates else None,
        target=TARGET_SCALING if engine == "ray" and workers == 2 else None,
    )


def scale_ray(
    workers: int,
    sequences: Sequence[str],
    fasta: Path,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    benchmark: Any,
) -> float:
    """Time the shards of a run on Ray workers; return the worst error of a few rows."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from esm_packed.runners.compute.ray_engine import RayEngine

    request = replace(request_for(fasta, fasta.with_name("out.h5"), SMALL), engine="ray", workers=workers)
    checkpoint = load_checkpoint(SMALL)
    lengths = np.array(list(map(len, sequences)))
    flops = sequence_flops(lengths, checkpoint.config).sum()
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", flops / SCALING_SHARDS)
    run = index_and_plan(request, checkpoint, checkpoint.config, "cpu", {})
    engine = stack.enter_context(RayEngine(request, CPU, (), checkpoint, QUIET))
    watch = stack.enter_context(watching(QUIET, workers, None, sum(map(len, sequences))))
    logs = [run.directory.logs_path / f"worker-{rank}.log" for rank in range(workers)]
    while not all(log.exists() and "finished" in log.read_text() for log in logs):
        engine.compute(run, range(workers), watch)
    shards = range(run.plan.num_shards)
    run.directory.forget_shards()
    benchmark.pedantic(engine.compute, (run, shards, watch), rounds=1)

    assert run.finished(shards) == list(shards)
    model = ESM2.from_pretrained(SMALL, device="cpu")
    errors = []
    for number in (shards[0], shards[-1]):
        shard = run.open_shard(number)
        assert shard is not None
        first, last = run.plan.records(number)
        last = min(last, first + 3)
        array = shard.shape.arrays[mean_of(run.plan.layers[-1])]
        start, stop = next(shard.shape.blocks(array))
        with shard:
            rows = shard.block(array, start, stop, bytearray(shard.shape.block_bytes))
        errors.append(check_rows(rows[: last - first], model, sequences[first:last]))
    return max(errors)
