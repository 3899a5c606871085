"""Processes that compute packs from memory: every protein once, results in input order."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from contenders.processes import PlainProcesses
from workloads import proteins, write_fasta

from esm_packed import ESM2

pytestmark = pytest.mark.slow  # 14 s of CPU time

SEQUENCES = proteins("short50", 1000)


@pytest.mark.parametrize(("count", "at_once"), [(2, 1), (1, 2)])
def test_packs_are_dealt_out(count: int, at_once: int, tmp_path: Path) -> None:
    fasta = tmp_path / "in.fasta"
    write_fasta(fasta, SEQUENCES)
    with ExitStack() as stack:
        processes = PlainProcesses("demo", fasta, 200, stack, count=count, at_once=at_once, are_shared=True)
        processes.compute()
        means = processes.means()
    expected = np.stack(ESM2.from_pretrained("demo", device="cpu").embed(SEQUENCES))
    np.testing.assert_allclose(means, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
