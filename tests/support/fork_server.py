"""Imports what takes long once, and forks processes, each of which has a life and a death of its own.

`python fork_server.py MODULE` serves `ForkServer`: a job is a line of JSON on standard input, its answer a
line of JSON on standard output. `live` of the module is the life of a process that a job starts.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

Job = dict[str, Any]


class ForkServer:
    """The server as a process of its own.

    Args:
        module: of `tests/support`, with a function `live` that takes a job and returns an exit code.
    """

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask({"wait": 0, "seconds": 0})  # answers when everything is imported

    def start(self, job: Job) -> int:
        """Start a process; its pid."""
        pid: int = self._ask(job)
        return pid

    def wait(self, pid: int, seconds: float) -> int | None:
        """Exit code of a process, negative for a signal; None if it has not ended in time."""
        code: int | None = self._ask({"wait": pid, "seconds": seconds})
        return code

    def close(self) -> None:
        self._process.kill()  # an orderly end of torch takes seconds
        self._process.wait()

    def _ask(self, job: Job) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def redirect(*paths: str) -> None:
    """Have files as standard input, output and error; two may be the same."""
    for number, path in enumerate(paths):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)


def _fork(live: Callable[[Job], int], job: Job) -> int:
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


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _serve(live: Callable[[Job], int]) -> None:
    gc.collect()
    gc.freeze()  # or the first collection of every process copies all that is shared
    for line in sys.stdin:
        job = json.loads(line)
        answer = _wait(job["wait"], job["seconds"]) if "wait" in job else _fork(live, job)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(import_module(sys.argv[1]).live)
