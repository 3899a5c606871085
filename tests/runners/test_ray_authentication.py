"""Who may use a Ray that is started here; in a process of its own, as Ray reads what concerns this once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nursery import names_in

pytest.importorskip("ray", reason="Ray is not installed")


def test_nobody_without_the_token_may_use_a_cluster_that_is_started_here(tmp_path: Path) -> None:
    driver = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from esm_packed.runners.session import EmbedRequest\n"
        "from esm_packed.runners.watch.console import Console\n"
        "from esm_packed.runners.compute.ray_engine import RayEngine\n"
        "from esm_packed.checkpoints import load_checkpoint\n"
        "request = EmbedRequest(('in.fasta',), Path('out.h5'), model='demo', device='cpu', threads=1)\n"
        "checkpoint = load_checkpoint('demo')\n"
        "with RayEngine(request, torch.device('cpu'), (), checkpoint, Console(quiet=True)):\n"
        "    import ray\n"
        "    known = {name: value for name, value in os.environ.items() if name.startswith('RAY_AUTH')}\n"
        "    unknown = {name: value for name, value in os.environ.items() if name not in known}\n"
        "    address = ray.get_runtime_context().gcs_address\n"
        "    for env in (unknown, os.environ):\n"
        "        print(subprocess.run([sys.executable, '-c', sys.argv[1], address], env=env).returncode)\n"
    )
    stranger = (
        "import sys, ray\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "assert ray.get(ray.remote(lambda: 42).remote()) == 42\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "disabled",  # as for another cluster
        "RAY_gcs_rpc_server_connect_timeout_s": "1",  # how long a stranger tries
    }
    done = subprocess.run(
        [sys.executable, "-c", driver, stranger],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "0"], done.stderr
    assert "Authentication token is missing or incorrect" in done.stderr
    assert names_in(tmp_path) == [], "a token in the home folder may be read by others"
