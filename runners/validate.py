"""The precision-validation report: from a model and a FASTA file to a page and its numbers."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm_packed.checkpoints import load_checkpoint
from esm_packed.config import DEFAULT_MAX_LENGTH, REFERENCES
from esm_packed.errors import UsageError
from esm_packed.numerics import PRECISIONS, is_out_of_memory, resolve_device
from esm_packed.packing import default_token_budget
from esm_packed.reports.page import check_matplotlib
from esm_packed.reports.validation.page import report_files, summary_lines, write_report
from esm_packed.reports.validation.run import (
    MODES,
    ValidationSettings,
    estimate_seconds,
    num_passes,
    validate,
)
from esm_packed.reports.validation.thresholds import Threshold
from esm_packed.runners.compute.worker import set_threads
from esm_packed.runners.input.build import build_index
from esm_packed.runners.input.fasta import ReadOptions
from esm_packed.runners.input.index import STDIN, FastaIndex
from esm_packed.runners.system.paths import check_apart
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Console, duration

TokenIds = npt.NDArray[np.uint8]

MOST_TOKENS = 8192
"""Default tokens in a pack, as the hidden states of all layers are in memory at once."""


@dataclass(frozen=True)
class ValidateRequest:
    """Arguments of `esm-packed validate`.

    Args:
        model: a model, as for `checkpoints.load_checkpoint`.
        fasta: FASTA file, `-` for standard input.
        output: directory for the report; created if missing.
        device: auto, cpu, cuda or cuda:INDEX.
        dtypes: precision modes.
        thresholds: by mode, replacing the report's defaults.
        reference: one of `config.REFERENCES`.
        limit: maximum number of proteins; 0 for all.
        max_length: residues kept of each protein; 0 keeps all.
        token_budget: tokens in a pack; None for the device's default, at most 8192.
        read: rules for reading the input.
        threads: CPU threads; None for torch's default.
        overwrite: replace an existing report.
        command: the command line that the page shows.
    """

    model: str
    fasta: str
    output: Path
    device: str = "auto"
    dtypes: tuple[str, ...] = MODES
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    reference: str = "esm-packed"
    limit: int = 200
    max_length: int = DEFAULT_MAX_LENGTH
    token_budget: int | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    threads: int | None = None
    overwrite: bool = False
    command: str = ""


def validate_file(request: ValidateRequest, console: Console) -> tuple[list[str], bool]:
    """Validate a model on the proteins of a file and write the report.

    Returns:
        Lines for the terminal, the last one the verdict, and whether every mode that ran passes.

    Raises:
        UsageError: an option is invalid, or the report cannot be written.
        InputError: the FASTA file has an error.
        CheckpointError: the model is missing or damaged.
        ReportError: matplotlib or fair-esm is missing, or no mode runs on the device.
    """
    begin = time.monotonic()
    check_matplotlib()
    settings = _settings(request)
    _check_directory(request)
    with console.byte_steps() as report:
        checkpoint = load_checkpoint(request.model, progress=report)
    replaced = {f"--output: {path.name}": path for path in report_files(request.output)}
    check_apart(replaced, [*([request.fasta] if request.fasta != STDIN else []), *checkpoint.files()])
    sample = _read_sample(request, console)
    passes = num_passes(checkpoint.config, settings)
    _make_directory(request.output)
    try:
        seconds = estimate_seconds(checkpoint.config, sample.token_ids, settings)
        console.note(
            f"validating {checkpoint.model_name} on {sample.described}, "
            f"{passes} times: about {duration(seconds)} (--limit, --max-length and --dtype shorten it)"
        )
        with console.progress("validating", "residues", passes * sample.num_residues) as advance:
            validation = validate(
                partial(load_checkpoint, request.model),
                sample.sequence_ids,
                sample.token_ids,
                settings,
                advance,
            )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"{request.model} does not fit into the memory of {settings.device} with "
            f"{settings.token_budget:,} tokens and proteins of {max(map(len, sample.token_ids)):,} residues; "
            "use a smaller --token-budget or --max-length"
        ) from error
    took = f"{duration(time.monotonic() - begin)} (estimated {duration(seconds)})"
    conditions = _conditions(request, sample, took)
    try:
        written = write_report(validation, conditions, request.output)
    except OSError as error:
        raise UsageError(f"{request.output}: the report cannot be written: {error.strerror}") from error
    lines = [
        f"{checkpoint.model_name} on {len(sample.token_ids):,} proteins ({sample.rule}), against "
        f"{settings.reference} in fp64",
        *summary_lines(validation),
        *(f"written: {path}" for path in written),
        validation.verdict,
    ]
    return lines, validation.passed


def _conditions(request: ValidateRequest, sample: _Sample, took: str) -> dict[str, str]:
    """The conditions under which the report was created."""
    truncated = f"{sample.num_truncated:,} to their first {request.max_length:,} residues"
    return {
        "proteins": f"{request.fasta} (sha256 {sample.sha256}), {sample.rule}",
        "truncated": truncated if sample.num_truncated else "none",
        "command": request.command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "duration": took,
    }


@dataclass(frozen=True)
class _Sample:
    """Proteins of a file, truncated to the computed length, and how they were chosen."""

    sequence_ids: list[str]
    token_ids: list[npt.NDArray[np.uint8]]
    num_truncated: int
    rule: str
    sha256: str

    @property
    def num_residues(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def described(self) -> str:
        return f"{counted(len(self.token_ids), 'protein')}, {counted(self.num_residues, 'residue')}"


def _read_sample(request: ValidateRequest, console: Console) -> _Sample:
    with tempfile.TemporaryDirectory(prefix="esm-packed-") as work_dir:
        with console.progress("reading", "B", None) as advance:
            index = build_index([request.fasta], Path(work_dir), request.read, progress=advance)
        chosen, rule = choose(index, request.limit)
        sequence_ids = [index.sequence_ids(record, record + 1)[0] for record in chosen]
        token_ids = [index.token_ids(record, record + 1, request.max_length)[0] for record in chosen]
        lengths = index.lengths[:][chosen].tolist()
        num_truncated = sum(len(ids) < length for ids, length in zip(token_ids, lengths, strict=True))
        return _Sample(sequence_ids, token_ids, num_truncated, rule, index.inputs[0].sha256)


def choose(index: FastaIndex, limit: int) -> tuple[list[int], str]:
    """Record numbers, ascending, of the distinct sequences to use, and how they were chosen.

    If there are more than `limit` (0: no limit), they are evenly spaced by length, from the shortest to the
    longest; a single one has the median length. Equal sequences are left out, as they would be each other's
    nearest neighbors in an arbitrary order.
    """
    distinct = np.flatnonzero(index.first_same[:] == np.arange(index.num_records))
    if not limit or len(distinct) <= limit:
        return distinct.tolist(), f"all {len(distinct):,} distinct sequences"
    by_length = distinct[np.argsort(index.lengths[:][distinct], kind="stable")]
    if limit == 1:
        return [int(by_length[len(distinct) // 2])], f"of {len(distinct):,} distinct sequences the median one"
    picks = np.linspace(0, len(distinct) - 1, limit).round().astype(np.int64)
    rule = f"{limit:,} of {len(distinct):,} distinct sequences, evenly spaced by length"
    return sorted(by_length[picks].tolist()), rule


def _settings(request: ValidateRequest) -> ValidationSettings:
    set_threads(request.threads)
    try:
        device = resolve_device(request.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for name, values, allowed in (
        ("--dtype", request.dtypes, tuple(PRECISIONS)),
        ("--threshold", tuple(request.thresholds), tuple(PRECISIONS)),
        ("--reference", (request.reference,), REFERENCES),
    ):
        for value in values:
            if value not in allowed:
                raise UsageError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    for dtype in request.thresholds:
        if dtype not in request.dtypes:
            raise UsageError(f"--threshold {dtype}: this precision is not computed; add it to --dtype")
    budget = request.token_budget or min(default_token_budget(device), MOST_TOKENS)
    return ValidationSettings(device, budget, request.dtypes, request.thresholds, request.reference)


def _check_directory(request: ValidateRequest) -> None:
    directory = request.output
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: not a directory; choose a directory for the report")
    if (directory / "validation.json").exists() and not request.overwrite:
        raise UsageError(f"{directory}: already contains a report; use --overwrite to replace it")


def _make_directory(directory: Path) -> None:
    """Create the directory before the work, which may take long and would otherwise be lost."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(f"{directory}: the report cannot be written there: {error.strerror}") from error
