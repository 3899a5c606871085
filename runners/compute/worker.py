"""One device at work on a run: its model, its pipeline and its log."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch

from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint
from esm_packed.errors import UsageError
from esm_packed.layouts import LAYOUTS
from esm_packed.model import ESM2, load_in_fp32
from esm_packed.numerics import is_out_of_memory
from esm_packed.runners.compute.pipeline import Pipeline
from esm_packed.runners.state.request import STORE_DTYPES, EmbedRequest
from esm_packed.runners.state.run import Run, ShardInput
from esm_packed.runners.state.shard import Shard
from esm_packed.version import __version__

THREADS_PER_CPU = 4
LEAST_MOST_THREADS = 64
"""Threads that are allowed on any machine, however few CPUs it has."""


class Worker:
    """Computes shards on one device.

    Args:
        request: how.
        checkpoint: of the model.
        device: where.
        rank: number of the worker among those of its run, for the log.
        on_pack: told of residues as a pack of them is done.

    Raises:
        UsageError: the model does not fit into the memory of the device.
        BackendError: the attention backend cannot be used.
    """

    def __init__(
        self,
        request: EmbedRequest,
        checkpoint: Checkpoint,
        device: torch.device,
        rank: int = 0,
        on_pack: Callable[[int], None] = lambda residues: None,
    ) -> None:
        self.rank = rank
        self._request = request
        self._checkpoint = checkpoint
        self._on_pack = on_pack
        self._log = logging.getLogger(f"{__name__}.{rank}")
        precision = request.precision(device)
        backend = select_backend(request.attention, device, precision, checkpoint.config.head_dim)
        try:
            self.model = ESM2.from_checkpoint(checkpoint, device, precision, backend)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UsageError(
                f"{checkpoint.model_name} in {precision.name} does not fit into the memory of {device}"
            ) from error
        self.pipeline: Pipeline | None = None

    def begin(self, run: Run) -> None:
        """Get ready to compute shards of `run`, whose plan fixes what is not left to the device."""
        request, plan = self._request, run.plan
        self._open_log(run.directory.logs_path)
        self.pipeline = Pipeline(
            self.model,
            plan.layers,
            STORE_DTYPES[request.store_dtype],
            plan.token_budget,
            self._load_fp32 if self.model.precision_mode.is_below_fp32 else None,
            self._on_pack,
            LAYOUTS[request.layout],
            request.cuda_graphs,
        )
        self._log.info("works on %s: %s", run.directory.path, json.dumps(self.made_by))

    def compute(self, run: Run, shards: Iterable[int]) -> None:
        """Compute `shards`, in this order, and write each to its file."""

        def inputs() -> Iterable[ShardInput]:
            for number in shards:
                self._log.info("shard %d: begun", number)
                yield run.input_of(number, self._request.fp32_compare)

        def write(number: int, shard: Shard) -> None:
            made = replace(shard, made_by=self.made_by)
            run.write(number, made)
            self._log.info("shard %d: finished, %d sequences", number, len(shard.status))

        self._run(inputs(), write)

    def compute_part(self, run: Run, shard: int, first: int, last: int) -> Shard:
        """Compute the sequences [first, last) of those that a shard computes, without writing them."""
        whole = run.input_of(shard)
        self._log.info("shard %d: sequences %d to %d of it on their own", shard, first, last)
        results: list[Shard] = []
        self._run([ShardInput(shard, whole.token_ids[first:last])], lambda number, part: results.append(part))
        return replace(results[0], made_by=self.made_by)

    def _run(self, inputs: Iterable[ShardInput], write: Callable[[int, Shard], None]) -> None:
        assert self.pipeline is not None
        try:
            self.pipeline.run(inputs, write)
        except BaseException as error:
            self._log.error("stopped: %s: %s", type(error).__name__, error)
            raise
        finally:
            for handler in self._log.handlers:  # opens its file again when there is more to say
                handler.close()

    @property
    def made_by(self) -> dict[str, str]:
        """What of the device and the programs a shard should remember."""
        padded = self._request.layout == "padded"
        versions = {
            "esm-packed": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "h5py": h5py.__version__,
            "python": platform.python_version(),
        }
        disabled = [
            name
            for name, is_disabled in (("packing", padded), ("fp16", self._request.disable_fp16))
            if is_disabled
        ]
        return {
            "device": device_name(self.model.device),
            "attention_backend": LAYOUTS[self._request.layout].prepare(self.model).attention_backend,
            "versions": json.dumps(versions),
            "disabled": ", ".join(disabled),
        }

    def _load_fp32(self) -> ESM2:
        """The model in FP32, beside the one at work."""
        model = load_in_fp32(self._checkpoint, self.model.device)
        self._log.info("single sequences are computed anew in fp32 on %s", model.device)
        return model

    def _open_log(self, folder: Path) -> None:
        part = (
            f"slice-{self._request.part.index}-of-{self._request.part.count}." if self._request.part else ""
        )
        for handler in self._log.handlers[:]:
            handler.close()
            self._log.removeHandler(handler)
        handler = logging.FileHandler(
            folder / f"{part}worker-{self.rank}.log", delay=True, encoding="utf-8", errors="backslashreplace"
        )
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {self.rank} %(message)s"))
        self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._log.propagate = False


def check_threads(threads: int | None) -> None:
    """See that a machine can hold so many CPU threads: their start cannot fail without ending the process.

    Raises:
        UsageError: there are many times more than CPUs.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(LEAST_MOST_THREADS, THREADS_PER_CPU * cpus)
    if threads is not None and threads > most:
        raise UsageError(f"--threads {threads}: this machine has {cpus} CPUs; choose at most {most} threads")


def set_threads(threads: int | None) -> None:
    """Let torch compute with `threads` CPU threads; None leaves it its choice.

    Raises:
        UsageError: see `check_threads`.
    """
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    """As `cuda:0 (NVIDIA H200)` or `cpu (8 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' if threads > 1 else ''})"
