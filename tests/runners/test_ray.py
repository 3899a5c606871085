"""Workers on Ray: the same file as one process, whatever happens to a worker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nursery import Nursery, Result, names_in, shards_of, wait_until
from proteins import proteins_with_copies, write_fasta

from esm_packed.errors import EngineError, UsageError
from esm_packed.runners.cli import main as cli
from esm_packed.runners.compute import ray_cluster, ray_engine, ray_schedule
from esm_packed.runners.compute.ray_engine import RayEngine
from esm_packed.runners.compute.ray_worker import RayWorker
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.scoring import score_file
from esm_packed.runners.session import embed_files
from esm_packed.runners.state.cut import FLOPS_PER_SHARD
from esm_packed.runners.state.request import EmbedRequest, Scoring
from esm_packed.runners.summary import Summary
from esm_packed.runners.watch.console import Console

os.environ.setdefault("RAY_AUTH_TOKEN", "of these tests")  # or Ray leaves one in the home directory
os.environ["ESM_PACKED_TESTS"] = str(os.getpid())  # by which workers are known
ray = pytest.importorskip("ray", reason="Ray is not installed")
from local_ray import LocalCluster  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

POISON_LENGTH = 77


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1.5e8)
    monkeypatch.setattr(ray_schedule, "BACK_OFF_SECONDS", 0.05)


def request_for(fasta: Path, output: Path, **changes: Any) -> EmbedRequest:
    request = EmbedRequest((str(fasta),), output, model="demo", device="cpu", threads=1, token_budget=256)
    return replace(request, **changes)


def run(fasta: Path, output: Path, **changes: Any) -> Summary:
    return embed_files(request_for(fasta, output, **changes), Console(quiet=True))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("input") / "in.fasta", proteins_with_copies(60, 40))


@pytest.fixture
def expected(fasta: Path, tmp_path: Path) -> Result:
    output = tmp_path / "one process" / "out.h5"
    output.parent.mkdir()
    run(fasta, output)
    return Result.of(output)


@pytest.fixture(scope="module")
def on_ray() -> Iterator[dict[str, Any]]:
    """Changes of a request that is computed on a Ray that stays; to start one takes seconds."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    yield {"engine": "ray", "ray_address": cluster.address}
    cluster.shutdown()


@pytest.fixture(params=["in this process", pytest.param("on Ray", marks=pytest.mark.slow)])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Changes of a request; each worker that ends is replaced, and on Ray imports torch anew: 5 s."""
    if request.param == "on Ray":
        on_ray: dict[str, Any] = request.getfixturevalue("on_ray")
        return on_ray
    monkeypatch.setattr(ray_engine, "RayCluster", LocalCluster)
    monkeypatch.setattr(os, "_exit", sys.exit)
    return {"engine": "ray"}


class SlowWorker(RayWorker):
    """Computes as slowly as a large model, so that there is time to interfere."""

    def compute(self, shard: int) -> Any:
        time.sleep(0.15)
        return super().compute(shard)


class WaitingWorker(RayWorker):
    """Computes its first shard when the other worker has one, too."""

    def compute(self, shard: int) -> Any:
        folder = self._opened.run.directory.output.parent
        (folder / f"busy-{self._rank}").touch()
        deadline = time.monotonic() + 300
        while not all((folder / f"busy-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline, "the other worker gets no shard"
            time.sleep(0.02)
        return super().compute(shard)


def worker_pids() -> list[int]:
    """Processes of this test's Ray workers: Ray gives them a title, and they inherit the environment."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    lines = [line.split(None, 1) for line in listed.stdout.splitlines()[1:]]
    pids = [int(pid) for pid, command in lines if command.startswith("ray::") and "Worker" in command]
    found = []
    for pid in pids:
        with suppress(OSError):
            if f"ESM_PACKED_TESTS={os.getpid()}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


def test_two_workers_give_the_file_of_one_process(
    fasta: Path,
    tmp_path: Path,
    expected: Result,
    monkeypatch: pytest.MonkeyPatch,
    on_ray: dict[str, Any],
) -> None:
    monkeypatch.setattr(RayEngine, "worker_class", WaitingWorker)
    output = tmp_path / "out.h5"
    log = tmp_path / "metrics.jsonl"
    summary = run(fasta, output, workers=2, keep_run=True, log_json=log, fp32_compare=7, **on_ray)
    assert Result.of(output) == expected
    logs = {path.name: path.read_text() for path in (tmp_path / "out.h5.run" / "logs").iterdir()}
    assert sorted(logs) == ["worker-0.log", "worker-1.log"]
    for rank in (0, 1):
        assert f"rank {rank} shard" in logs[f"worker-{rank}.log"]
    with EmbeddingReader(output) as reader:
        computed = len(np.unique(reader.embeddings(), axis=0))
        assert reader.attributes["device"] == "cpu (1 thread)"
        assert len(reader.comparisons()) == 7
    assert summary.stages.sequences == computed
    last = log.read_text().splitlines()[-1]
    assert '"event": "end"' in last
    assert '"rank": 1' in last
    wait_until(lambda: not worker_pids())


class DoomedWorker(SlowWorker):
    """Does not get to the end of the run before one worker has been killed."""

    def compute(self, shard: int) -> Any:
        killed = self._opened.run.directory.output.parent / "killed"
        deadline = time.monotonic() + 300
        while (
            len(self._opened.run.finished(range(self._opened.run.plan.num_shards))) >= 8
            and not killed.exists()
        ):
            assert time.monotonic() < deadline, "nothing is killed"
            time.sleep(0.02)
        return super().compute(shard)


def kill_workers(kills: int, output: Path, ended: threading.Event, seed: int) -> int:
    """kill -9 a worker at random moments, each time after some shard was finished."""
    rng = random.Random(seed)
    killed: list[int] = []
    seen = -1
    while len(killed) < kills and not ended.wait(0.02):
        now = len(shards_of(output))
        pids = [pid for pid in worker_pids() if pid not in killed]
        if now <= seen or not pids:
            continue
        time.sleep(rng.uniform(0.0, 0.3))
        pid = rng.choice(pids)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        killed.append(pid)
        (output.parent / "killed").touch()
        seen = len(shards_of(output))
    return len(killed)


def check_kills(
    fasta: Path,
    output: Path,
    expected: Result,
    monkeypatch: pytest.MonkeyPatch,
    on_ray: dict[str, Any],
    kills: int,
) -> None:
    monkeypatch.setattr(RayEngine, "worker_class", DoomedWorker)
    killed = 0
    while killed < kills:
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            killer = pool.submit(kill_workers, kills - killed, output, ended, seed=killed)
            try:
                run(fasta, output, workers=2, **on_ray)
            finally:
                ended.set()
        assert killer.result(), "nothing was killed"
        killed += killer.result()
        assert Result.of(output) == expected
        output.unlink()
        (output.parent / "killed").unlink()
        assert names_in(output.parent) == ["one process"]


def test_killed_workers_are_replaced(
    fasta: Path,
    tmp_path: Path,
    expected: Result,
    monkeypatch: pytest.MonkeyPatch,
    on_ray: dict[str, Any],
) -> None:
    check_kills(fasta, tmp_path / "out.h5", expected, monkeypatch, on_ray, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_killed_at_25_random_moments(
    fasta: Path,
    tmp_path: Path,
    expected: Result,
    monkeypatch: pytest.MonkeyPatch,
    on_ray: dict[str, Any],
) -> None:
    check_kills(fasta, tmp_path / "out.h5", expected, monkeypatch, on_ray, 25)


class PoisonedWorker(RayWorker):
    """One sequence, known by its length, ends it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        model = self._worker.model
        original = model.embed_packed

        def embed_packed(batch: Any, *rest: Any, **options: Any) -> Any:
            if (batch.cu_seqlens.diff() == POISON_LENGTH + 2).any():
                self.end()
            return original(batch, *rest, **options)

        model.embed_packed = embed_packed  # type: ignore[method-assign]

    def end(self) -> None:
        os._exit(1)


class RaisingWorker(PoisonedWorker):
    def end(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    "worker_class, attempts",
    [(PoisonedWorker, 1), (PoisonedWorker, 3), (RaisingWorker, 3)],
)
def test_a_sequence_that_ends_its_worker_is_found_and_left_out(
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: dict[str, Any],
    worker_class: type[RayWorker],
    attempts: int,
) -> None:
    monkeypatch.setattr(ray_schedule, "MAX_ATTEMPTS", attempts)
    poisoned = tmp_path / "in.fasta"
    records = fasta.read_text().split(">")[1:]
    records = [record for record in records if len(record.split("\n")[1]) != POISON_LENGTH][:6]
    records.insert(0, f"poison\n{'MKV' * 25}MK\n")
    poisoned.write_text("".join(f">{record}" for record in records))
    truth = tmp_path / "truth.h5"
    run(poisoned, truth)
    monkeypatch.setattr(RayEngine, "worker_class", worker_class)
    output = tmp_path / "out.h5"
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 2.5e8)  # the poison has company in its shard
    summary = run(poisoned, output, workers=1, **workers)
    assert summary.num_failed == 1
    with EmbeddingReader(output) as reader, EmbeddingReader(truth) as whole:
        assert reader.sequence_ids() == whole.sequence_ids()
        assert np.flatnonzero(reader.column("status")).tolist() == [0]
        rows = np.arange(len(records)) != 0
        np.testing.assert_allclose(reader.embeddings()[rows], whole.embeddings()[rows], rtol=1e-5, atol=1e-5)
        assert np.isnan(reader.embeddings()[0]).all()
        problem = reader.problems()[0]
        assert problem.sequence_id == "poison"
        expected = "the process died" if worker_class is PoisonedWorker else "illegal memory access"
        assert expected in problem.reason


def test_scores_are_those_of_one_process_and_a_protein_that_ends_its_worker_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: dict[str, Any]
) -> None:
    monkeypatch.setattr(ray_schedule, "MAX_ATTEMPTS", 1)
    monkeypatch.setitem(FLOPS_PER_SHARD, "cpu", 1e12)  # all in one shard, which is split to find the poison
    fasta = write_fasta(tmp_path / "in.fasta", [f"{'MKV' * 10}A", f"{'MKV' * 25}MK", f"{'WGL' * 8}S"])
    mutants = ["protein0,M1A:K2A", "protein1,M1A", "protein2,S25A", "protein1,K2A:V3A", "protein0,A31C"]
    table = tmp_path / "mutants.csv"
    table.write_text("\n".join(["id,mutant", *mutants]))
    scoring = Scoring("mutants", joint=True, mutations=table)
    request = request_for(fasta, tmp_path / "truth.csv", scoring=scoring)
    score_file(request, Console(quiet=True))
    monkeypatch.setattr(RayEngine, "worker_class", PoisonedWorker)
    request = replace(request, output=tmp_path / "out.csv", workers=1, **workers)
    assert score_file(request, Console(quiet=True)).num_failed == 2
    truth, found = (
        [line.rpartition(",") for line in (tmp_path / name).read_text().splitlines()[1:]]
        for name in ("truth.csv", "out.csv")
    )
    assert [row for row, _, _ in found] == [row for row, _, _ in truth] == mutants
    for (row, _, score), (_, _, expected) in zip(found, truth, strict=True):
        if row.startswith("protein1"):
            assert score == ""
        else:
            assert float(score) == pytest.approx(float(expected), abs=1e-5)


class DeadlyWorker(RayWorker):
    def compute(self, shard: int) -> Any:
        if shard > 1:
            os._exit(1)
        return super().compute(shard)

    def compute_piece(self, shard: int, first: int, last: int) -> Any:
        os._exit(1)


def test_when_all_fails_the_run_ends_and_keeps_what_is_finished(
    fasta: Path,
    tmp_path: Path,
    expected: Result,
    monkeypatch: pytest.MonkeyPatch,
    workers: dict[str, Any],
) -> None:
    monkeypatch.setattr(ray_schedule, "MAX_FAILURES_IN_A_ROW", 1)
    output = tmp_path / "out.h5"
    with monkeypatch.context() as deadly:
        deadly.setattr(RayEngine, "worker_class", DeadlyWorker)
        with pytest.raises(EngineError, match="workers fail on every shard, most recently with: the process"):
            run(fasta, output, workers=1, **workers)
    assert sorted(shards_of(output)) == ["00000.shard", "00001.shard"]
    assert not output.exists()
    run(fasta, output)
    assert Result.of(output) == expected


class FullWorker(RayWorker):
    def compute(self, shard: int) -> Any:
        if shard == 2:
            raise OSError(28, "No space left on device")
        return super().compute(shard)


class StrangerWorker(RayWorker):
    def __init__(self, request: EmbedRequest, model_sha256: str, device: str, rank: int) -> None:
        super().__init__(request, "another", device, rank)


@pytest.mark.parametrize(
    "worker_class, code, message",
    [
        (FullWorker, 5, "out of disk space: No space left on device"),
        pytest.param(StrangerWorker, 2, "is a different model", marks=pytest.mark.slow),  # 5 s
    ],
)
def test_what_no_repetition_helps_ends_the_run_at_once(
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_ray: dict[str, Any],
    worker_class: type[RayWorker],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(RayEngine, "worker_class", worker_class)
    arguments = ["embed", str(fasta), "-o", str(tmp_path / "out.h5"), "--model", "demo", "--device", "cpu"]
    options = ["--ray-address", on_ray["ray_address"], "--workers", "1", "--threads", "1"]
    assert cli.main([*arguments, *options]) == code
    assert message in capsys.readouterr().err


def test_a_worker_that_finds_another_model_says_so_once_and_for_all(fasta: Path, tmp_path: Path) -> None:
    worker = StrangerWorker(request_for(fasta, tmp_path / "out.h5"), "", "cpu", 0)
    with pytest.raises(UsageError, match="demo is a different model on") as caught:
        worker.token_budget(measured=True)
    assert ray_schedule.is_lasting(caught.value)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)


def with_old_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.58.1")


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    "prepare, changes, named",
    [
        (without_ray, {"engine": "ray"}, r"pip install 'ray>=2\.59'"),
        (
            with_old_ray,
            {"engine": "ray"},
            r"Ray 2.58.1 starts clusters without authentication.*pip install 'ray>=2\.59'",
        ),
        (nothing, {"engine": "in-process", "workers": 2}, "--engine ray"),
        (nothing, {"devices": (), "device": "auto"}, "finds no CUDA device"),
        (nothing, {"devices": (0, 1)}, "--device is cpu"),
        (nothing, {"ray_address": "auto", "engine": "in-process"}, "--ray-address needs --engine ray"),
        (nothing, {"ray_address": "auto", "device": "auto"}, "needs --device cuda or --device cpu"),
        (nothing, {"ray_address": "127.0.0.1:1"}, "Ray cannot be reached"),
        (nothing, {"ray_address": "127.0.0.1:99999"}, "Ray cannot be reached"),
        (nothing, {"ray_address": f"{'x' * 100}:1"}, "Ray cannot be reached"),
    ],
)
def test_options_that_do_not_fit(
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[pytest.MonkeyPatch], None],
    changes: dict[str, Any],
    named: str,
) -> None:
    prepare(monkeypatch)
    with pytest.raises(UsageError, match=named):
        run(fasta, tmp_path / "out.h5", **changes)


@pytest.mark.slow  # 12 s each
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_driver(
    nursery: Nursery, fasta: Path, tmp_path: Path, expected: Result, number: signal.Signals
) -> None:
    output = tmp_path / "out.h5"
    driver = nursery.start(
        fasta, output, "--engine", "ray", flops_per_shard=1.5e8, patch="import held_ray_worker"
    )
    wait_until(lambda: len(shards_of(output)) >= 3, 300)
    assert worker_pids()
    os.kill(driver.pid, number)
    assert driver.wait() == (4 if number == signal.SIGTERM else -number), driver.output()
    if number == signal.SIGTERM:
        last = driver.output().splitlines()[-1]
        assert "interrupted (SIGTERM); rerun the same command to continue" in last
    wait_until(lambda: not worker_pids(), 60)
    before = shards_of(output)
    run(fasta, output, keep_run=True)
    assert before.items() <= shards_of(output).items()
    assert Result.of(output) == expected


@pytest.mark.parametrize(
    "cores, num_workers, threads",
    [([16], 1, 16), ([16], 3, 5), ([8, 8], 1, 8), ([8, 8], 2, 8), ([8, 4], 2, 4), ([8, 4], 3, 4), ([], 1, 1)],
)
def test_no_worker_gets_more_threads_than_a_node_has(
    cores: list[int], num_workers: int, threads: int
) -> None:
    assert ray_cluster._threads_each(cores, num_workers) == threads


def test_a_worker_that_cannot_be_reached_is_said_in_plain_words() -> None:
    error = ray.exceptions.ActorUnavailableError("The actor is temporarily unavailable: RpcError: 14", None)
    assert str(ray_schedule.root_cause(error)) == "the worker cannot be reached"
