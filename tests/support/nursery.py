"""Real processes that run the command line, to be killed, interrupted and set against each other."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_server import ForkServer
from proteins import proteins_with_copies, write_fasta

from esm_packed.runners.output.reader import EmbeddingReader

MODEL = "demo"
WAIT_SECONDS = 120.0

# Computes as slowly as a large model would, so that others have the time to interfere.
SLOW = """
original_embed = ESM2.embed_packed
def slow_embed(self, batch, names, *rest):
    time.sleep({seconds})
    return original_embed(self, batch, names, *rest)
ESM2.embed_packed = slow_embed
"""

# Dies at the n-th operation that changes the file system; of a write, half has been done by then.
DIE_AT_STEP = """
STEP, ONLY = {step}, {only!r}
steps = []
def counted(name):
    original = getattr(os, name)
    def operation(*call, **options):
        target = " ".join(
            os.readlink(f"/proc/self/fd/{{path}}") if isinstance(path, int) else str(os.fspath(path))
            for path in call[: 2 if name in ("replace", "rename", "link") else 1]
        )
        if ONLY in target and (name != "open" or call[1] & os.O_CREAT):
            steps.append(f"{{name}} {{target}}")
            if len(steps) == STEP:
                if name == "pwrite":
                    original(call[0], bytes(call[1])[: len(call[1]) // 2], *call[2:])
                os.write(2, f"died at {{steps[-1]}}\\n".encode())
                os.kill(os.getpid(), 9)
        return original(*call, **options)
    setattr(os, name, operation)
for name in ("open", "pwrite", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "ftruncate"):
    counted(name)
main = cli.main
def main_and_count(arguments):
    try:
        return main(arguments)
    finally:
        os.write(2, f"steps {{len(steps)}}\\n".encode())
cli.main = main_and_count
"""


@dataclass
class Child:
    """A process that runs the command line."""

    nursery: Nursery
    pid: int
    log: Path

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Its exit code, negative for the signal that killed it."""
        code = self.nursery.server.wait(self.pid, seconds)
        if code is None:
            os.kill(self.pid, signal.SIGUSR1)  # says where all its threads are
            time.sleep(0.5)
            os.kill(self.pid, signal.SIGKILL)
            self.nursery.server.wait(self.pid, 10)
            pytest.fail(f"still running after {seconds} s:\n{self.output()}")
        return code

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def kill(self) -> int:
        """kill -9; the exit code, which is another one if it had ended before."""
        os.kill(self.pid, signal.SIGKILL)  # until it is waited for, a pid is not given to another process
        return self.wait()


class Nursery:
    """Starts processes that have everything imported already: that takes longer than the runs here."""

    def __init__(self) -> None:
        self.server = ForkServer("forked_command")
        self._number = 0

    def start(
        self,
        fasta: Path,
        output: Path,
        *options: str,
        flops_per_shard: float = 1.0,
        patch: str = "",
        command: str = "embed",
        **changes: Any,
    ) -> Child:
        """Embed `fasta`; by default each record is a shard of its own.

        Args:
            fasta: input.
            output: file to make.
            options: further ones of the command line.
            flops_per_shard: how finely to cut.
            patch: run in the process before it begins.
            command: in place of `embed`; without changes.
            changes: to the request, for what the command line need not offer.
        """
        self._number += 1
        log = output.parent / "logs" / f"{self._number}.log"
        log.parent.mkdir(exist_ok=True)
        arguments = [command, str(fasta), "-o", str(output), "--model", MODEL, "--device", "cpu"]
        job = {
            "arguments": [*arguments, "--threads", "1", "--token-budget", "256", *options],
            "log": str(log),
            "flops_per_shard": flops_per_shard,
            "patch": patch,
            "changes": changes,
        }
        return Child(self, self.server.start(job), log)

    def close(self) -> None:
        self.server.close()


@dataclass(frozen=True)
class Result:
    """What a run must reproduce."""

    ids: list[str]
    status: bytes
    lengths: bytes
    embeddings: bytes

    @classmethod
    def of(cls, path: Path) -> Result:
        with EmbeddingReader(path) as reader:
            embeddings = reader.embeddings()
            assert np.isfinite(embeddings).all()
            assert np.abs(embeddings).sum(axis=1).all(), "a row was never written"
            return cls(
                reader.sequence_ids(),
                reader.column("status").tobytes(),
                reader.column("lengths").tobytes(),
                embeddings.tobytes(),
            )


@dataclass(frozen=True)
class Work:
    """An input, and what an undisturbed run makes of it."""

    fasta: Path
    flops_per_shard: float
    expected: Result
    seconds: float
    num_shards: int


def undisturbed(nursery: Nursery, folder: Path, number: int, length: int, flops_per_shard: float) -> Work:
    fasta = write_fasta(folder / "in.fasta", proteins_with_copies(number, length))
    begin = time.monotonic()
    output = folder / "out.h5"
    child = nursery.start(fasta, output, flops_per_shard=flops_per_shard, keep_run=True)
    assert child.wait() == 0, child.output()
    seconds = time.monotonic() - begin
    return Work(fasta, flops_per_shard, Result.of(output), seconds, len(shards_of(output)))


def shards_of(output: Path) -> dict[str, tuple[int, int]]:
    """Finished shards, with what tells a file that was written again from one that was not."""
    folder = output.with_name(f"{output.name}.run") / "shards"
    if not folder.exists():
        return {}
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[0-9]*.shard")}


def names_in(folder: Path) -> list[str]:
    """What lies beside the output, without this test's own logs."""
    return sorted(path.name for path in folder.iterdir() if path.name != "logs")


def wait_until(condition: Any, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
