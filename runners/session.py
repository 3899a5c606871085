"""From FASTA files to one file of embeddings or scores: index, plan, compute what is left, merge."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

from esm_packed.checkpoints import Checkpoint, load_checkpoint
from esm_packed.errors import UsageError
from esm_packed.runners.checks import (
    ExistingOutput,
    check_device,
    check_heads,
    check_paths,
    check_request,
    check_space,
    first_device,
    gpu_numbers,
)
from esm_packed.runners.compute.engine import Engine, InProcessEngine
from esm_packed.runners.holding import check_held, check_others, claimed, undisturbed
from esm_packed.runners.input.fasta import DamagedIndexError
from esm_packed.runners.input.index import STDIN, FastaIndex, reopen_index
from esm_packed.runners.output.blocks import DamagedShardError
from esm_packed.runners.output.reuse import EarlierOutput
from esm_packed.runners.planning import (
    bf16_hint,
    existing_plan,
    is_continued,
    new_plan,
    open_or_build_index,
    run_identity,
    run_of,
)
from esm_packed.runners.product import EmbeddingOutput, Product
from esm_packed.runners.state.claims import Claim
from esm_packed.runners.state.directory import WHOLE_RUN, RunDirectory
from esm_packed.runners.state.parts import remove_unused_parts
from esm_packed.runners.state.plan import Plan, PlanError, plan_hash
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.state.run import Run
from esm_packed.runners.state.slices import Slice
from esm_packed.runners.summary import Summary
from esm_packed.runners.system.paths import resolved
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console
from esm_packed.runners.watch.watch import watching


class DerivedFiles(Protocol):
    """Files that replace the output of a run, created from it while the run is held."""

    def is_complete(self, index: FastaIndex, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> bool:
        """Whether all files exist. Called before anything is computed; raises if they cannot be created."""

    def make(self) -> None:
        """Create the files, or those that a killed process did not create, and remove the output."""


def embed_files(request: EmbedRequest, console: Console, derived: DerivedFiles | None = None) -> Summary:
    """Embed every record of `request.inputs` into `request.output`; see `carry_out`.

    Args:
        request: the request.
        console: shows the progress.
        derived: files created from the output, existing or new; not with slices.
    """
    return carry_out(request, console, EmbeddingOutput(request), derived)


def carry_out(
    request: EmbedRequest, console: Console, product: Product, derived: DerivedFiles | None = None
) -> Summary:
    """Compute the shards of `product` and create it: `request.output` appears only when it is complete.

    The work is done in the run directory `OUTPUT.run`. If it exists, the run it holds is continued. With
    `request.part` only that slice of the shards is computed, and the output is created by the process that
    finds all shards finished.

    Args:
        request: the request.
        console: shows the progress.
        product: what to create.
        derived: files created from the output, existing or new; not with slices.

    Raises:
        UsageError: an option does not fit the model or the device, the output cannot be created, or the run
            directory belongs to another run or process.
        InputError: a FASTA file has an error.
        CheckpointError: the model is missing or damaged.
        BackendError: the attention backend cannot be used.
        OSError: with `errno.ENOSPC` if the disk is, or will be, full.
    """
    begin = time.monotonic()
    output = resolved(request.output)
    if request.reuse is not None:  # workers may have another working directory
        request = replace(request, reuse=resolved(request.reuse))
    check_request(request)
    product.existing(output, request.overwrite)
    device = first_device(request)
    check_device(request, device)
    directory = RunDirectory(output)
    try:
        summary = _carry_out(request, directory, device, console, product, derived)
    except DamagedIndexError as error:
        can_read = bool(request.inputs) and STDIN not in request.inputs
        if not can_read or directory.live_slices():  # others use the index
            raise
        console.note(f"{error.what}; reading the inputs again")
        summary = _carry_out(request, directory, device, console, product, derived)
    summary.seconds = time.monotonic() - begin
    return summary


def _carry_out(
    request: EmbedRequest,
    directory: RunDirectory,
    device: torch.device,
    console: Console,
    product: Product,
    derived: DerivedFiles | None,
) -> Summary:
    with undisturbed(directory), ExitStack() as stack:
        session = _Session(request, directory, device, console, product, stack, derived)
        if request.part is None:
            with claimed(directory, WHOLE_RUN, console) as session.claim:
                if session.prepare():
                    session.compute(range(session.run.plan.num_shards))
                    session.finish()
        else:
            _compute_slice(session, request.part)
    return session.summary


def _compute_slice(session: _Session, part: Slice) -> None:
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
        # another process may have merged the shards
        if not session.is_merged_by_another():
            session.summary.part = str(part)
            session.summary.missing_shards = len(shards) - len(session.run.finished(shards))
            if not session.summary.missing_shards:
                session.finish()


class _Session:
    """The work of one process on a run."""

    run: Run
    summary: Summary
    claim: Claim

    def __init__(
        self,
        request: EmbedRequest,
        directory: RunDirectory,
        device: torch.device,
        console: Console,
        product: Product,
        stack: ExitStack,
        derived: DerivedFiles | None,
    ) -> None:
        self.request = request
        self.directory = directory
        self.device = device
        self.console = console
        self._product = product
        self._stack = stack  # closes the engine
        self._derived = derived
        self._engine: Engine | None = None
        self._opened_index: FastaIndex | None = None

    def prepare(self) -> bool:
        """Read the input and plan, or find a plan; False if the output is already complete.

        Call it while holding the claim.
        """
        request = self.request
        existing = self._product.existing(self.directory.output, request.overwrite)
        shutil.rmtree(self.directory.new_index_path, ignore_errors=True)  # left by a killed process
        try:
            return self._prepare(request, existing)
        finally:  # an index that was refused, or not needed
            shutil.rmtree(self.directory.new_index_path, ignore_errors=True)

    def _prepare(self, request: EmbedRequest, existing: ExistingOutput | None) -> bool:
        directory = self.directory
        index = self._opened_index = open_or_build_index(request, directory, self.claim, self.console)
        with self.console.byte_steps() as report:
            self.checkpoint = load_checkpoint(request.model, progress=report)
        check_heads(request, self.checkpoint)
        check_paths(request, self.checkpoint.files())
        plan = existing_plan(directory, request.overwrite)
        token_budget = self._token_budget(plan, existing)
        identity = {
            **run_identity(request, index, self.checkpoint, self.device, token_budget),
            **self._product.identity(index),
        }
        if request.reuse is not None:
            EarlierOutput(request.reuse, identity).close()  # refused before anything is computed
        self.summary = Summary.of_run(request, self.checkpoint, index, identity)
        if self._derived is not None and self._derived.is_complete(index, self.checkpoint, identity):
            self._leave(plan_hash(identity), parts=None)
            return False
        if existing is not None:
            existing.check_same(identity)
            if existing.is_complete:
                self._is_complete(existing)
                return False
        if plan is not None and not is_continued(plan, identity, directory, request.overwrite):
            plan = None
        check_held(self.claim)
        if directory.new_index_path.exists():
            index.close()
            directory.adopt_index()
            index = self._opened_index = reopen_index(directory.index_path)
        queries = self._product.queries(index)
        if plan is None:
            plan = new_plan(
                identity, index, self.checkpoint, self.device, directory, request.command, queries
            )
            check_held(self.claim)
            if dropped := directory.forget_shards():
                removed = counted(dropped, "shard")
                self.console.note(f"{directory.path}: removed {removed} of the abandoned run")
            plan.write(directory.plan_path, directory.scratch_path)
        self.run = run_of(directory, plan, index, queries)
        return True

    def _token_budget(self, plan: Plan | None, existing: ExistingOutput | None) -> int:
        """The token budget: requested, or that of the existing run or output, or fixed, or measured."""
        if self.request.token_budget is not None:
            return self.request.token_budget
        if plan is not None:
            return plan.token_budget
        if existing is not None:
            return int(existing.identity.get("token_budget", 0))
        # Measurements may differ from run to run.
        return self.engine().token_budget(measured=self.request.layout != "fixed")

    def engine(self) -> Engine:
        """The engine, started when it is first needed."""
        if self._engine is None:
            self._engine = self._stack.enter_context(self._new_engine())
        return self._engine

    def compute(self, shards: Sequence[int], *, verify: bool = True) -> None:
        """Compute the unfinished ones of `shards`.

        Args:
            shards: their numbers.
            verify: read the finished shards and recompute damaged ones; otherwise merging does that.
        """
        run = self.run
        if verify:
            left = [shard for shard in shards if not run.is_whole(shard)]
        else:
            finished = set(run.finished(shards))
            left = [shard for shard in shards if shard not in finished]
        check_space(run, self._product.space(run), self.console)
        if len(left) < len(shards):
            self.console.note(
                f"continuing: {len(shards) - len(left):,} of {len(shards):,} shards are finished"
            )
        if left:
            if hint := bf16_hint(run.plan.identity["dtype"], self.device, self.checkpoint.config):
                self.console.note(hint)
            self._compute(left)

    def _compute(self, shards: Sequence[int]) -> None:
        begin = time.monotonic()
        engine, run = self.engine(), self.run
        self.summary.device = engine.describe()
        self.console.note(
            f"{run.describe()}, with {run.plan.model_name} ({run.plan.identity['dtype']}) on "
            f"{self.summary.device}"
        )
        total = sum(run.residues(shard) for shard in shards)
        with watching(self.console, engine.num_workers, self.request.log_json, total) as watch:
            try:
                engine.compute(run, shards, watch)
            except KeyboardInterrupt:
                self._say_what_is_saved(shards, watch.done)
                raise
            finally:
                self.summary.stages = engine.times
        self.summary.embedding_seconds += time.monotonic() - begin

    def _say_what_is_saved(self, shards: Sequence[int], done: int) -> None:
        """Tell the user after an interruption what the run has saved.

        Args:
            shards: the shards that were to be computed.
            done: residues of them that were computed.
        """
        run = self.run
        saved = run.finished(range(run.plan.num_shards))
        lost = max(0, done - sum(run.residues(shard) for shard in set(saved) & set(shards)))
        total = sum(run.residues(shard) for shard in range(run.plan.num_shards))
        self.console.note(
            f"{len(saved):,} of {run.plan.num_shards:,} shards are saved in {self.directory.path}; about "
            f"{lost:,} residues ({lost / max(1, total):.1%} of the run) will be recomputed"
        )

    def finish(self) -> None:
        """Merge, recomputing damaged shards. Call it while holding the claim.

        Raises:
            UsageError: the claim was lost.
        """
        begin = time.monotonic()
        while True:
            check_held(self.claim)
            try:
                self._product.make(self.run, self.console)
                break
            except DamagedShardError as damaged:
                self.console.note(f"{damaged}; recomputing it")
                self._compute([damaged.shard])
        self.summary.merging_seconds = time.monotonic() - begin
        self.summary.device = self.summary.device or "none (all shards were already computed)"
        self._product.read(self.summary)
        if self._derived is not None:
            self._derived.make()
            remove_unused_parts(self.directory.output, None)
        check_held(self.claim)
        if not self.request.keep_run:
            self._remove_directory()

    def is_merged_by_another(self) -> bool:
        """Whether the run's output exists, so that nothing is left to do. Call it while holding the claim.

        Raises:
            UsageError: another run has taken this one's place.
        """
        existing = self._product.existing(self.directory.output, overwrite=False)
        is_there = existing is not None and existing.is_complete
        with suppress(FileNotFoundError, PlanError):
            if not is_there and Plan.read(self.directory.plan_path).hash == self.run.plan.hash:
                return False
        if not self.directory.plan_path.exists():
            self._remove_directory()  # taking the claim has recreated it
        if existing is None or not is_there or existing.plan_hash != self.run.plan.hash:
            raise UsageError(f"{self.directory.path}: removed, or replaced by another run, during this run")
        self._is_complete(existing)
        return True

    def _is_complete(self, existing: ExistingOutput) -> None:
        self._product.read(self.summary)
        parts = existing.parts
        if self._derived is not None:
            self._derived.make()
            parts = None
        self._leave(existing.plan_hash, parts)

    def _leave(self, complete_hash: str, parts: str | None) -> None:
        """Remove the run directory and unused parts, unless they belong to a run other than the complete one.

        Args:
            complete_hash: hash of the plan of the complete run.
            parts: parts that its output uses, as for `remove_unused_parts`.
        """
        self.summary.already_complete = True
        with suppress(OSError, PlanError):
            if Plan.read(self.directory.plan_path).hash != complete_hash:
                self.console.note(f"{self.directory.path}: kept, because it contains another, unfinished run")
                return
        if not self.request.keep_run:
            remove_unused_parts(self.directory.output, parts)  # in case a killed process did not
            self._remove_directory()

    def _remove_directory(self) -> None:
        if self._opened_index is not None:
            self._opened_index.close()
        self.directory.remove()

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
