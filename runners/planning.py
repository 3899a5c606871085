"""Planning a run: the index of its input, its identity and its plan."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esm_packed.checkpoints import Checkpoint
from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.errors import UsageError
from esm_packed.kernels.processor import bf16_instructions
from esm_packed.outputs import KINDS
from esm_packed.runners.holding import check_held
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.index import STDIN, FastaIndex, open_index
from esm_packed.runners.output.layout import FORMAT_VERSION
from esm_packed.runners.state.claims import Claim
from esm_packed.runners.state.cut import ShardSize, cut_shards
from esm_packed.runners.state.directory import RunDirectory
from esm_packed.runners.state.plan import Plan, PlanError
from esm_packed.runners.state.queries import Queries, QueriesError
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run, ScoringRun, input_identity
from esm_packed.runners.watch.console import Console

_LARGE = ESM2_MODELS["esm2_t30_150M_UR50D"].hidden_size
"""Hidden size of the smallest model that is worth the hint."""


def open_or_build_index(
    request: EmbedRequest, directory: RunDirectory, claim: Claim, console: Console
) -> FastaIndex:
    """The index of the inputs: that of the run, if it was built from these very files, or a new one.

    Raises:
        UsageError: the input differs from that of other processes working on the run.
        InputError: a FASTA file has an error.
    """
    path = directory.index_path
    if STDIN not in request.inputs:
        index = open_index(request.inputs, path, request.read)
        if index is not None:
            return index
    if directory.live_slices():
        raise UsageError(
            f"{directory.path}: in use by other processes, whose input differs from "
            f"{', '.join(request.inputs)}; give the same paths in the same order, with the same input rules"
        )
    if directory.plan_path.exists():  # keep its index until this input is known to be the same
        path = directory.new_index_path
    with console.progress("reading", "B", input_bytes(request.inputs)) as advance:

        def advance_if_held(amount: int) -> None:
            check_held(claim)  # else two processes would write the same index
            advance(amount)

        return build_index(request.inputs, path, request.read, progress=advance_if_held)


def input_bytes(inputs: Sequence[str]) -> int | None:
    """Total size of the input files; None if one is not a regular file, such as standard input."""
    paths = [Path(path) for path in inputs]
    return sum(path.stat().st_size for path in paths) if all(path.is_file() for path in paths) else None


def run_identity(
    request: EmbedRequest,
    index: FastaIndex,
    checkpoint: Checkpoint,
    device: torch.device,
    token_budget: int,
) -> dict[str, Any]:
    """What identifies a run; device, attention backend and versions may differ."""
    return {
        "format_version": FORMAT_VERSION,
        **input_identity(index),
        "model_sha256": checkpoint.sha256,
        "dtype": request.precision(device).name,
        "layout": request.layout,
        "layers": request.resolved_layers(checkpoint.config),
        "kinds": [kind for kind in KINDS if kind in request.kinds],
        "max_length": request.max_length if request.windows is None else 0,
        "windows": list(request.windows or ()),
        "token_budget": token_budget,
        "store_dtype": request.store_dtype,
    }


def existing_plan(directory: RunDirectory, overwrite: bool) -> Plan | None:
    """The plan of the existing run; None if there is none, or if it is damaged and may be replaced.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return Plan.read(directory.plan_path)
    except FileNotFoundError:
        return None
    except PlanError as error:
        if not overwrite:
            raise UsageError(str(error)) from error
        return None


def is_continued(plan: Plan, identity: dict[str, Any], directory: RunDirectory, overwrite: bool) -> bool:
    """Whether a run of `identity` continues `plan`; else it replaces it.

    Raises:
        UsageError: it differs and may not replace it.
    """
    try:
        plan.check_same(identity, directory.path)
    except PlanError as error:
        if not overwrite:
            raise UsageError(str(error)) from error
        return False
    return True


def new_plan(
    identity: dict[str, Any],
    index: FastaIndex,
    checkpoint: Checkpoint,
    device: torch.device,
    directory: RunDirectory,
    command: str,
    queries: Queries | None = None,
) -> Plan:
    """The plan of a new run, with its records or queries cut into shards."""
    config = checkpoint.config
    uncut = Plan(
        identity,
        tuple(file.path for file in index.inputs),
        (0, index.num_records),
        checkpoint.model_name,
        config.hidden_size,
        command,
        secrets.token_hex(4),
    )
    run = Run(directory, uncut, index)
    if queries is not None:
        lengths, is_computed = queries.lengths, np.ones(len(queries), np.bool_)
    else:
        lengths, is_computed = (
            run.embedded_lengths(0, index.num_records),
            run.is_computed(0, index.num_records),
        )
    if uncut.windows is not None:
        lengths = uncut.windows.num_residues(lengths).astype(np.int32)
    size = ShardSize.of_run(lengths, is_computed, config, device.type, uncut.token_budget)
    return replace(uncut, starts=cut_shards(lengths, is_computed, config, size))


def run_of(directory: RunDirectory, plan: Plan, index: FastaIndex, queries: Queries | None) -> Run:
    """The run of a plan; the queries of a scoring run are written unless they exist.

    Call it while holding the claim.
    """
    if queries is None:
        return Run(directory, plan, index)
    run = ScoringRun(directory, plan, index)
    try:
        _ = run.queries
    except QueriesError:
        queries.write(directory.queries_path, directory.scratch_path, plan.hash)
    return run


def bf16_hint(dtype: str, device: torch.device, config: ESM2Config) -> str | None:
    """What a large model in FP32 could gain on a processor that multiplies in BF16, and what that costs.

    The figures are those of reports/published/cpu-intel-xeon-2-cores/peers-150M.json.
    """
    instructions = bf16_instructions()
    if dtype != "fp32" or device.type != "cpu" or config.hidden_size < _LARGE or instructions is None:
        return None
    return (
        f"this processor multiplies in BF16 ({instructions}): --dtype bf16 may be much faster (3.3 times "
        "with 150M on an Intel Xeon with AMX), at relative errors of about 5e-3 of the means with random "
        "weights; `esm-packed validate` measures the errors"
    )
