"""The commands of `esm-packed`: each turns options into a request, and its result into text and an exit code.

torch, h5py and numpy are imported only by the command that needs them (see `options`), so that help and
wrong options are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from esm_packed.config import DEFAULT_OVERLAP, ESM2_MODELS
from esm_packed.errors import UsageError
from esm_packed.runners.system.environment import is_on
from esm_packed.runners.system.terminal import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_FAILED_ROWS,
    EXIT_INTERRUPTED,
    complain,
    counted,
    say,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from esm_packed.runners.state.request import EmbedRequest
    from esm_packed.windows import Windows

    Request = TypeVar("Request", bound=DataclassInstance)


def embed(options: argparse.Namespace) -> int:
    from esm_packed.runners.session import embed_files
    from esm_packed.runners.watch.console import Console

    options.disable_packing |= is_on("ESM_PACKED_DISABLE_PACKING")
    request = _run_request(options, layout=_layout(options), windows=_windows(options))
    if options.estimate:
        from esm_packed.runners.estimate import estimate

        say(estimate(request, Console(options.quiet)))
        return EXIT_COMPLETE
    summary = embed_files(request, Console(options.quiet))
    if not options.quiet and summary.already_complete:
        sequences = counted(summary.num_sequences, "sequence")
        say([f"already complete: {summary.output} ({sequences})"])
    elif not options.quiet:
        say(summary.lines(options.verbose))
        for warning in summary.warnings():
            warnings.warn(warning, stacklevel=1)
    if summary.num_failed:
        complain(
            f"{summary.num_failed:,} of {summary.num_sequences:,} embeddings are not finite; their rows are "
            "NaN, and `problems` in the output lists them"
        )
        return EXIT_FAILED_ROWS
    return EXIT_COMPLETE


def score(options: argparse.Namespace) -> int:
    from esm_packed.runners.scoring import score_file
    from esm_packed.runners.state.request import Scoring
    from esm_packed.runners.watch.console import Console

    table = "proteins" if options.pseudo_perplexity else "scan" if options.mutations is None else "mutants"
    if options.joint and (table != "mutants" or options.method != "masked"):
        raise UsageError(
            "--joint masks the sites of a mutant together; it needs --mutations and --method masked"
        )
    if options.skip_bad and table != "mutants":
        raise UsageError("--skip-bad skips mutants of a table; it needs --mutations")
    if options.pseudo_perplexity and options.method != "masked":
        raise UsageError("--pseudo-perplexity masks each residue in turn; remove --method")
    if options.heat_map is not None and (table != "scan" or options.part is not None):
        raise UsageError("--heat-map draws a scan; remove --mutations, --pseudo-perplexity and --slice")
    request = _run_request(options, scoring=_request(Scoring, options, table=table))
    if options.estimate:
        from esm_packed.runners.estimate import estimate
        from esm_packed.runners.scoring import ScoreTable

        say(estimate(request, Console(options.quiet), ScoreTable(request)))
        return EXIT_COMPLETE
    scored = score_file(request, Console(options.quiet))
    if not options.quiet:
        say(scored.lines(options.verbose))
    if scored.num_failed:
        complain(
            f"{counted(scored.num_failed, 'copy', 'copies')} of proteins not finite; their scores are empty, "
            f"and `failed` in {request.output}.json gives the reasons"
        )
        return EXIT_FAILED_ROWS
    return EXIT_COMPLETE


def extract(options: argparse.Namespace) -> int:
    from esm_packed.runners.extract import ExtractRequest, extract_file
    from esm_packed.runners.input.fasta import ReadOptions
    from esm_packed.runners.watch.console import Console

    _check_standard_input([options.fasta])
    request = _request(
        ExtractRequest,
        options,
        include=tuple(options.include),
        repr_layers=tuple(options.repr_layers),
        device="cpu" if options.nogpu else "auto",
        read=_request(ReadOptions, options, full_header=True),
    )
    extracted = extract_file(request, Console(options.quiet))
    if not options.quiet:
        say(extracted.lines())
    if extracted.num_failed:
        complain(
            f"{extracted.num_failed:,} of {extracted.summary.num_sequences:,} sequences are not finite; "
            f"their tensors are NaN, and {extracted.index_path} lists them"
        )
        return EXIT_FAILED_ROWS
    return EXIT_COMPLETE


def contacts(options: argparse.Namespace) -> int:
    from esm_packed.runners.contacts import ContactsRequest, contacts_file
    from esm_packed.runners.input.fasta import ReadOptions
    from esm_packed.runners.watch.console import Console

    _check_standard_input([options.fasta])
    request = _request(ContactsRequest, options, read=_request(ReadOptions, options))
    say(contacts_file(request, Console()))
    return EXIT_COMPLETE


def _check_standard_input(inputs: Sequence[str]) -> None:
    """Check that standard input, if named, is open and named once."""
    from esm_packed.runners.input.index import STDIN

    if inputs.count(STDIN) > 1:
        raise UsageError("standard input (-) is given twice, but can be read only once")
    if STDIN in inputs and sys.stdin is None:
        raise UsageError("standard input (-) is closed; pipe a file into it, or give a file name")


def _windows(options: argparse.Namespace) -> Windows | None:
    from esm_packed.windows import Windows

    if options.windows is None:
        if options.overlap is not None:
            raise UsageError(f"--overlap {options.overlap}: needs --windows")
        return None
    most = options.windows // 2
    overlap = min(DEFAULT_OVERLAP, most) if options.overlap is None else options.overlap
    if overlap > most:
        raise UsageError(f"--overlap {overlap}: must be at most half of --windows ({most})")
    return Windows(options.windows, overlap)


def _layout(options: argparse.Namespace) -> str:
    if options.reproducible and options.disable_packing:
        raise UsageError(
            "--reproducible cannot be combined with --disable-packing (or ESM_PACKED_DISABLE_PACKING)"
        )
    return "fixed" if options.reproducible else "padded" if options.disable_packing else "packed"


def _run_request(options: argparse.Namespace, **others: object) -> EmbedRequest:
    """The request of a run; fields for which the command has no option keep their defaults."""
    import torch

    from esm_packed.runners.input.fasta import ReadOptions
    from esm_packed.runners.state.request import EmbedRequest
    from esm_packed.runners.state.slices import local_device_number, parse_slice

    _check_standard_input(options.inputs)
    options.disable_fp16 |= is_on("ESM_PACKED_DISABLE_FP16")
    device = options.device
    if options.part == "auto" and device in ("auto", "cuda") and (num_devices := torch.cuda.device_count()):
        device = f"cuda:{local_device_number(os.environ, num_devices)}"
    for field in fields(EmbedRequest):
        if field.default is not MISSING and not hasattr(options, field.name):
            others.setdefault(field.name, field.default)
    return _request(
        EmbedRequest,
        options,
        inputs=tuple(options.inputs),
        device=device,
        part=None if options.part is None else parse_slice(options.part, os.environ),
        read=_request(ReadOptions, options),
        **others,
    )


def _request(kind: type[Request], options: argparse.Namespace, **others: object) -> Request:
    """A `kind` whose fields are the options of the same names, except for `others`."""
    names = [field.name for field in fields(kind) if field.name not in others]
    return kind(**{name: getattr(options, name) for name in names}, **others)


def merge(options: argparse.Namespace) -> int:
    from esm_packed.runners.merging import merge_files
    from esm_packed.runners.watch.console import Console

    output = _output_of(options.output)
    merged = merge_files(
        output,
        Console(),
        overwrite=options.overwrite,
        keep_run=options.keep_run,
        partial=options.partial,
        compression=options.compression,
        parts=options.parts,
    )
    if merged.already_complete:
        say([f"already complete: {output}"])
        return EXIT_COMPLETE
    if merged.missing_records:
        missing = f"{merged.missing_records:,} of {merged.num_records:,} proteins are not computed"
        say([f"partial output written: {output}; {missing}, rerun the same embed command to continue"])
        return EXIT_INTERRUPTED
    if merged.missing_shards and options.partial:
        say([f"{output}: no shard is finished yet; rerun the same embed command to continue"])
        return EXIT_INTERRUPTED
    if merged.missing_shards:
        complain(
            f"{output}: {counted(merged.missing_shards, 'shard')} missing or damaged; rerun the same embed "
            "command"
        )
        return EXIT_INTERRUPTED
    say([f"merged: {output}"])
    return EXIT_COMPLETE


def _output_of(path: Path) -> Path:
    """The output file; `path` may be its run directory instead."""
    if not path.resolve().name:
        raise UsageError(f"{path}: not an output file; give its name, such as embeddings.h5")
    return path.with_suffix("") if path.suffix == ".run" and not path.is_file() else path


def status(options: argparse.Namespace) -> int:
    from esm_packed.runners.state.directory import RunDirectory
    from esm_packed.runners.status import run_state

    say(run_state(RunDirectory(_output_of(options.output).resolve())).lines())
    return EXIT_COMPLETE


def export(options: argparse.Namespace) -> int:
    from esm_packed.runners.exporting import ExportRequest, export_file
    from esm_packed.runners.watch.console import Console

    say(export_file(_request(ExportRequest, options), Console()))
    return EXIT_COMPLETE


def draw_map(options: argparse.Namespace) -> int:
    from esm_packed.runners.mapping import MapRequest, map_file
    from esm_packed.runners.watch.console import Console

    say(map_file(_request(MapRequest, options), Console()))
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
    return EXIT_COMPLETE if passed else EXIT_FAILED


def checkpoint(options: argparse.Namespace) -> int:
    from esm_packed.checkpoints import load_checkpoint, save_fair_esm
    from esm_packed.checkpoints.download import contact_regression_path
    from esm_packed.runners.system.paths import check_apart
    from esm_packed.runners.watch.console import Console

    if options.output.suffix != ".pt" or not options.output.name.startswith("esm2"):
        raise UsageError(
            f"{str(options.output)!r}: fair-esm loads ESM-2 only from files named esm2*.pt; rename the output"
        )
    if not options.output.parent.is_dir():
        raise UsageError(f"{options.output.parent}: no such directory; create it first")
    files = [options.output, contact_regression_path(options.output)]
    for path in files:
        if path.exists() and not options.overwrite:
            raise UsageError(f"{path}: already exists; use --overwrite to replace it")
    with Console().byte_steps() as report:
        checkpoint = load_checkpoint(options.model, progress=report)
    check_apart({"--output": files[0], "the regression file": files[1]}, checkpoint.files())
    save_fair_esm(checkpoint, options.output)
    say([f"{checkpoint.model_name} written to {path}" for path in files if path.exists()])
    return EXIT_COMPLETE


def tune(options: argparse.Namespace) -> int:
    from esm_packed.runners.tune import TuneRequest, tune
    from esm_packed.runners.watch.console import Console

    models = options.models or ["all"]
    models = ESM2_MODELS if "all" in models else models
    say(tune(_request(TuneRequest, options, models=tuple(models)), Console()))
    return EXIT_COMPLETE


def validate(options: argparse.Namespace) -> int:
    from esm_packed.reports.validation.thresholds import THRESHOLDS, Threshold
    from esm_packed.runners.input.fasta import ReadOptions
    from esm_packed.runners.validate import ValidateRequest, validate_file
    from esm_packed.runners.watch.console import Console

    _check_standard_input([options.fasta])
    thresholds = {
        mode: Threshold(relative_l2, THRESHOLDS[mode].cosine if cosine is None else cosine)
        for mode, relative_l2, cosine in options.thresholds
    }
    request = _request(ValidateRequest, options, thresholds=thresholds, read=_request(ReadOptions, options))
    lines, passed = validate_file(request, Console(options.quiet))
    say(lines)
    return EXIT_COMPLETE if passed else EXIT_FAILED


def report_speedup(options: argparse.Namespace) -> int:
    from esm_packed.reports.speedup.page import report_files, write_report
    from esm_packed.runners.system.paths import check_apart

    written = {f"--output: {path.name}": path for path in report_files(options.output)}
    check_apart(written, [options.results, *options.older])
    say(write_report(options.results, options.older, options.output))
    return EXIT_COMPLETE
