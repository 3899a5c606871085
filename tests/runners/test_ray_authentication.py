"""Who may use a Ray that is started here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nursery import names_in

pytest.importorskip("ray", reason="Ray is not installed")

DRIVER = Path(__file__).parents[1] / "support" / "ray_token.py"


@pytest.mark.slow  # 17 s
def test_nobody_without_the_token_may_use_a_cluster_that_is_started_here(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "disabled",  # as for another cluster
        "RAY_gcs_rpc_server_connect_timeout_s": "1",  # how long a stranger tries
    }
    done = subprocess.run(
        [sys.executable, str(DRIVER)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "0"], done.stderr
    assert "Authentication token is missing or incorrect" in done.stderr
    assert names_in(tmp_path) == [], "a token in the home directory may be read by others"
