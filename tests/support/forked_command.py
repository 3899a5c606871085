"""The life of a process that runs the command line; `nursery` starts it.

Patches of the tests are executed in this module, so all that they change is imported here.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time  # noqa: F401
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_weights
import torch
from fork_server import redirect
from proteins import FEW_SHARDS, MANY_SHARDS, SHARDS_OF_RESIDUES, proteins_with_copies, write_fasta

from esm_packed.model import ESM2  # noqa: F401
from esm_packed.runners import session
from esm_packed.runners.cli import main as cli
from esm_packed.runners.compute import pipeline, worker  # noqa: F401
from esm_packed.runners.output import merge as merging  # noqa: F401
from esm_packed.runners.output import writer  # noqa: F401
from esm_packed.runners.state import cut, shard  # noqa: F401
from esm_packed.runners.state import directory as rundir  # noqa: F401
from esm_packed.runners.state import run as shards  # noqa: F401


def warm_up() -> None:
    """Run the command line on what most processes embed.

    A first run imports and sets up, and oneDNN compiles for each number of tokens.
    """
    torch.set_num_threads(1)
    options = ["--model", "demo", "--device", "cpu", "--threads", "1", "--token-budget", "256", "--quiet"]
    for number, length, flops_per_shard in (MANY_SHARDS, FEW_SHARDS, SHARDS_OF_RESIDUES):
        cut.FLOPS_PER_SHARD["cpu"] = flops_per_shard
        with tempfile.TemporaryDirectory() as folder:
            fasta = write_fasta(Path(folder, "in.fasta"), proteins_with_copies(number, length))
            output = Path(folder, "out.h5")
            with redirect_stdout(sys.stderr):  # standard output is the server's
                assert cli.main(["embed", str(fasta), "-o", str(output), *options]) == 0


demo_weights.install()
warm_up()


def live(job: dict[str, Any]) -> int:
    """The life of the process; its exit code."""
    redirect(os.devnull, job["log"], job["log"])
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    cut.FLOPS_PER_SHARD["cpu"] = job["flops_per_shard"]
    original = session.embed_files
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in job["changes"].items()
    }
    session.embed_files = lambda request, *rest: original(replace(request, **changes), *rest)
    exec(job["patch"], globals())
    return cli.main(job["arguments"])
