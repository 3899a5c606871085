"""The GPU script's table of commands: what fits into a call, and how the end of a command is read."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"

NCU = """\
==PROF== Connected to process 41
==PROF== Profiling "_bias_gelu_kernel": 0%....100% - 9 passes
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","41","_bias_gelu_kernel","GPU Speed Of Light Throughput","Duration","us","84.51",""
"0","41","_bias_gelu_kernel","Launch Statistics","Registers Per Thread","register/thread","32",""
"0","41","_bias_gelu_kernel","GPU Speed Of Light Throughput","","","","SOLBottleneck"
"1","41","_layer_norm_kernel","Launch Statistics","Waves Per SM","","3.88",""
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The table; the script's files find their neighbors beside them."""
    monkeypatch.syspath_prepend(str(GPU))
    yield importlib.import_module("commands")
    for name in ("commands", "process"):
        del sys.modules[name]


def test_every_phase_is_in_one_call_and_what_is_kept_for_its_steps_fits(script: Any) -> None:
    phases = ["setup", *(phase for call in script.CALLS for phase in call)]
    assert sorted(phases) == sorted(script.PHASES)
    assert {step.phase for step in script.STEPS} == set(script.PHASES)
    assert len({step.name for step in script.STEPS}) == len(script.STEPS)
    for call in script.CALLS:
        kept = sum(step.seconds for step in script.STEPS if step.phase in ("setup", *call))
        assert kept <= script.CALL_SECONDS, call
    assert len(script.CALLS) * script.CALL_SECONDS <= 30 * 60


def test_counters_are_read_from_between_the_lines_of_the_profiler(script: Any) -> None:
    gelu, norm = script.counters_of(NCU)
    assert gelu == {
        "kernel": "_bias_gelu_kernel",
        "metrics": {"Duration (us)": "84.51", "Registers Per Thread (register/thread)": "32"},
    }
    assert norm["metrics"] == {"Waves Per SM": "3.88"}
    assert script.counters_of("==ERROR== ERR_NVGPUCTRPERM\n") == []


@pytest.mark.parametrize(("code", "text", "status"), [(0, NCU, "passed"), (0, "", "not available")])
def test_a_machine_without_hardware_counters_is_no_failure(
    script: Any, tmp_path: Path, code: int, text: str, status: str
) -> None:
    process = importlib.import_module("process")
    check = process.Check(tmp_path, tmp_path, "cuda", time.monotonic() + 60, 1, "check.py", None)
    (step,) = [step for step in script.STEPS if step.name == "counters"]
    (tmp_path / "counters.csv").write_text(text)
    result = step.read(check, step, process.Done(code, "", False))
    assert result["status"] == status
    refused = step.read(check, step, process.Done(127, "env: ncu: No such file", False))
    assert refused["status"] == ("failed" if text else "not available")


def test_compiled_kernels_outlive_a_call_in_a_folder_that_git_ignores(script: Any, tmp_path: Path) -> None:
    process = importlib.import_module("process")
    check = process.Check(tmp_path, tmp_path, "cuda", time.monotonic(), 1, "check.py", None)
    root = GPU.parents[1]
    ignored = (root / ".gitignore").read_text().splitlines()
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(check.environment[variable]).relative_to(root)
        assert f"{folder.parts[0]}/" in ignored
