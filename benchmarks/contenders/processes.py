"""Processes that compute packs from memory, without the runner: what the cores of a machine can do."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

_PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy, torch
from esm_packed.alphabet import encode
from esm_packed.model import ESM2
from esm_packed.packing import SPECIAL_TOKENS, pack, plan_packs
model_name, fasta, *numbers = sys.argv[1:]
token_budget, threads, at_once, first, step = map(int, numbers)
torch.set_num_threads(threads)
model = ESM2.from_pretrained(model_name, device="cpu")
proteins = [encode(line) for line in open(fasta).read().split("\\n")[1::2]]
packs = plan_packs([len(each) + SPECIAL_TOKENS for each in proteins], token_budget)[first::step]
batches = [pack([proteins[member] for member in members]) for members in packs]
name = f"mean/{model.config.num_layers}"
compute = lambda batch: model.embed_packed(batch, [name])[name]
each = ThreadPoolExecutor(at_once).map if at_once > 1 else map
list(each(compute, batches[:1] * at_once))
print("ready", flush=True)
for line in sys.stdin:
    if path := line.strip():
        means.append(numpy.zeros((0, model.config.hidden_size), numpy.float32))  # there may be no pack
        members = numpy.concatenate([*packs, numpy.zeros(0, numpy.int64)])
        numpy.savez(path, means=numpy.concatenate(means), members=members)
    else:
        means = list(each(compute, batches))
    print("done", flush=True)
"""


class PlainProcesses:
    """Processes that have a model and packs ready, and compute them whenever asked.

    Args:
        model: as for `ESM2.from_pretrained`.
        fasta: the proteins, each on one line.
        token_budget: tokens in a pack.
        stack: ends the processes.
        count: number of processes.
        threads: CPU threads that compute a pack.
        at_once: packs that a process computes at the same time.
        are_shared: deal the packs out; otherwise each process computes all of them.
    """

    def __init__(
        self,
        model: str,
        fasta: Path,
        token_budget: int,
        stack: ExitStack,
        *,
        count: int = 1,
        threads: int = 1,
        at_once: int = 1,
        are_shared: bool = False,
    ) -> None:
        self._folder = fasta.parent
        self._processes = []
        for rank in range(count):
            first, step = (rank, count) if are_shared else (0, 1)
            numbers = map(str, (token_budget, threads, at_once, first, step))
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, model, str(fasta), *numbers],
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._processes.append(stack.enter_context(process))
        self._wait_for("ready")

    def compute(self) -> None:
        """Compute all packs once; return when every process has."""
        self._ask([""] * len(self._processes))

    def means(self) -> npt.NDArray[np.float32]:
        """(num_sequences, hidden_size) means of shared packs, in input order, of the last `compute`."""
        paths = [self._folder / f"means-{rank}.npz" for rank in range(len(self._processes))]
        self._ask([str(path) for path in paths])
        found = [np.load(path) for path in paths]
        order = np.argsort(np.concatenate([each["members"] for each in found]))
        means: npt.NDArray[np.float32] = np.concatenate([each["means"] for each in found])[order]
        return means

    def _ask(self, lines: list[str]) -> None:
        for process, line in zip(self._processes, lines, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        self._wait_for("done")

    def _wait_for(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == word
