"""A cluster tried: Ray nodes and slices on two hosts, of which one is cut off or killed in mid-run.

They share the folder of the output. The hosts are namespaces of one machine (see `hosts`), and what they send
to each other stays there. 13 minutes on two busy cores, most of it until Ray notices that a node is gone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, two_hosts, why_none
from nursery import Result, names_in, shards_of, wait_until
from proteins import proteins_with_copies, write_fasta

from esm_packed.runners.state.claims import STALE_SECONDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_none()), reason=why_none()),
]

ROOT = Path(__file__).parents[2]
PORT = 6379
PATIENCE = 240.0  # for Ray to find out that a node is gone

COMMAND = """
import os, socket, sys, time
from pathlib import Path
from esm_packed.model import ESM2
from esm_packed.runners.cli import main as cli
from esm_packed.runners.state import cut
from esm_packed.runners.compute import ray_engine, ray_worker

cut.FLOPS_PER_SHARD["cpu"] = 3.5e8
logs = Path(sys.argv[1])

def wait_for(name):
    deadline = time.monotonic() + 600
    while not (logs / name).exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.02)
"""

# On beta a worker stops in its third shard until the test says go; those of alpha wait until then.
HELD_WORKER = """
class HeldWorker(ray_worker.RayWorker):
    computed = 0
    def compute(self, shard):
        self.computed += 1
        if socket.gethostname() == "beta" and self.computed == 3:
            (logs / "beta is busy").touch()
            wait_for("go")
            try:
                return super().compute(shard)
            finally:
                (logs / "beta has ended").touch()
        if socket.gethostname() == "alpha" and self.computed == 3:
            wait_for("beta is busy")
        return super().compute(shard)
ray_engine.RayEngine.worker_class = HeldWorker
"""

HELD_SLICE = """
packs = 0
original = ESM2.embed_packed
def held_embed(self, batch, names, *rest):
    global packs
    packs += 1
    if packs > 5:
        wait_for("go")
    return original(self, batch, names, *rest)
ESM2.embed_packed = held_embed
"""


def embed_command(fasta: Path, output: Path, logs: Path, *options: str, patch: str = "") -> list[str]:
    """`esm-packed embed`, with small shards; `patch` is run before it begins."""
    code = f"{COMMAND}{patch}\nsys.exit(cli.main(sys.argv[2:]))"
    arguments = ["embed", str(fasta), "-o", str(output), "--model", "demo", "--device", "cpu"]
    arguments += ["--threads", "1", "--token-budget", "256", *options]
    return [sys.executable, "-c", code, str(logs), *arguments]


class Trial:
    """Two hosts, an input, and what one process makes of it."""

    def __init__(self, alpha: Host, beta: Host, folder: Path, fasta: Path, expected: Result) -> None:
        self.alpha, self.beta = alpha, beta
        self.folder = folder
        self.output = folder / "out.h5"
        self.expected = expected
        self._fasta = fasta
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._number = 0

    def start(self, host: Host, *options: str, patch: str = "") -> tuple[subprocess.Popen[bytes], Path]:
        """`esm-packed embed` on a host, and its log."""
        command = embed_command(self._fasta, self.output, self._logs, *options, patch=patch)
        return self.start_any(host, *command)

    def start_any(
        self, host: Host, *command: str, **environment: str
    ) -> tuple[subprocess.Popen[bytes], Path]:
        self._number += 1
        log = self._logs / f"{self._number}.log"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of this cluster"}
        return host.start(command, log, {**token, **environment}), log

    def finish(self, host: Host, *options: str) -> tuple[int, str]:
        """`esm-packed embed` on a host; its exit code and what it says."""
        process, log = self.start(host, *options)
        return process.wait(PATIENCE), log.read_text()

    def status(self, host: Host) -> str:
        process, log = self.start_any(host, script("esm-packed"), "status", str(self.output))
        assert process.wait(PATIENCE) == 0, log.read_text()
        return log.read_text()

    def start_ray(self, head_cpus: int = 1) -> None:
        """A cluster whose head is alpha, with room for one worker on each host."""
        ray = script("ray")
        common = ["--block", "--disable-usage-stats"]
        address = f"{self.alpha.address}:{PORT}"
        own = ["--node-ip-address", self.alpha.address, "--port", str(PORT), f"--num-cpus={head_cpus}"]
        _, log = self.start_any(
            self.alpha, ray, "start", "--head", *own, "--include-dashboard=false", *common
        )
        wait_until(lambda: "Ray runtime started" in log.read_text())
        own = ["--node-ip-address", self.beta.address, "--num-cpus=1"]
        # once cut off, beta computes on for as long as the test needs
        patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        join = [ray, "start", f"--address={address}", *own, *common]
        _, log = self.start_any(self.beta, *join, **patience)
        wait_until(lambda: "Ray runtime started" in log.read_text())

    def there(self, name: str) -> bool:
        return (self._logs / name).exists()

    def go(self) -> None:
        (self._logs / "go").touch()

    def check_end(self) -> None:
        assert Result.of(self.output) == self.expected
        assert names_in(self.folder) == [self.output.name]

    @property
    def ray_options(self) -> list[str]:
        return ["--workers", "2", "--ray-address", f"{self.alpha.address}:{PORT}"]


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("cluster") / "in.fasta", proteins_with_copies(100, 100))


@pytest.fixture(scope="module")
def expected(fasta: Path) -> Result:
    output = fasta.parent / "one process.h5"
    command = embed_command(fasta, output, fasta.parent)
    done = subprocess.run(command, cwd=fasta.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Result.of(output)


@pytest.fixture
def trial(fasta: Path, expected: Result, tmp_path: Path) -> Iterator[Trial]:
    folder = tmp_path / "shared"
    folder.mkdir()
    with two_hosts([folder, fasta.parent, ROOT, Path(sys.prefix), Path(sys.base_prefix)]) as (alpha, beta):
        yield Trial(alpha, beta, folder, fasta, expected)


@pytest.mark.parametrize("how", ["cut off", "killed"])
def test_a_ray_node_is_lost_in_mid_run(trial: Trial, how: str) -> None:
    trial.start_ray()
    driver, log = trial.start(trial.alpha, *trial.ray_options, patch=HELD_WORKER)
    wait_until(lambda: trial.there("beta is busy") or driver.poll() is not None)
    assert driver.poll() is None, log.read_text()
    if how == "cut off":
        trial.beta.link("down")
    else:
        trial.beta.kill()
    assert driver.wait(PATIENCE) == 0, log.read_text()
    trial.check_end()
    if how == "cut off":
        trial.go()  # to a worker that computes on, and finds the run directory gone
        wait_until(lambda: trial.there("beta has ended"))
        trial.check_end()


def test_all_nodes_with_room_for_workers_are_lost(trial: Trial) -> None:
    trial.start_ray(head_cpus=0)
    driver, log = trial.start(trial.alpha, "--workers", "1", *trial.ray_options[2:], patch=HELD_WORKER)
    wait_until(lambda: trial.there("beta is busy") or driver.poll() is not None)
    assert driver.poll() is None, log.read_text()
    before = shards_of(trial.output)
    trial.beta.kill()
    assert driver.wait(PATIENCE) == 4, log.read_text()
    assert "no node of the cluster has the resources for a worker" in log.read_text()
    assert shards_of(trial.output) == before
    code, said = trial.finish(trial.alpha)
    assert code == 0, said
    trial.check_end()


def test_no_worker_is_spread_over_two_nodes(trial: Trial) -> None:
    trial.start_ray()
    code, said = trial.finish(trial.alpha, "--threads", "2", "--workers", "1", *trial.ray_options[2:])
    assert code == 2, said
    assert "Ray has resources for 0, with 2 CPU cores each" in said.splitlines()[-1]


def test_the_head_is_lost_in_mid_run(trial: Trial) -> None:
    """With the driver on the other host: it ends, and its command continues without the cluster."""
    trial.start_ray()
    driver, log = trial.start(trial.beta, *trial.ray_options, patch=HELD_WORKER)
    wait_until(lambda: trial.there("beta is busy") or driver.poll() is not None)
    assert driver.poll() is None, log.read_text()
    trial.alpha.kill()
    code = driver.wait(PATIENCE)
    assert code != 0
    before = shards_of(trial.output)
    assert before
    trial.go()
    code, said = trial.finish(trial.beta, "--keep-run")
    assert code == 0, said
    assert before.items() <= shards_of(trial.output).items()
    assert Result.of(trial.output) == trial.expected


def test_a_host_with_a_slice_is_killed(trial: Trial) -> None:
    lost, _ = trial.start(trial.beta, "--slice", "1/2", patch=HELD_SLICE)
    wait_until(lambda: len(shards_of(trial.output)) >= 3)
    other, other_log = trial.start(trial.alpha, "--slice", "0/2", patch=HELD_SLICE)
    wait_until(lambda: len(shards_of(trial.output)) >= 6)
    for host in (trial.alpha, trial.beta):
        said = trial.status(host)
        for part, name in (("0/2", "alpha"), ("1/2", "beta")):
            assert re.search(f"slice {part}: process [0-9]+ on {name}, since ", said), said
    check_refused(trial)
    trial.beta.kill()
    assert lost.poll() is not None
    trial.go()
    assert other.wait(PATIENCE) == 0, other_log.read_text()
    check_refused(trial)  # alpha cannot know that beta is dead
    claim = trial.output.with_name("out.h5.run") / "slices" / "1-of-2.claim"
    then = time.time() - STALE_SECONDS - 1
    os.utime(claim, (then, then))
    assert "not running" in trial.status(trial.alpha)
    code, said = trial.finish(trial.alpha, "--slice", "1/2")
    assert code == 0, said
    trial.check_end()


def check_refused(trial: Trial) -> None:
    """See that alpha leaves the slice of beta alone."""
    before = shards_of(trial.output)
    code, said = trial.finish(trial.alpha, "--slice", "1/2")
    assert code == 2, said
    assert re.search("slice 1/2.* process [0-9]+ on beta", said.splitlines()[-1]), said
    assert shards_of(trial.output) == before
