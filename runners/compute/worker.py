"""A worker on one device: its model, and for a run its pipeline and log."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch

from esm_packed.attention import select_backend
from esm_packed.checkpoints import Checkpoint
from esm_packed.errors import UsageError
from esm_packed.kernels import matmul
from esm_packed.layouts import LAYOUTS
from esm_packed.model import ESM2, load_in_fp32
from esm_packed.numerics import is_out_of_memory
from esm_packed.runners.compute.pipeline import OpenShard, PackTooLargeError, Pipeline
from esm_packed.runners.output.reuse import EarlierOutput
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.shard import Items, ShardInput, ShardWriter
from esm_packed.runners.state.slices import Slice
from esm_packed.runners.system.environment import num_cpus
from esm_packed.version import __version__

_GIVEN_AT_ONCE = 32
"""Sequences of an earlier output that are in memory at a time."""

THREADS_PER_CPU = 4
LEAST_MOST_THREADS = 64
"""Threads that are always allowed, however few CPUs the machine has."""


class Worker:
    """A model on a device, ready to compute shards.

    Args:
        request: how to compute.
        checkpoint: checkpoint of the model.
        device: the device to use.
        rank: number of the worker in its run, for the log.

    Raises:
        UsageError: the model does not fit into the memory of the device.
        BackendError: the attention backend cannot be used.
    """

    def __init__(
        self, request: EmbedRequest, checkpoint: Checkpoint, device: torch.device, rank: int = 0
    ) -> None:
        self.rank = rank
        self.request = request
        self._checkpoint = checkpoint
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

    def open(self, run: Run, on_pack: Callable[[int], None] = lambda residues: None) -> RunWorker:
        """Get ready to compute shards of `run`.

        Args:
            run: the run; its plan fixes what does not depend on the device.
            on_pack: called with the number of residues when a pack is done.
        """
        return RunWorker(self, run, on_pack)

    def load_fp32(self) -> ESM2:
        """Load the model in FP32, in addition to the one in use."""
        return load_in_fp32(self._checkpoint, self.model.device)

    @property
    def made_by(self) -> dict[str, str]:
        """The device and the versions that a shard records."""
        padded = self.request.layout == "padded"
        versions = {
            "esm-packed": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "h5py": h5py.__version__,
            "python": platform.python_version(),
        }
        disabled = [
            name
            for name, is_disabled in (("packing", padded), ("fp16", self.request.disable_fp16))
            if is_disabled
        ]
        return {
            "device": device_name(self.model.device),
            "attention_backend": LAYOUTS[self.request.layout].prepare(self.model).attention_backend,
            "matmul": matmul.describe(self.model.device, self.model.precision_mode.dtype),
            "versions": json.dumps(versions),
            "disabled": ", ".join(disabled),
        }


class RunWorker:
    """A worker with an open run, its pipeline and its log; see `Worker.open`.

    Attributes:
        run: the run.
        pipeline: the pipeline and its measurements.
    """

    def __init__(self, worker: Worker, run: Run, on_pack: Callable[[int], None]) -> None:
        request, plan = worker.request, run.plan
        self.run = run
        self._worker = worker
        self._earlier = EarlierOutput(request.reuse, plan.identity) if request.reuse is not None else None
        self._given: dict[int, Items] = {}
        self._log = _open_log(run.directory.logs_path, worker.rank, request.part)
        self.pipeline = Pipeline(
            worker.model,
            arrays=run.arrays,
            token_budget=plan.token_budget,
            windows=plan.windows,
            in_fp32=self._load_fp32 if worker.model.precision_mode.is_below_fp32 else None,
            on_pack=on_pack,
            layout=LAYOUTS[request.layout],
            cuda_graphs=request.cuda_graphs,
        )
        self._log.info("computing %s: %s", run.directory.path, json.dumps(worker.made_by))

    def compute(self, shards: Iterable[int]) -> None:
        """Compute `shards`, in this order, each to its file."""

        def inputs() -> Iterator[ShardInput]:
            for number in shards:
                self._log.info("shard %d: started", number)
                yield self._without_given(self.run.input_of(number, self._worker.request.fp32_compare))

        @contextmanager
        def output(number: int) -> Iterator[ShardWriter]:
            with self.run.output(number) as writer:
                writer.made_by = self._worker.made_by
                self._write_given(number, writer)
                yield writer
            self._log.info("shard %d: finished, %d sequences", number, writer.shape.num_items)

        self._compute(inputs(), output)

    def compute_piece(self, shard: int, first: int, last: int) -> None:
        """Compute the sequences [first, last) of those that a shard computes into a separate file."""

        @contextmanager
        def output(number: int) -> Iterator[ShardWriter]:
            with self.run.piece_output(number, first, last) as writer:
                writer.made_by = self._worker.made_by
                yield writer

        self._log.info("shard %d: started, only sequences %d to %d", shard, first, last)
        self._compute([self.run.input_of(shard).piece(first, last)], output)

    def _without_given(self, shard: ShardInput) -> ShardInput:
        """The shard without the sequences that an earlier output has."""
        if self._earlier is None:
            return shard
        rows = self._given[shard.number] = self._earlier.find(shard.token_ids)
        compared = [item for item in shard.compared if rows[item] < 0]
        return replace(shard, given=rows >= 0, compared=compared)

    def _write_given(self, number: int, writer: ShardWriter) -> None:
        """Write the sequences of a shard that an earlier output has."""
        if self._earlier is None:
            return
        rows = self._given.pop(number)
        items, names, times = np.flatnonzero(rows >= 0), list(writer.shape.arrays), self.pipeline.times
        for first in range(0, len(items), _GIVEN_AT_ONCE):
            part = items[first : first + _GIVEN_AT_ONCE]
            writer.write(part, self._earlier.outputs(rows[part], names))
        times.reused += len(items)
        times.reused_residues += int(self.run.item_lengths(number)[items].sum())

    def _compute(self, inputs: Iterable[ShardInput], output: OpenShard) -> None:
        try:
            self.pipeline.run(inputs, output)
        except PackTooLargeError as error:
            raise UsageError(
                f"--reproducible: a pack of {error.tokens:,} tokens does not fit into the memory of "
                f"{self._worker.model.device}, and packs must not be halved; choose a smaller --token-budget"
            ) from error
        except BaseException as error:
            self._log.error("stopped: %s: %s", type(error).__name__, error)
            raise
        finally:
            for handler in self._log.handlers:  # reopens its file for the next message
                handler.close()

    def _load_fp32(self) -> ESM2:
        model = self._worker.load_fp32()
        self._log.info("recomputing single sequences in fp32 on %s", model.device)
        return model


def _open_log(directory: Path, rank: int, part: Slice | None) -> logging.Logger:
    """The log of a worker; its file is created with the first message."""
    log = logging.getLogger(f"{__name__}.{rank}")
    for handler in log.handlers[:]:
        handler.close()
        log.removeHandler(handler)
    name = f"slice-{part.index}-of-{part.count}." if part else ""
    handler = logging.FileHandler(
        directory / f"{name}worker-{rank}.log", delay=True, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return log


def check_threads(threads: int | None) -> None:
    """Check that the machine can run so many CPU threads: a failure to start them ends the process.

    Raises:
        UsageError: there are many times more threads than CPUs.
    """
    cpus = num_cpus()
    most = max(LEAST_MOST_THREADS, THREADS_PER_CPU * cpus)
    if threads is not None and threads > most:
        raise UsageError(f"--threads {threads}: this machine has {cpus} CPUs; choose at most {most} threads")


def set_threads(threads: int | None) -> None:
    """Let torch compute with `threads` CPU threads; None leaves the choice to torch.

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
