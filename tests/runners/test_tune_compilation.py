"""Candidates are compiled ahead of the search, in other processes, and without being launched."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path

import pytest
import torch
from programs import run_python

from esm_packed.config import ESM2Config
from esm_packed.numerics import PRECISIONS
from esm_packed.runners.tuning_compilation import compiled_ahead
from esm_packed.runners.tuning_problems import problems

CPU = torch.device("cpu")
CONFIG = ESM2Config(num_layers=1, hidden_size=64, num_heads=2)
FP16 = [PRECISIONS["fp16"]]
SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.slow  # 8 s: five kernels are really compiled
def test_what_is_compiled_ahead_is_what_the_search_launches(tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = run_python(SUPPORT / "compile_ahead.py", environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {
        "could": [True] * 5,
        "ahead": 7,  # sums of attention maps are three
        "launched_ahead": 0,
        "later": 0,
        "launched": 7,
    }


@pytest.mark.slow  # 5 s: a process imports torch
def test_a_process_goes_through_the_candidates_in_order() -> None:
    """On a CPU it has nothing to compile."""
    work = problems([CONFIG], FP16, 40, CPU)
    with compiled_ahead([CONFIG], FP16, 40, CPU, work, jobs=1) as compiled:
        for number in range(len(work)):
            compiled(number)
    assert threading.active_count() == 1


def test_without_processes_nothing_is_waited_for() -> None:
    with compiled_ahead([CONFIG], FP16, 40, CPU, problems([CONFIG], FP16, 40, CPU)[:1], jobs=0) as compiled:
        compiled(99)
