"""esm-cpp as a provider: a worker process with its own interpreter, kept alive from block to block."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.packages import hub_tensors, token_ids_with_ends
from safetensors.torch import save_file

from esm_packed.checkpoints import load_checkpoint

WORKER = Path(__file__).with_name("esm_cpp_worker.py")


class EsmCpp:
    """esm-cpp's `forward_scheduled`: packed, all sequences in one call, logits instead of means.

    This call returns no pooled or hidden states. `embeddings`, for the check, are means of its
    `forward_with_hidden_states`, one sequence at a time; `logits` are those of the timed call. It ignores the
    rotary frequencies of the checkpoint and computes unrounded ones.
    """

    token_budget = 0
    """It forms batches itself."""

    rounded_frequencies = False
    weight_bytes = 0
    """They are in the worker's memory."""

    def __init__(self, model_name: str, python: str, threads: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._exchange = Path(self._directory.name) / "exchange.npz"
        weights = Path(self._directory.name) / "model.safetensors"
        save_file(hub_tensors(load_checkpoint(model_name).tensors), weights)
        self._worker = subprocess.Popen(
            [python, str(WORKER), str(weights)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "ESM_NUM_THREADS": str(threads)},
        )
        about = self._answer()
        self.backend = f"forward_scheduled, {about['isa']}, {about['threads']} threads"
        self.padded_tokens = 0
        self.seconds_inside = 0.0

    def prepare(self, sequences: Sequence[str]) -> None:
        token_ids = [token_ids_with_ends(sequence).int().numpy() for sequence in sequences]
        np.savez(self._exchange, **{str(index): ids for index, ids in enumerate(token_ids)})
        self._ask("prepare")
        self.padded_tokens = sum(len(ids) for ids in token_ids)

    def run(self) -> None:
        self.seconds_inside = self._ask("run")["seconds"]

    def embeddings(self) -> torch.Tensor:
        self._ask("embeddings")
        return torch.stack(self._arrays())

    def logits(self) -> list[torch.Tensor]:
        self._ask("logits")
        return self._arrays()

    def close(self) -> None:
        """Stop the worker."""
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait(timeout=60)
        self._directory.cleanup()

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps({"do": what, "path": str(self._exchange)}) + "\n")
        self._worker.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._worker.stdout is not None
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError(f"esm-cpp's worker ended, exit code {self._worker.wait()}; see its messages")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _arrays(self) -> list[torch.Tensor]:
        with np.load(self._exchange) as file:
            return [torch.from_numpy(file[str(index)]) for index in range(len(file.files))]
