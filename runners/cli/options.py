"""What `esm-packed` can be asked on the command line: its commands, their options and their help."""

from __future__ import annotations

import argparse

from esm_packed.config import (
    DEFAULT_MODEL,
    DTYPES,
    ESM2_MODELS,
    REFERENCES,
)
from esm_packed.reports.validation.thresholds import THRESHOLDS
from esm_packed.runners.cli import commands as run
from esm_packed.runners.cli import values
from esm_packed.runners.cli.contacts_options import add_contacts
from esm_packed.runners.cli.embed_options import add_embed
from esm_packed.runners.cli.export_options import add_export, add_map
from esm_packed.runners.cli.extract_options import add_extract
from esm_packed.runners.cli.parser import (
    Parser,
    add_command,
    add_device,
    add_fasta,
    add_max_length,
    add_model,
    add_parts,
    add_read_rules,
    add_threads,
)
from esm_packed.runners.cli.score_options import add_score
from esm_packed.version import __version__

TUNED_DTYPES = tuple(dtype for dtype in DTYPES if dtype != "fp64")

_EPILOG = """\
examples:
  esm-packed embed proteins.fasta -o embeddings.h5
  esm-packed info embeddings.h5
  esm-packed COMMAND --help

exit codes: 0 complete, 1 failed verdict or internal error, 2 wrong input or option, 3 failed rows,
4 interrupted (repeat the command to continue), 5 out of space"""

_TUNE_EPILOG = """\
examples:
  esm-packed tune
  esm-packed tune --model esm2_t33_650M_UR50D --dtype fp16,bf16
  esm-packed tune --device cuda:1 --time-limit 600 -o my-gpu.json

Settings that compute wrong numbers are dropped, and only those that save over 2% of a kernel's time are kept.
Each kernel's are written as soon as they are found; what the file has for other kernels remains."""


def _thresholds() -> str:
    return "\n".join(
        f"  {mode}  relative L2 at most {threshold.relative_l2:g}"
        + (f", cosine at least {threshold.cosine:g}" if threshold.cosine else "")
        for mode, threshold in THRESHOLDS.items()
    )


_VALIDATE_EPILOG = f"""\
examples:
  esm-packed validate esm2_t33_650M_UR50D proteins.fasta -o report
  esm-packed validate my-finetune.pt proteins.fasta -o report --dtype fp16,bf16 --threshold fp16=1e-3
  esm-packed validate demo proteins.fasta -o report --reference fair-esm --limit 20

A mode passes when the mean embedding of every protein, on every path, is as close to the FP64 reference as
its threshold asks:
{_thresholds()}

Figures need matplotlib: pip install 'matplotlib>=3.8'

exit codes: 0 every mode that ran passes, 1 one fails, 2 wrong input or option, 4 interrupted"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="esm-packed",
        description="ESM-2 protein embeddings without padding: from FASTA files to HDF5.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"esm-packed {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", title="commands")
    for add in (
        add_embed,
        add_extract,
        add_score,
        add_export,
        add_map,
        add_contacts,
        _add_info,
        _add_check,
        _add_checkpoint,
        _add_merge,
        _add_status,
        _add_tune,
        _add_validate,
        _add_report,
    ):
        add(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "info",
        run.info,
        "esm_packed.runners.cli.info",
        help="describe an output, a run, a FASTA file or a model",
        description="Describe an HDF5 output, an unfinished run, a FASTA file, or a model given by name, "
        "file or folder.",
    )
    parser.add_argument("subject", type=values.input_name, metavar="FILE|MODEL")
    parser.add_argument(
        "--all", action="store_true", help="list all faults of a FASTA file, not only the first ten"
    )
    parser.add_argument("--json", action="store_true", help="an output or a run as JSON, for machines")


def _add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "check",
        run.check,
        "esm_packed.runners.check",
        help="compare a model's outputs here with published ones",
        description="Compute a few proteins in FP32 and in the device's default precision, and compare with\n"
        "outputs of the published model that others computed. `demo` has its own.",
        epilog="exit codes: 0 passed, 1 differs, 2 no golden values for this model, or wrong option",
    )
    add_model(parser)
    add_device(parser)
    add_threads(parser)


def _add_checkpoint(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "checkpoint",
        run.checkpoint,
        "esm_packed.checkpoints",
        help="write a model as fair-esm reads it",
        description="Write a model as a fair-esm checkpoint, with its contact-regression file beside it.",
    )
    add_model(parser)
    parser.add_argument(
        "-o", "--output", required=True, type=values.output_file, metavar="esm2_OUT.pt", help="file to make"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def _add_status(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "status",
        run.status,
        "esm_packed.runners.status",
        help="show the progress of a run",
        description="Show the progress of the run of an output, and which processes are at work on it.",
    )
    parser.add_argument(
        "output", type=values.path, metavar="OUT.h5", help="the output, or its folder OUT.h5.run"
    )


def _add_merge(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "merge",
        run.merge,
        "esm_packed.runners.merging",
        help="put the finished shards of a run together",
        description="Put the shards of a run together when all are finished. `embed` does this itself; it\n"
        "is needed when the last process was killed before it could. It takes neither model nor GPU.",
    )
    parser.add_argument(
        "output", type=values.path, metavar="OUT.h5", help="the output, or its folder OUT.h5.run"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.h5 if it is there")
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.h5.run when OUT.h5 is made")
    parser.add_argument("--compression", choices=("none", "gzip"), default="none", help="as for embed")
    add_parts(parser)
    parser.add_argument(
        "--partial",
        action="store_true",
        help="make OUT.h5 of the shards that are finished; the other rows are NaN, their status is 3, and "
        "OUT.h5.run is kept",
    )


def _add_tune(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "tune",
        run.tune,
        "esm_packed.runners.tune",
        help="find the fastest settings of the GPU kernels",
        description="Measure which launch settings of the Triton kernels are fastest on this GPU.\n"
        "Every run of esm-packed on a GPU of this name then uses them.",
        epilog=_TUNE_EPILOG,
    )
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        choices=(*ESM2_MODELS, "all"),
        metavar="NAME",
        help=f"tune for this ESM-2 model, such as {DEFAULT_MODEL}; may be repeated (default: all)",
    )
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        type=values.dtypes(TUNED_DTYPES),
        default=("fp16",),
        metavar="LIST",
        help=f"precisions, of {','.join(TUNED_DTYPES)} (default: fp16)",
    )
    parser.add_argument(
        "--tokens",
        type=values.whole_number(1024),
        default=16384,
        metavar="N",
        help="tokens computed together, in proteins of mixed lengths (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=values.device, default="cuda", help="cuda or cuda:INDEX (default: cuda)"
    )
    parser.add_argument(
        "--time-limit",
        type=values.whole_number(1),
        metavar="SECONDS",
        help="begin no further kernel after this time",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=values.output_file,
        metavar="FILE.json",
        help="file to write or complete (default: the one esm-packed reads, in its installation)",
    )


def _add_validate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "validate",
        run.validate,
        "esm_packed.runners.validate",
        help="report how far each precision is from FP64 on your proteins",
        description="Compute proteins of a FASTA file in every precision, packed and padded, with every\n"
        "attention backend there is, compare with FP64, and write a report with a verdict on each precision.",
        epilog=_VALIDATE_EPILOG,
    )
    add_model(parser)
    add_fasta(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=values.output_folder,
        metavar="DIR",
        help="folder for the report",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is in DIR")
    parser.add_argument("--quiet", action="store_true", help="no notes and no progress; the verdict remains")
    _add_verdict(parser)
    parser.add_argument(
        "--limit",
        type=values.whole_number(0),
        default=200,
        metavar="N",
        help="most proteins, evenly spaced by length; 0 for all (default: %(default)s)",
    )
    add_max_length(parser)
    add_device(parser)
    parser.add_argument(
        "--token-budget", type=values.whole_number(1), metavar="N", help="tokens computed together"
    )
    add_threads(parser)
    add_read_rules(parser)


def _add_verdict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        type=values.dtypes(DTYPES),
        default=("fp32", "tf32", "fp16", "bf16"),
        metavar="LIST",
        help=f"precisions, of {','.join(DTYPES)} (default: all but fp64; tf32 where the device has it)",
    )
    parser.add_argument(
        "--threshold",
        dest="thresholds",
        type=values.threshold,
        action="append",
        default=[],
        metavar="DTYPE=L2[,COSINE]",
        help=f"what every protein of a precision ({','.join(DTYPES)}) must keep to, such as "
        "fp16=1e-3,0.99999; may be repeated",
    )
    parser.add_argument(
        "--reference",
        choices=REFERENCES,
        default="esm-packed",
        help="FP64 reference: our own path, or fair-esm if it is installed (default: %(default)s)",
    )


def _add_report(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "report",
        help="make a report of benchmark results",
        description="Make a report of benchmark results: HTML, Markdown, CSV and figures.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="report", metavar="KIND", title="reports", required=True)
    speedup = add_command(
        kinds,
        "speedup",
        run.report_speedup,
        "esm_packed.reports.speedup.page",
        help="how fast, beside what, and what changed",
        description="Compare precisions, packed and padded batches, other packages and older results.",
    )
    speedup.add_argument(
        "results", type=values.path, metavar="OUT.json", help="of pytest benchmarks --benchmark-json OUT.json"
    )
    speedup.add_argument(
        "older", type=values.path, nargs="*", metavar="OLDER.json", help="results to compare with"
    )
    speedup.add_argument(
        "-o", "--output", type=values.output_folder, required=True, metavar="DIR", help="folder to fill"
    )
