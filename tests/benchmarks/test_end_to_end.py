"""The rows of an output are held against FP64 before its making is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from workloads import proteins

from esm_packed import ESM2

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

SEQUENCES = proteins("short50", 1500)
Rows = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def right() -> Rows:
    return np.stack(ESM2.from_pretrained("demo", dtype="fp32", device="cpu").embed(SEQUENCES))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows, unchecked: None, None),
        (lambda rows, unchecked: rows[0].__imul__(1.001), "relative_error to FP64 is 1.0e-03"),
        (lambda rows, unchecked: rows[-1].__imul__(1.001), "relative_error to FP64 is 1.0e-03"),
        (lambda rows, unchecked: rows[unchecked].fill(np.nan), "not finite"),
        (lambda rows, unchecked: np.multiply(rows, 2, out=rows), "relative_error to FP64 is 1.0e"),
    ],
    ids=["right", "first", "last", "nan", "twice"],
)
def test_rows_are_checked(
    spoil: Callable[[Rows, int], None], message: str | None, right: Rows, tmp_path: Path
) -> None:
    bench = importlib.import_module("bench_end_to_end")
    unchecked = set(range(len(SEQUENCES))) - set(bench.checked_indices(SEQUENCES))
    rows = right.copy()
    spoil(rows, max(unchecked))
    with h5py.File(tmp_path / "out.h5", "w") as file:
        file["embeddings"] = rows
        file.attrs["attention_backend"] = "sdpa"
    if message is None:
        found = bench.checked_output(tmp_path / "out.h5", "demo", SEQUENCES, "fp32")
        assert 0 < found["relative_error"] <= 1e-5
        assert found["backend"] == "sdpa"
    else:
        with pytest.raises(AssertionError, match=message):
            bench.checked_output(tmp_path / "out.h5", "demo", SEQUENCES, "fp32")
