"""Imports everything once and forks processes that run the command line; `nursery` talks to it.

A job is a line of JSON on standard input, its answer a line of JSON on standard output. Patches of the
tests are executed in this module, so all that they change is imported here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import torch

from esm_packed.model import ESM2
from esm_packed.runners import session
from esm_packed.runners.cli import main as cli
from esm_packed.runners.compute import pipeline, worker  # noqa: F401
from esm_packed.runners.output import merge as merging  # noqa: F401
from esm_packed.runners.output import writer  # noqa: F401
from esm_packed.runners.state import cut, shard  # noqa: F401
from esm_packed.runners.state import directory as rundir  # noqa: F401
from esm_packed.runners.state import run as shards  # noqa: F401


def live(job: dict[str, Any]) -> int:
    """The life of a forked process; its exit code."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, stream in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, stream)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    cut.FLOPS_PER_SHARD["cpu"] = job["flops_per_shard"]
    original = session.embed_files
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in job["changes"].items()
    }
    session.embed_files = lambda request, *rest: original(replace(request, **changes), *rest)
    exec(job["patch"], globals())
    return cli.main(job["arguments"])


def fork(job: dict[str, Any]) -> int:
    """Start a process; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = live(job)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid: int, seconds: float) -> int | None:
    """Exit code of a process, negative for a signal; None if it has not ended in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def main() -> None:
    torch.set_num_threads(1)
    ESM2.from_pretrained("demo", device="cpu")
    for line in sys.stdin:
        job = json.loads(line)
        answer = wait(job["wait"], job["seconds"]) if "wait" in job else fork(job)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
