"""The life of a process that runs a program with torch imported already; `programs` starts it."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch  # noqa: F401
from fork_server import redirect


def live(job: dict[str, Any]) -> int:
    """The life of the process; its exit code."""
    redirect(os.devnull, job["out"], job["err"])
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    program, *arguments = job["words"]
    try:
        if job["is_file"]:
            sys.argv, sys.path[0] = [program, *arguments], str(Path(program).parent)
            runpy.run_path(program, run_name="__main__")
        else:
            sys.argv, sys.path[0] = ["-c", *arguments], ""
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
