"""FASTA files to one HDF5 file of embeddings, on one device."""

from __future__ import annotations

import errno
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from esm_packed.attention import select_backend
from esm_packed.config import DEFAULT_MODEL, DEFAULT_TOKEN_BUDGETS
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS, Precision, resolve_device, resolve_precision
from esm_packed.packing import packing_efficiency
from esm_packed.runners.fasta import ReadOptions
from esm_packed.runners.index import STDIN, FastaIndex, build_index, open_index
from esm_packed.runners.pipeline import Pipeline, StageTimes
from esm_packed.runners.plan import FLOPS_PER_SHARD, Plan, PlanError, cut_shards
from esm_packed.runners.progress import Console, byte_size, duration
from esm_packed.runners.rundir import ClaimedError, RunDirectory
from esm_packed.runners.shards import Run, compute_shards, merge
from esm_packed.runners.store import (
    FORMAT_VERSION,
    STATUS_FAILED,
    STATUS_RECOMPUTED,
    EmbeddingReader,
    EmbeddingWriter,
    Shard,
    StoredProblem,
    StoreError,
    bytes_needed,
    plan_hash,
    whole_or_nothing,
)
from esm_packed.version import __version__
from esm_packed.weights import load_checkpoint

STORE_DTYPES = {"fp32": "float32", "fp16": "float16"}


class UsageError(ValueError):
    """The user's mistake; `str(error)` is the full message for the terminal."""


@dataclass(frozen=True)
class EmbedRequest:
    """What `esm-packed embed` is asked to do.

    Args:
        inputs: FASTA files, `-` for standard input.
        output: the HDF5 file to make.
        model: as `ESM2.from_pretrained` takes it.
        device: auto, cpu, cuda or cuda:INDEX.
        dtype: precision mode, or None for the device's default.
        attention: attention backend, or auto.
        layers: layers to keep, negative ones counted from the last; the last one listed is `embeddings`.
        max_length: residues kept of each sequence; 0 keeps all.
        token_budget: tokens in a pack, BOS and EOS included; None for the device's default.
        read: the rules for the input.
        threads: CPU threads, or None for torch's choice.
        store_dtype: fp32 or fp16, of the stored embeddings.
        overwrite: replace an output, or a run directory, of another run.
        keep_run: leave the run directory when the output is made.
    """

    inputs: tuple[str, ...]
    output: Path
    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str | None = None
    attention: str = "auto"
    layers: tuple[int, ...] = (-1,)
    max_length: int = 1022
    token_budget: int | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    threads: int | None = None
    store_dtype: str = "fp32"
    overwrite: bool = False
    keep_run: bool = False


@dataclass
class Summary:
    """What a run did; `already_complete` when the output was there and nothing had to be done."""

    output: Path
    model: ESM2
    device: str
    token_budget: int
    num_sequences: int
    num_residues: int
    num_replaced: int
    num_duplicates: int
    num_left_out: int
    num_identical: int = 0
    num_truncated: int = 0
    num_recomputed: int = 0
    num_failed: int = 0
    stages: StageTimes = field(default_factory=StageTimes)
    seconds: float = 0.0
    embedding_seconds: float = 0.0
    is_merged: bool = False
    already_complete: bool = False

    @property
    def packing_efficiency(self) -> float:
        """Tokens over (packs x budget), without the packs of one sequence longer than the budget."""
        return packing_efficiency(self.stages.pack_tokens, self.token_budget)

    def lines(self) -> list[str]:
        """The summary for the terminal."""
        stages = self.stages
        overlong = sum(tokens > self.token_budget for tokens in stages.pack_tokens)
        packs = f"{len(stages.pack_tokens):,} of up to {self.token_budget:,} tokens"
        if overlong:
            packs += f", {overlong:,} of them one longer sequence"
        values = {
            "sequences": f"{self.num_sequences:,}",
            "residues": f"{self.num_residues:,}",
            "truncated": f"{self.num_truncated:,}",
            "replaced": f"{self.num_replaced:,}",
            "duplicates": f"{self.num_duplicates:,}",
            "identical": f"{self.num_identical:,} copied from an equal sequence",
            "left out": f"{self.num_left_out:,}",
            "recomputed": f"{self.num_recomputed:,} in fp32",
            "failed": f"{self.num_failed:,}",
            "packs": packs,
            "packing efficiency": f"{self.packing_efficiency:.1%}",
            "wall time": f"{duration(self.seconds)}, embedding {duration(self.embedding_seconds)}",
            "stages": stages.describe(),
            "residues/s": f"{stages.residues / max(stages.wall, 1e-9):,.0f}",
            "model": f"{self.model.model_name} (sha256 {self.model.model_sha256[:16]})",
            "dtype": self.model.precision,
            "device": self.device,
            "attention": self.model.attention_backend,
            "output": f"{self.output} ({byte_size(self.output.stat().st_size)})",
        }
        return [f"{name:<20}{value}" for name, value in values.items()]


def embed_files(request: EmbedRequest, console: Console) -> Summary:
    """Embed every record of `request.inputs` into `request.output`, which appears only when it is whole.

    The work is done in the run directory `OUTPUT.run`. If one is there, the run it holds is continued.

    Raises:
        UsageError: an option does not fit the model or the device, the output cannot be where it should, or
            the run directory belongs to another run or process.
        InputError: a fault in a FASTA file.
        CheckpointError: the model is missing or damaged.
        BackendError: the attention backend cannot be used.
        OSError: with `errno.ENOSPC` when the disk is, or will be, full.
    """
    begin = time.monotonic()
    output = request.output.resolve()
    try:
        existing_plan = check_output(output, request.inputs, request.overwrite)
    except OSError as error:  # no right to look there, a name too long
        raise UsageError(f"{output}: {error.strerror}") from error
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    try:
        device = resolve_device(request.device)
        precision = resolve_precision(request.dtype, device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    select_backend(request.attention, device, precision, head_dim=64)  # fails before the input is read

    directory = RunDirectory(output)
    with _claimed(directory):
        summary = _run(request, directory, device, precision, existing_plan, console)
    summary.seconds = time.monotonic() - begin
    return summary


@contextmanager
def _claimed(directory: RunDirectory) -> Iterator[None]:
    """Hold the run directory; one that has no plan when the block fails is removed."""
    claim = directory.claim()
    try:
        claim.acquire()
        directory.create()
    except ClaimedError as holder:
        raise UsageError(
            f"{directory.path} is being worked on by {holder}; wait for it, or delete {claim.path} if that "
            "process is gone"
        ) from holder
    except OSError as error:
        claim.release()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"{directory.output.parent}: cannot be written to: {error.strerror}") from error
    try:
        yield
    except BaseException:
        if not directory.plan_path.exists():
            directory.remove()
        raise
    finally:
        claim.release()


def _run(
    request: EmbedRequest,
    directory: RunDirectory,
    device: torch.device,
    precision: Precision,
    existing_plan: str | None,
    console: Console,
) -> Summary:
    """Index, plan, compute what is left, and merge; the caller holds the claim."""
    index = None
    if STDIN not in request.inputs:
        index = open_index(request.inputs, directory.index_path, request.read)
    if index is None:
        with console.progress("reading", "B", _input_bytes(request.inputs)) as advance:
            index = build_index(request.inputs, directory.index_path, request.read, progress=advance)
    model, layers = _load_model(request, device, precision, console)
    summary = Summary(
        output=request.output,
        model=model,
        device=_device_name(device),
        token_budget=request.token_budget or DEFAULT_TOKEN_BUDGETS[device.type],
        num_sequences=index.num_records,
        num_residues=index.total_residues,
        num_replaced=index.num_replaced,
        num_duplicates=index.num_duplicates,
        num_identical=index.num_identical,
        num_left_out=len(index.problems),
    )
    plan = _plan(request, directory, index, model, layers, summary, existing_plan)
    if plan is None:
        with EmbeddingReader(request.output) as reader:
            summary.num_failed = int(np.count_nonzero(reader.column("status") == STATUS_FAILED))
        summary.already_complete = True
        if not request.keep_run:
            directory.remove()
        return summary

    run = Run(directory, plan, index, request.max_length)
    shards = range(plan.num_shards)
    left = [shard for shard in shards if run.read(shard) is None]
    needed = bytes_needed(
        index.num_records, model.config.hidden_size, len(layers), STORE_DTYPES[request.store_dtype]
    )
    check_space(directory.output.parent, needed + needed * len(left) // len(shards), console)
    if len(left) < len(shards):
        console.note(f"continuing: {len(shards) - len(left):,} of {len(shards):,} shards are finished")
    console.note(
        f"embedding {index.num_records:,} sequences, {index.total_residues:,} residues, with "
        f"{model.model_name} ({model.precision}, attention {model.attention_backend}) on {summary.device}"
    )
    while left:
        _compute(request, run, left, model, layers, summary, console)
        left = _merge(request, run, model, layers, summary, console)
    if not summary.is_merged:
        _merge(request, run, model, layers, summary, console)
    if not request.keep_run:
        directory.remove()
    return summary


def _plan(
    request: EmbedRequest,
    directory: RunDirectory,
    index: FastaIndex,
    model: ESM2,
    layers: Sequence[int],
    summary: Summary,
    existing_output: str | None,
) -> Plan | None:
    """The plan that is there, if it is this run's, or a new one; None if the output is complete already."""
    try:
        plan = Plan.read(directory.plan_path)
        if request.token_budget is None:
            summary.token_budget = plan.identity["token_budget"]
    except FileNotFoundError:
        plan = None
    except PlanError as error:
        if not request.overwrite:
            raise UsageError(str(error)) from error
        plan = None
    identity = run_identity(request, index, model, layers, summary.token_budget)
    if existing_output is not None:
        if existing_output != plan_hash(identity):
            raise UsageError(
                f"{request.output}: exists already, made from other input or options; --overwrite replaces it"
            )
        return None
    if plan is not None:
        try:
            plan.check_same(identity, directory.path)
            return plan
        except PlanError as error:
            if not request.overwrite:
                raise UsageError(str(error)) from error
    run = Run(directory, Plan(identity, request.inputs, (0, index.num_records)), index, request.max_length)
    starts = cut_shards(
        run.embedded_lengths(0, index.num_records),
        run.is_computed(0, index.num_records),
        model.config,
        model.config.hidden_size * len(layers) * np.dtype(STORE_DTYPES[request.store_dtype]).itemsize,
        FLOPS_PER_SHARD[model.device.type],
    )
    plan = Plan(identity, request.inputs, starts)
    directory.forget_shards()
    plan.write(directory.plan_path)
    return plan


def _compute(
    request: EmbedRequest,
    run: Run,
    shards: Sequence[int],
    model: ESM2,
    layers: Sequence[int],
    summary: Summary,
    console: Console,
) -> None:
    begin = time.monotonic()

    def in_fp32() -> ESM2:
        console.note("loading the model in fp32, to recompute what is not finite")
        fp32_request = replace(request, dtype="fp32", attention="auto")
        return _load_model(fp32_request, model.device, PRECISIONS["fp32"], console)[0]

    total = sum(
        int(
            run.embedded_lengths(*run.plan.records(shard))[
                run.computed(shard) - run.plan.records(shard)[0]
            ].sum()
        )
        for shard in shards
    )
    with console.progress("embedding", "residues", total) as advance:
        pipeline = Pipeline(
            model,
            layers,
            STORE_DTYPES[request.store_dtype],
            summary.token_budget,
            in_fp32 if model.precision in ("fp16", "bf16", "tf32") else None,
            advance,
        )
        compute_shards(run, shards, pipeline)
    summary.embedding_seconds += time.monotonic() - begin
    summary.stages.add(pipeline.times)


def _merge(
    request: EmbedRequest, run: Run, model: ESM2, layers: Sequence[int], summary: Summary, console: Console
) -> list[int]:
    """Make the output of the finished shards.

    Returns:
        Shards whose files turned out to be damaged; the output is made if there is none.
    """
    damaged: list[int] = []

    def read(number: int) -> Shard:
        shard = run.read(number)
        if shard is None:
            damaged.append(number)
            raise StoreError(f"shard {number} is damaged")
        return shard

    index = run.index
    output = run.directory.output
    left_out = [StoredProblem(left.sequence_id, left.file, left.line, left.reason) for left in index.problems]
    store_dtype = STORE_DTYPES[request.store_dtype]
    total = index.num_records * model.config.hidden_size * len(layers) * np.dtype(store_dtype).itemsize
    try:
        with (
            whole_or_nothing(output, overwrite=request.overwrite) as temporary,
            EmbeddingWriter(
                temporary,
                num_sequences=index.num_records,
                hidden_size=model.config.hidden_size,
                layers=layers,
                store_dtype=store_dtype,
            ) as writer,
            console.progress("merging", "B", total) as advance,
        ):
            writer.write_problems(left_out)
            merge(run, read, writer, layers, advance)
            writer.write_plan(run.plan.identity, run.plan.input_names)
            writer.write_attributes(_attributes(request, model, summary))
    except StoreError:
        if damaged:
            return damaged
        raise
    summary.is_merged = True
    with EmbeddingReader(output) as reader:
        status = reader.column("status")
        summary.num_failed = int(np.count_nonzero(status == STATUS_FAILED))
        summary.num_recomputed = int(np.count_nonzero(status == STATUS_RECOMPUTED))
        summary.num_truncated = int(np.count_nonzero(reader.column("truncated")))
    return []


def check_output(output: Path, inputs: Sequence[str], overwrite: bool) -> str | None:
    """See that `output` can be made.

    Returns:
        The plan hash of the esm-packed output that is already there and may not be replaced, else None.

    Raises:
        UsageError: it cannot be made, or what is there is something else.
    """
    if output.is_dir():
        raise UsageError(f"{output}: this is a directory; name the file to make, such as embeddings.h5")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: there is no such folder to write {output.name} to")
    if not output.exists():
        return None
    if not output.is_file():
        raise UsageError(f"{output}: exists and is no regular file")
    if any(path != STDIN and Path(path).exists() and output.samefile(path) for path in inputs):
        raise UsageError(f"{output}: the output would replace an input")
    if overwrite:
        return None
    try:
        with EmbeddingReader(output) as reader:
            return str(reader.attributes["plan_hash"])
    except (StoreError, OSError):
        raise UsageError(
            f"{output}: exists already and is not a whole esm-packed output; --overwrite replaces it"
        ) from None


def _load_model(
    request: EmbedRequest, device: torch.device, precision: Precision, console: Console
) -> tuple[ESM2, list[int]]:
    with console.byte_steps() as report:
        checkpoint = load_checkpoint(request.model, progress=report)
    backend = select_backend(request.attention, device, precision, checkpoint.config.head_dim)
    try:
        model = ESM2.from_checkpoint(checkpoint, device, precision, backend)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{request.model} in {precision.name} does not fit into the memory of {device}"
        ) from error
    try:
        layers = [model.resolve_layer(layer) for layer in request.layers]
    except ValueError as error:
        raise UsageError(f"--layers: {error}") from error
    # of a layer listed twice the last mention counts: it says which one `embeddings` is
    return model, list(dict.fromkeys(reversed(layers)))[::-1]


def _input_bytes(inputs: Sequence[str]) -> int | None:
    paths = [Path(path) for path in inputs]
    return sum(path.stat().st_size for path in paths) if all(path.is_file() for path in paths) else None


def run_identity(
    request: EmbedRequest, index: FastaIndex, model: ESM2, layers: Sequence[int], token_budget: int
) -> dict[str, Any]:
    """What makes two runs the same one; device, attention backend and versions may differ."""
    return {
        "format_version": FORMAT_VERSION,
        "inputs": [{"size": file.size, "sha256": file.sha256} for file in index.inputs],
        "model_sha256": model.model_sha256,
        "dtype": model.precision,
        "layers": list(layers),
        "kinds": ["mean"],
        "max_length": request.max_length,
        "token_budget": token_budget,
        "invalid": request.read.invalid,
        "duplicates": request.read.duplicates,
        "gaps": request.read.gaps,
        "full_header": request.read.full_header,
        "store_dtype": request.store_dtype,
        "reproducible": False,
    }


def check_space(folder: Path, needed: int, console: Console) -> None:
    """Say what the output takes and what is free.

    Raises:
        OSError: ENOSPC, when that is too little.
    """
    free = shutil.disk_usage(folder).free
    sizes = f"the output takes about {byte_size(needed)}; {byte_size(free)} are free in {folder}"
    if needed > free:
        raise OSError(errno.ENOSPC, sizes)
    console.note(sizes)


def _attributes(request: EmbedRequest, model: ESM2, summary: Summary) -> dict[str, str | int]:
    packing = {
        "algorithm": "first-fit decreasing",
        "token_budget": summary.token_budget,
    }
    versions = {
        "esm-packed": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "python": platform.python_version(),
    }
    return {
        "model_name": model.model_name,
        "model_sha256": model.model_sha256,
        "dtype": model.precision,
        "store_dtype": request.store_dtype,
        "max_length": request.max_length,
        "attention_backend": model.attention_backend,
        "device": summary.device,
        "packing": json.dumps(packing),
        "versions": json.dumps(versions),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' if threads > 1 else ''})"
