"""FASTA files to one HDF5 file of embeddings: index, plan, compute what is left, merge."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esm_packed.attention import WAITING_BACKENDS, select_backend
from esm_packed.checkpoints import Checkpoint, load_checkpoint
from esm_packed.config import DEFAULT_TOKEN_BUDGETS
from esm_packed.errors import UsageError
from esm_packed.runners.checks import (
    ExistingOutput,
    check_output,
    check_paths,
    check_request,
    check_space,
    first_device,
    gpu_numbers,
)
from esm_packed.runners.compute.engine import Engine, InProcessEngine
from esm_packed.runners.holding import check_held, check_others, claimed, undisturbed
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.index import STDIN, FastaIndex, open_index, reopen_index
from esm_packed.runners.output.changes import log_changes
from esm_packed.runners.output.layout import FORMAT_VERSION
from esm_packed.runners.output.merge import DamagedShardError, merge_run
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.claims import Claim
from esm_packed.runners.state.cut import ShardSize, cut_shards
from esm_packed.runners.state.directory import WHOLE_RUN, RunDirectory
from esm_packed.runners.state.plan import Plan, PlanError, differences, plan_hash
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import IDENTIFYING_RULES, Run
from esm_packed.runners.state.slices import Slice
from esm_packed.runners.summary import Summary
from esm_packed.runners.system.paths import files_of, resolved
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.watch import watching


def embed_files(request: EmbedRequest, console: Console) -> Summary:
    """Embed every record of `request.inputs` into `request.output`, which appears only when it is whole.

    The work is done in the run directory `OUTPUT.run`. If one is there, the run it holds is continued. With
    `request.part` only that slice of the shards is computed, and the output is made by the process that finds
    all of them there.

    Raises:
        UsageError: an option does not fit the model or the device, the output cannot be where it should, or
            the run directory belongs to another run or process.
        InputError: a fault in a FASTA file.
        CheckpointError: the model is missing or damaged.
        BackendError: the attention backend cannot be used.
        OSError: with `errno.ENOSPC` when the disk is, or will be, full.
    """
    begin = time.monotonic()
    output = resolved(request.output)
    check_output(output, request.overwrite)
    check_request(request)
    device = first_device(request)
    if request.cuda_graphs and (request.layout != "fixed" or device.type != "cuda"):
        missing = "a GPU" if request.layout == "fixed" else "--reproducible, which makes packs of one size"
        raise UsageError(f"--cuda-graphs needs {missing}")
    if request.ray_address is None:  # fails before the input is read
        backend, _ = select_backend(request.attention, device, request.precision(device), head_dim=64)
        if request.cuda_graphs and backend in WAITING_BACKENDS:
            raise UsageError(f"--cuda-graphs: attention {backend!r} waits for the device; choose another one")
    directory = RunDirectory(output)
    with undisturbed(directory), ExitStack() as stack:
        session = _Session(request, directory, device, console, stack)
        if request.part is None:
            with claimed(directory, WHOLE_RUN, console) as session.claim:
                if session.prepare():
                    session.compute(range(session.run.plan.num_shards))
                    session.finish()
        else:
            _embed_slice(session, request.part)
    session.summary.seconds = time.monotonic() - begin
    return session.summary


def _embed_slice(session: _Session, part: Slice) -> None:
    """Join the run, compute one slice of it, and merge if that was the last one."""
    directory, console = session.directory, session.console
    with ExitStack() as member:
        with claimed(directory, f"joining with slice {part}", console) as session.claim:
            check_others(directory, part)
            if not session.prepare():
                return
            shards = range(session.run.plan.num_shards)
            if len(session.run.finished(shards)) == len(shards):
                session.finish()
                return
            member.enter_context(directory.slice_claim(part))
        session.compute(part.shards(len(shards)), verify=False)
    with claimed(directory, f"leaving with slice {part}", console) as session.claim:
        # another process may have found all shards there, and merged them
        if not session.is_merged_by_another():
            session.summary.part = str(part)
            session.summary.missing_shards = len(shards) - len(session.run.finished(shards))
            if not session.summary.missing_shards:
                session.finish()


class _Session:
    """One process's part in a run."""

    run: Run
    summary: Summary
    claim: Claim

    def __init__(
        self,
        request: EmbedRequest,
        directory: RunDirectory,
        device: torch.device,
        console: Console,
        stack: ExitStack,
    ) -> None:
        self.request = request
        self.directory = directory
        self.device = device
        self.console = console
        self._stack = stack  # closes the engine
        self._engine: Engine | None = None
        self._opened_index: FastaIndex | None = None

    def prepare(self) -> bool:
        """Read the input and plan, or find a plan; False if the output is complete already.

        Call it with the claim held.
        """
        request = self.request
        existing = check_output(self.directory.output, request.overwrite)
        shutil.rmtree(self.directory.new_index_path, ignore_errors=True)  # of a killed process
        try:
            return self._prepare(request, existing)
        finally:  # an index that was refused, or not needed
            shutil.rmtree(self.directory.new_index_path, ignore_errors=True)

    def _prepare(self, request: EmbedRequest, existing: ExistingOutput | None) -> bool:
        index = self._opened_index = self._index()
        with self.console.byte_steps() as report:
            self.checkpoint = load_checkpoint(request.model, progress=report)
        check_paths(request, files_of(self.checkpoint))
        config = self.checkpoint.config
        layers = request.resolved_layers(config)
        plan = self._existing_plan()
        if request.token_budget is not None:
            token_budget = request.token_budget
        elif plan is not None:
            token_budget = plan.token_budget
        elif existing is not None:
            with EmbeddingReader(self.directory.output) as reader:
                token_budget = int(reader.plan["identity"].get("token_budget", 0))
        elif request.layout == "fixed":  # what is measured may differ from run to run
            token_budget = DEFAULT_TOKEN_BUDGETS[self.device.type]
        else:
            token_budget = self.engine().token_budget()
        identity = run_identity(request, index, self.checkpoint, self.device, layers, token_budget)
        self.summary = Summary(
            output=request.output,
            model_name=self.checkpoint.model_name,
            model_sha256=self.checkpoint.sha256,
            dtype=identity["dtype"],
            device="",
            token_budget=token_budget,
            num_sequences=index.num_records,
            num_residues=index.total_residues,
            num_replaced=index.num_replaced,
            num_duplicates=index.num_duplicates,
            num_left_out=len(index.problems),
            num_identical=index.num_identical,
            num_to_compare=request.fp32_compare,
        )
        if existing is not None:
            if existing.plan_hash != plan_hash(identity):
                with EmbeddingReader(self.directory.output) as reader:
                    differing = differences(reader.plan["identity"], identity)
                raise UsageError(
                    f"{request.output}: exists already, made from other input or options ({differing}); "
                    "--overwrite replaces it"
                )
            if existing.is_complete:
                self._is_complete(existing.plan_hash)
                return False
        if plan is not None:
            try:
                plan.check_same(identity, self.directory.path)
            except PlanError as error:
                if not request.overwrite:
                    raise UsageError(str(error)) from error
                plan = None
        check_held(self.claim)
        if self.directory.new_index_path.exists():
            index.close()
            self.directory.adopt_index()
            index = self._opened_index = reopen_index(self.directory.index_path)
        self.run = Run(self.directory, plan or self._new_plan(identity, index), index)
        return True

    def engine(self) -> Engine:
        """What computes, started when it is first needed."""
        if self._engine is None:
            self._engine = self._stack.enter_context(self._new_engine())
        return self._engine

    def compute(self, shards: Sequence[int], *, verify: bool = True) -> None:
        """Compute those of `shards` that are not finished.

        Args:
            shards: their numbers.
            verify: read the finished ones, and compute again what is damaged; else merging does that.
        """
        run, request = self.run, self.request
        if verify:
            left = [shard for shard in shards if not run.is_whole(shard)]
        else:
            finished = set(run.finished(shards))
            left = [shard for shard in shards if shard not in finished]
        check_space(run, request.fp32_compare, self.console)
        if len(left) < len(shards):
            self.console.note(
                f"continuing: {len(shards) - len(left):,} of {len(shards):,} shards are finished"
            )
        if left:
            self._compute(left)

    def _compute(self, shards: Sequence[int]) -> None:
        begin = time.monotonic()
        engine, run = self.engine(), self.run
        self.summary.device = engine.describe()
        self.console.note(
            f"embedding {run.index.num_records:,} sequences, {run.index.total_residues:,} residues, with "
            f"{run.plan.model_name} ({run.plan.identity['dtype']}) on {self.summary.device}"
        )
        total = sum(run.residues(shard) for shard in shards)
        with watching(
            self.console, engine.num_workers, self.request.log_json, total, run.plan.token_budget
        ) as watch:
            try:
                engine.compute(run, shards, watch)
            except KeyboardInterrupt:
                self._say_what_is_saved(shards, watch.done)
                raise
            finally:
                self.summary.stages = engine.times
        self.summary.embedding_seconds += time.monotonic() - begin

    def _is_partial_output(self) -> bool:
        """Whether the output is there, made of a part of this run."""
        try:
            existing = check_output(self.directory.output, overwrite=False)
        except UsageError:  # something else, which merging does not replace
            return False
        return existing == ExistingOutput(self.run.plan.hash, is_complete=False)

    def _say_what_is_saved(self, shards: Sequence[int], done: int) -> None:
        """Tell an interrupted user what the run has.

        Args:
            shards: that were to be computed.
            done: residues computed of them.
        """
        run = self.run
        saved = run.finished(range(run.plan.num_shards))
        lost = max(0, done - sum(run.residues(shard) for shard in set(saved) & set(shards)))
        share = lost / max(1, run.index.total_residues)
        self.console.note(
            f"{len(saved):,} of {run.plan.num_shards:,} shards are saved in {self.directory.path}; about "
            f"{lost:,} residues ({share:.1%} of the input) will be computed again"
        )

    def finish(self) -> None:
        """Merge; what turns out to be damaged is computed again. Call it with the claim held.

        Raises:
            UsageError: it is not held any more.
        """
        begin = time.monotonic()
        while True:
            check_held(self.claim)
            try:
                overwrite = self.request.overwrite or self._is_partial_output()
                merge_run(self.run, self.console, overwrite=overwrite)
                break
            except DamagedShardError as damaged:
                self.console.note(f"{damaged}; it is computed again")
                self._compute([damaged.shard])
        self.summary.merging_seconds = time.monotonic() - begin
        self.summary.device = self.summary.device or "none, all was computed before"
        self.summary.read_output()
        if self.request.log_json is not None:
            log_changes(self.console, self.request.log_json, self.directory.output)
        check_held(self.claim)
        if not self.request.keep_run:
            self._remove_directory()

    def is_merged_by_another(self) -> bool:
        """Whether the run's output is there, and with that all is done. Call it with the claim held.

        Raises:
            UsageError: another run has taken this one's place.
        """
        existing = check_output(self.directory.output, overwrite=False)
        is_there = existing is not None and existing.is_complete
        with suppress(FileNotFoundError, PlanError):
            if not is_there and Plan.read(self.directory.plan_path).hash == self.run.plan.hash:
                return False
        if not self.directory.plan_path.exists():
            self._remove_directory()  # holding the claim has made it anew
        if existing is None or not is_there or existing.plan_hash != self.run.plan.hash:
            raise UsageError(
                f"{self.directory.path}: removed, or replaced by another run, while this one computed"
            )
        self._is_complete(self.run.plan.hash)
        return True

    def _is_complete(self, plan_hash: str) -> None:
        self.summary.read_output()
        self.summary.already_complete = True
        with suppress(OSError, PlanError):
            if Plan.read(self.directory.plan_path).hash != plan_hash:
                self.console.note(f"{self.directory.path}: holds another, unfinished run; it is left alone")
                return
        if not self.request.keep_run:
            self._remove_directory()

    def _remove_directory(self) -> None:
        if self._opened_index is not None:
            self._opened_index.close()
        self.directory.remove()

    def _index(self) -> FastaIndex:
        request, path = self.request, self.directory.index_path
        if STDIN not in request.inputs:
            index = open_index(request.inputs, path, request.read)
            if index is not None:
                return index
        if self.directory.live_slices():
            raise UsageError(
                f"{self.directory.path}: others are at work on this run, and {', '.join(request.inputs)} is "
                "not what they read: name the same files in the same way, with the same input rules"
            )
        if self.directory.plan_path.exists():  # whose index must stay until this input is known to be its own
            path = self.directory.new_index_path
        with self.console.progress("reading", "B", _input_bytes(request.inputs)) as advance:

            def advance_if_held(amount: int) -> None:
                check_held(self.claim)  # or two processes would write one index
                advance(amount)

            return build_index(request.inputs, path, request.read, progress=advance_if_held)

    def _existing_plan(self) -> Plan | None:
        try:
            return Plan.read(self.directory.plan_path)
        except FileNotFoundError:
            return None
        except PlanError as error:
            if not self.request.overwrite:
                raise UsageError(str(error)) from error
            return None

    def _new_plan(self, identity: dict[str, Any], index: FastaIndex) -> Plan:
        config = self.checkpoint.config
        uncut = Plan(
            identity,
            tuple(file.path for file in index.inputs),
            (0, index.num_records),
            self.checkpoint.model_name,
            config.hidden_size,
            self.request.command,
        )
        run = Run(self.directory, uncut, index)
        lengths = run.embedded_lengths(0, index.num_records)
        is_computed = run.is_computed(0, index.num_records)
        starts = cut_shards(
            lengths,
            is_computed,
            config,
            ShardSize.of_run(lengths, is_computed, config, self.device.type, uncut.token_budget),
        )
        plan = replace(uncut, starts=starts)
        check_held(self.claim)
        self.directory.forget_shards()
        plan.write(self.directory.plan_path, self.directory.scratch_path)
        return plan

    def _new_engine(self) -> Engine:
        request = self.request
        several = request.ray_address is not None or (request.workers or 1) > 1
        several |= len(gpu_numbers(request)) > 1
        if request.engine == "ray" or (request.engine == "auto" and several):
            from esm_packed.runners.compute.ray_engine import RayEngine

            return RayEngine(request, self.device, gpu_numbers(request), self.checkpoint, self.console)
        if several:
            raise UsageError("--engine in-process computes on one device; --engine ray on several")
        return InProcessEngine(request, self.checkpoint, self.device)


def _input_bytes(inputs: Sequence[str]) -> int | None:
    paths = [Path(path) for path in inputs]
    return sum(path.stat().st_size for path in paths) if all(path.is_file() for path in paths) else None


def run_identity(
    request: EmbedRequest,
    index: FastaIndex,
    checkpoint: Checkpoint,
    device: torch.device,
    layers: Sequence[int],
    token_budget: int,
) -> dict[str, Any]:
    """What makes two runs the same one; device, attention backend and versions may differ."""
    return {
        "format_version": FORMAT_VERSION,
        "inputs": [{"size": file.size, "sha256": file.sha256} for file in index.inputs],
        "model_sha256": checkpoint.sha256,
        "dtype": request.precision(device).name,
        "layout": request.layout,
        "layers": list(layers),
        "kinds": ["mean"],
        "max_length": request.max_length,
        "token_budget": token_budget,
        **{name: getattr(request.read, name) for name in IDENTIFYING_RULES},
        "store_dtype": request.store_dtype,
    }
