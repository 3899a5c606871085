"""What each command of `esm-packed` does: options to a request, its result to lines and an exit code.

torch, h5py and numpy are imported for the command that is asked for (see `arguments`), so that help and wrong
options answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esm_packed.config import ESM2_MODELS
from esm_packed.runners.system.environment import is_on
from esm_packed.runners.system.terminal import (
    EXIT_COMPLETE,
    EXIT_FAILED_ROWS,
    EXIT_FAILED_VERDICT,
    EXIT_INTERRUPTED,
    complain,
    say,
)

if TYPE_CHECKING:
    from esm_packed.runners.input.fasta import ReadOptions


def embed(options: argparse.Namespace) -> int:
    import torch

    from esm_packed.runners.session import EmbedRequest, embed_files
    from esm_packed.runners.state.slices import local_device_number, parse_slice
    from esm_packed.runners.watch.console import Console

    _check_standard_input(options.fasta)
    options.disable_packing |= is_on("ESM_PACKED_DISABLE_PACKING")
    options.disable_fp16 |= is_on("ESM_PACKED_DISABLE_FP16")
    device = options.device
    if options.slice == "auto" and device in ("auto", "cuda") and (num_devices := torch.cuda.device_count()):
        device = f"cuda:{local_device_number(os.environ, num_devices)}"
    request = EmbedRequest(
        inputs=tuple(options.fasta),
        output=options.output,
        model=options.model,
        device=device,
        devices=options.devices,
        engine=options.engine,
        ray_address=options.ray_address,
        workers=options.workers,
        part=parse_slice(options.slice, os.environ) if options.slice is not None else None,
        dtype=options.dtype,
        disable_fp16=options.disable_fp16,
        attention=options.attention,
        layout=_layout(options),
        cuda_graphs=options.cuda_graphs,
        layers=options.layers,
        max_length=options.max_length,
        token_budget=options.token_budget,
        read=_read_options(options),
        threads=options.threads,
        store_dtype=options.store_dtype,
        fp32_compare=options.fp32_compare,
        log_json=options.log_json,
        overwrite=options.overwrite,
        keep_run=options.keep_run,
        command=options.command_line,
    )
    summary = embed_files(request, Console(options.quiet))
    if not options.quiet and summary.already_complete:
        say([f"already complete: {summary.output} holds this run ({summary.num_sequences:,} sequences)"])
    elif not options.quiet:
        say(summary.lines(options.verbose))
        for warning in summary.warnings():
            warnings.warn(warning, stacklevel=1)
    if summary.num_failed:
        complain(
            f"{summary.num_failed:,} of {summary.num_sequences:,} embeddings are not finite; their rows are "
            "NaN, and `problems` in the output names them"
        )
        return EXIT_FAILED_ROWS
    return EXIT_COMPLETE


def _check_standard_input(inputs: Sequence[str]) -> None:
    """See that `-` is there to be read, once."""
    from esm_packed.errors import UsageError
    from esm_packed.runners.input.index import STDIN

    if inputs.count(STDIN) > 1:
        raise UsageError("standard input (-) is named twice, and can be read only once")
    if STDIN in inputs and sys.stdin is None:
        raise UsageError("standard input (-) is closed; name a file, or pipe one in")


def _layout(options: argparse.Namespace) -> str:
    from esm_packed.errors import UsageError

    if options.reproducible and options.disable_packing:
        raise UsageError(
            "--reproducible and --disable-packing (or ESM_PACKED_DISABLE_PACKING) exclude each other"
        )
    return "fixed" if options.reproducible else "padded" if options.disable_packing else "packed"


def _read_options(options: argparse.Namespace) -> ReadOptions:
    from esm_packed.runners.input.fasta import ReadOptions

    return ReadOptions(
        invalid=options.invalid,
        duplicates=options.duplicates,
        gaps=options.gaps,
        full_header=options.full_header,
        force=options.force,
    )


def merge(options: argparse.Namespace) -> int:
    from esm_packed.runners.session import merge_files
    from esm_packed.runners.watch.console import Console

    output = _output_of(options.output)
    merged = merge_files(
        output,
        Console(),
        overwrite=options.overwrite,
        keep_run=options.keep_run,
        partial=options.partial,
    )
    if merged.already_complete:
        say([f"already complete: {output}"])
        return EXIT_COMPLETE
    missing = merged.missing_shards
    if merged.is_made and missing:
        complain(
            f"merged what there is: {missing:,} of the shards of {output} are missing, and their rows are "
            "NaN (status 3); the command that began the run continues it"
        )
        return EXIT_INTERRUPTED
    if missing:
        complain(
            f"{missing:,} of the shards of {output} missing or damaged; the command that began the run "
            "computes them"
        )
        return EXIT_INTERRUPTED
    say([f"merged: {output}"])
    return EXIT_COMPLETE


def _output_of(path: Path) -> Path:
    """The output, which may be named by its run directory."""
    from esm_packed.errors import UsageError

    if not path.resolve().name:
        raise UsageError(f"{path}: this is no output; name its file, such as embeddings.h5")
    return path.with_suffix("") if path.suffix == ".run" and not path.is_file() else path


def status(options: argparse.Namespace) -> int:
    from esm_packed.runners.state.directory import RunDirectory
    from esm_packed.runners.status import run_state

    say(run_state(RunDirectory(_output_of(options.output).resolve())).lines())
    return EXIT_COMPLETE


def info(options: argparse.Namespace) -> int:
    from esm_packed.runners.cli.info import describe

    _check_standard_input([options.subject])
    say(describe(options.subject, list_all=options.all, as_json=options.json))
    return EXIT_COMPLETE


def check(options: argparse.Namespace) -> int:
    from esm_packed.runners.check import check_model
    from esm_packed.runners.watch.console import Console

    lines, passed = check_model(options.model, Console(), device=options.device, threads=options.threads)
    say(lines)
    return EXIT_COMPLETE if passed else EXIT_FAILED_VERDICT


def checkpoint(options: argparse.Namespace) -> int:
    from esm_packed.download import contact_regression_path
    from esm_packed.errors import UsageError
    from esm_packed.runners.system.paths import check_apart, files_of
    from esm_packed.runners.watch.console import Console
    from esm_packed.weights import load_checkpoint, save_fair_esm

    if options.output.suffix != ".pt" or not options.output.name.startswith("esm2"):
        raise UsageError(
            f"{str(options.output)!r}: fair-esm loads an ESM-2 only from a file named esm2....pt"
        )
    if not options.output.parent.is_dir():
        raise UsageError(f"{options.output.parent}: there is no such folder")
    files = [options.output, contact_regression_path(options.output)]
    for path in files:
        if path.exists() and not options.overwrite:
            raise UsageError(f"{path}: exists already; --overwrite replaces it")
    with Console().byte_steps() as report:
        checkpoint = load_checkpoint(options.model, progress=report)
    check_apart({"--output": files[0], "the regression file": files[1]}, files_of(checkpoint))
    save_fair_esm(checkpoint, options.output)
    say([f"{checkpoint.model_name} written to {path}" for path in files if path.exists()])
    return EXIT_COMPLETE


def tune(options: argparse.Namespace) -> int:
    from esm_packed.runners.tune import TuneRequest, tune
    from esm_packed.runners.watch.console import Console

    models = options.model or ["all"]
    request = TuneRequest(
        models=tuple(ESM2_MODELS) if "all" in models else tuple(models),
        dtypes=options.dtype,
        tokens=options.tokens,
        device=options.device,
        output=options.output,
        time_limit=options.time_limit,
    )
    say(tune(request, Console()))
    return EXIT_COMPLETE


def validate(options: argparse.Namespace) -> int:
    from esm_packed.reports.validation.verdict import THRESHOLDS, Threshold
    from esm_packed.runners.validate import ValidateRequest, validate_file
    from esm_packed.runners.watch.console import Console

    _check_standard_input([options.fasta])
    request = ValidateRequest(
        model=options.model,
        fasta=options.fasta,
        output=options.output,
        device=options.device,
        dtypes=options.dtype,
        thresholds={
            mode: Threshold(relative_l2, THRESHOLDS[mode].cosine if cosine is None else cosine)
            for mode, relative_l2, cosine in options.threshold
        },
        reference=options.reference,
        limit=options.limit,
        max_length=options.max_length,
        token_budget=options.token_budget,
        read=_read_options(options),
        threads=options.threads,
        overwrite=options.overwrite,
        command=options.command_line,
    )
    lines, passed = validate_file(request, Console(options.quiet))
    say(lines)
    return EXIT_COMPLETE if passed else EXIT_FAILED_VERDICT


def report_speedup(options: argparse.Namespace) -> int:
    from esm_packed.reports.speedup.page import report_files, write_report
    from esm_packed.runners.system.paths import check_apart

    written = {f"--output: {path.name}": path for path in report_files(options.output)}
    check_apart(written, [options.results, *options.older])
    say(write_report(options.results, options.older, options.output))
    return EXIT_COMPLETE
