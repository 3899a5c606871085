"""Starts a Ray as `embed --engine ray` does; prints how others fare, without its token and with it.

Ray keeps the token that it finds when it is imported: hence a program, which imports it as late as `embed`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from esm_packed.checkpoints import load_checkpoint
from esm_packed.runners.compute.ray_engine import RayEngine
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.watch.console import Console


def enter(address: str) -> None:
    """Have the Ray at `address` compute."""
    import ray

    ray.init(address=address, log_to_driver=False)
    assert ray.get(ray.remote(lambda: 42).remote()) == 42


def own() -> None:
    """Start a Ray, and print the exit code of each of the others."""
    request = EmbedRequest(("in.fasta",), Path("out.h5"), model="demo", device="cpu", threads=1)
    with RayEngine(request, torch.device("cpu"), (), load_checkpoint("demo"), Console(quiet=True)):
        import ray

        known = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
        unknown = {name: value for name, value in os.environ.items() if name not in known}
        unknown["RAY_NUM_REDIS_GET_RETRIES"] = "1"  # of 20, a second each
        address = ray.get_runtime_context().gcs_address
        for environment in (unknown, dict(os.environ)):
            print(subprocess.run([sys.executable, __file__, address], env=environment).returncode)


if __name__ == "__main__":
    enter(sys.argv[1]) if len(sys.argv) > 1 else own()
