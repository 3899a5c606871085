"""Programs in processes of their own that have torch imported already, which takes seconds."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

WAIT_SECONDS = 3600.0


@cache
def _server() -> ForkServer:
    server = ForkServer("forked_program")
    atexit.register(server.close)
    return server


def run_python(
    program: str | Path,
    *arguments: str | Path,
    cwd: str | Path = "/",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c PROGRAM` does, or a file as `python FILE` does, and wait for it.

    Args:
        program: code, or the path of a file.
        arguments: of the program.
        cwd: its working directory.
        environment: variables besides those of this process.
    """
    words = [str(program), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job: dict[str, Any] = {"words": words, "is_file": isinstance(program, Path), "cwd": str(cwd)}
        job |= {"out": str(out), "err": str(err), "environment": dict(environment or {})}
        pid = _server().start(job)
        code = _server().wait(pid, WAIT_SECONDS)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"still running after {WAIT_SECONDS} s: {err.read_text()}")
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())
