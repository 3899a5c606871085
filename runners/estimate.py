"""`esm-packed embed --estimate`: what a run would compute, how long it would take, and its output size."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm_packed.checkpoints import Checkpoint, load_checkpoint
from esm_packed.layouts import LAYOUTS
from esm_packed.model import ESM2
from esm_packed.packing import SPECIAL_TOKENS, default_token_budget
from esm_packed.runners.checks import (
    check_device,
    check_heads,
    check_request,
    first_device,
    gpu_numbers,
)
from esm_packed.runners.compute.budget import measured_token_budget
from esm_packed.runners.compute.worker import Worker, device_name, set_threads
from esm_packed.runners.input.build import build_index
from esm_packed.runners.output.joining import wants_parts
from esm_packed.runners.output.reuse import EarlierOutput
from esm_packed.runners.planning import input_bytes, new_plan, run_identity, run_of
from esm_packed.runners.product import EmbeddingOutput, Product
from esm_packed.runners.state.cut import sequence_flops
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.system.paths import resolved
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console, byte_size, duration

MEASURED_PACKS = 5
MEASURED_SECONDS = 20.0
"""No further pack is timed after this many seconds."""


def estimate(request: EmbedRequest, console: Console, product: Product | None = None) -> list[str]:
    """Read the input, plan, and time a few packs of it; only temporary files are written.

    Args:
        request: the run.
        console: shows the progress of reading.
        product: what the run produces; None for a file of embeddings.

    Returns:
        Lines for the terminal.

    Raises:
        UsageError, InputError, CheckpointError, BackendError: as for `session.embed_files`.
    """
    product = product or EmbeddingOutput(request)
    check_request(request)
    product.existing(resolved(request.output), overwrite=True)
    device = first_device(request)
    check_device(request, device)
    with tempfile.TemporaryDirectory(prefix="esm-packed-") as scratch:
        directory = RunDirectory(Path(scratch) / request.output.name)
        directory.make()
        with console.progress("reading", "B", input_bytes(request.inputs)) as advance:
            index = build_index(request.inputs, directory.index_path, request.read, progress=advance)
        with console.byte_steps() as report:
            checkpoint = load_checkpoint(request.model, progress=report)
        check_heads(request, checkpoint)
        set_threads(request.threads)
        model = Worker(request, checkpoint, device).model
        identity = {
            **run_identity(request, index, checkpoint, device, _token_budget(request, model)),
            **product.identity(index),
        }
        queries = product.queries(index)
        plan = new_plan(identity, index, checkpoint, device, directory, request.command, queries)
        run = run_of(directory, plan, index, queries)
        lines = _lines(request, run, checkpoint, model, product)
        index.close()
    return [f"{name:<20}{line}" for name, line in lines.items()]


def _token_budget(request: EmbedRequest, model: ESM2) -> int:
    default = default_token_budget(model.device)
    if request.token_budget is not None or model.device.type != "cuda" or request.layout == "fixed":
        return request.token_budget or default
    return measured_token_budget(model, default)


def _lines(
    request: EmbedRequest, run: Run, checkpoint: Checkpoint, model: ESM2, product: Product
) -> dict[str, str]:
    plan, index = run.plan, run.index
    lengths, num_reused = _computed_lengths(request, run)
    computed = run.counted_items(len(lengths)) + " and windows" * (plan.windows is not None)
    lines = {
        "sequences": f"{index.num_records:,} ({counted(index.total_residues, 'residue')})",
        "computed": f"{computed} ({counted(int(lengths.sum()), 'residue')})"
        + f"; {num_reused:,} taken from {request.reuse}" * bool(num_reused),
        "model": f"{plan.model_name} in {plan.identity['dtype']} on {device_name(model.device)}",
    }
    if len(lengths):
        num_packs, seconds, flops = _measure(run, model, lengths)
        rate = flops / seconds
        num_workers = max(1, request.workers or len(gpu_numbers(request)))
        total = float(sequence_flops(lengths, checkpoint.config).sum()) / rate / num_workers
        workers = f" with {num_workers} workers, each as fast as this one" * (num_workers > 1)
        packs = f"measured on {counted(num_packs, 'pack')} of these lengths"
        lines["time"] = f"about {duration(total)}{workers}, {lengths.sum() / total:,.0f} residues/s; {packs}"
    in_parts = not plan.is_scoring and wants_parts(run, request.parts)
    output, needed = product.space(run)
    directory = resolved(request.output).parent
    free = shutil.disk_usage(directory).free
    lines["output"] = f"about {byte_size(output)}" + ", in parts" * in_parts
    lines["disk"] = (
        f"up to {byte_size(needed + index.num_bytes)} until merged; {byte_size(free)} free in {directory}"
        + ": not enough" * (needed + index.num_bytes > free)
    )
    lines["shards"] = f"{plan.num_shards:,}"
    return lines


def _computed_lengths(request: EmbedRequest, run: Run) -> tuple[npt.NDArray[np.int64], int]:
    """Residues of each computed sequence or window, and the number of reused sequences."""
    earlier = None if request.reuse is None else EarlierOutput(request.reuse, run.plan.identity)
    found, num_reused = [], 0
    for shard in range(run.plan.num_shards):
        lengths = run.item_lengths(shard)
        if earlier is not None:
            is_new = earlier.find(run.input_of(shard).token_ids) < 0
            num_reused += int(np.count_nonzero(~is_new))
            lengths = lengths[is_new]
        found.append(lengths)
    if earlier is not None:
        earlier.close()
    lengths = np.concatenate(found)
    windows = run.plan.windows
    if windows is not None:
        is_long = lengths > windows.size
        num_windows = windows.num_residues(lengths[is_long]).sum() // windows.size
        lengths = np.concatenate([lengths[~is_long], np.full(num_windows, windows.size)])
    return lengths, num_reused


def _measure(run: Run, model: ESM2, lengths: npt.NDArray[np.int64]) -> tuple[int, float, float]:
    """Number of timed packs, the seconds they took, and their operations."""
    num_packs, seconds, flops = 0, 0.0, 0.0
    layout, budget = LAYOUTS[run.plan.identity["layout"]], run.plan.token_budget
    computing, names = layout.prepare(model), [array.name for array in run.arrays]
    begin = time.monotonic()
    for token_ids in _sample(run, lengths, MEASURED_PACKS * budget):
        batch = layout.lay_out(token_ids, budget)
        if run.plan.is_scoring:
            batch = batch.read_at([np.array([len(ids) // 2]) for ids in token_ids])
        for is_timed in (False, True) if not num_packs else (True,):  # the first one warms up
            start = time.perf_counter()
            outputs = computing.embed_packed(batch.to(model.device), names)
            for values in outputs.values():
                values.cpu()
            elapsed = time.perf_counter() - start
            if is_timed:
                num_packs += 1
                seconds += elapsed
                flops += float(sequence_flops(np.array(list(map(len, token_ids))), model.config).sum())
        if time.monotonic() - begin > MEASURED_SECONDS:
            break
    return num_packs, seconds, flops


def _sample(
    run: Run, lengths: npt.NDArray[np.int64], num_tokens: int
) -> Iterator[list[npt.NDArray[np.uint8]]]:
    """Packs of random sequences with lengths sampled from `lengths`."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(lengths)
    chosen = chosen[: max(1, int(np.searchsorted(np.cumsum(chosen + SPECIAL_TOKENS), num_tokens)))]
    layout, budget = LAYOUTS[run.plan.identity["layout"]], run.plan.token_budget
    packs = layout.packs(chosen + SPECIAL_TOKENS, budget, [array.name for array in run.arrays])
    for members in packs:
        yield [rng.integers(4, 24, length).astype(np.uint8) for length in chosen[members].tolist()]
