"""What the benchmark of the runner holds its rows against."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")


def test_rows_are_held_against_proteins_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("bench_runner")
    alone = {"M": np.array([3.0, -4.0], np.float32), "K": np.array([1.0, 2.0], np.float32)}
    model = SimpleNamespace(embed=lambda sequences: [alone[sequence] for sequence in sequences])
    rows = np.stack([alone["M"], alone["K"]])
    assert bench.check_rows(rows, model, ["M", "K"]) == 0.0
    with_nan = np.where(rows == 2.0, np.float32("nan"), rows)
    for wrong in (rows[::-1].copy(), rows * np.float32(1.001), with_nan):
        with pytest.raises(AssertionError, match="relative error is"):
            bench.check_rows(wrong, model, ["M", "K"])
    monkeypatch.setattr(bench, "MAX_RELATIVE_ERROR", 2.0)
    assert bench.check_rows(2 * rows, model, ["M", "K"]) == 1.0
