"""The command line of `esm-packed`: its commands, their options and their help."""

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

exit codes: 0 complete, 1 failed verdict, out of memory or internal error, 2 wrong input or option, 3 some
rows failed, 4 interrupted (rerun the same command to continue), 5 out of disk space"""

_TUNE_EPILOG = """\
examples:
  esm-packed tune
  esm-packed tune --model esm2_t33_650M_UR50D --dtype fp16,bf16
  esm-packed tune --device cuda:1 --time-limit 600 -o my-gpu.json

Settings that give wrong results are rejected, and only those that save over 2% of a kernel's time are kept.
Attention backends are timed too: --attention auto then prefers the fastest on this GPU.
The settings of each kernel are written as soon as they are found; those of other kernels stay in the file."""


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

A mode passes if the mean embedding of every protein, on every path, is within its threshold of the FP64
reference:
{_thresholds()}

Figures need matplotlib: pip install 'matplotlib>=3.8'

exit codes: 0 every mode that ran passed, 1 a mode failed, 2 wrong input or option, 4 interrupted"""


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
        help="describe an output file, a run, a FASTA file or a model",
        description="Describe an HDF5 output file, an unfinished run, a FASTA file, or a model given by\n"
        "name, file or directory.",
    )
    parser.add_argument("subject", type=values.input_name, metavar="FILE|MODEL")
    parser.add_argument(
        "--all", action="store_true", help="list all problems of a FASTA file, not only the first ten"
    )
    parser.add_argument("--json", action="store_true", help="describe an output file or a run as JSON")


def _add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "check",
        run.check,
        "esm_packed.runners.check",
        help="compare a model's outputs on this machine with published ones",
        description="Embed a few proteins in FP32 and in the device's default precision, and compare the\n"
        "results with independently computed outputs of the published model. `demo` has its own values.",
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
        help="convert a model to a fair-esm checkpoint",
        description="Write a model as a fair-esm checkpoint, with its contact-regression file next to it.",
    )
    add_model(parser)
    parser.add_argument(
        "-o", "--output", required=True, type=values.output_file, metavar="esm2_OUT.pt", help="output file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_status(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "status",
        run.status,
        "esm_packed.runners.status",
        help="show the progress of a run",
        description="Show the progress of a run and its active workers.",
    )
    parser.add_argument(
        "output", type=values.path, metavar="OUT.h5", help="output file, or its run directory OUT.h5.run"
    )


def _add_merge(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "merge",
        run.merge,
        "esm_packed.runners.merging",
        help="merge the shards of a run",
        description="Merge the shards of a run when all are finished. `embed` does this itself; `merge` is\n"
        "needed only if the last process was killed before it could. It needs neither the model nor a GPU.",
    )
    parser.add_argument(
        "output", type=values.path, metavar="OUT.h5", help="output file, or its run directory OUT.h5.run"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT.h5")
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.h5.run after OUT.h5 is written")
    parser.add_argument("--compression", choices=("none", "gzip"), default="none", help="as for embed")
    add_parts(parser)
    parser.add_argument(
        "--partial",
        action="store_true",
        help="write OUT.h5 from the finished shards; the other rows are NaN with status 3, and OUT.h5.run is "
        "kept",
    )


def _add_tune(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "tune",
        run.tune,
        "esm_packed.runners.tune",
        help="find the fastest settings of the GPU kernels",
        description="Find the fastest launch settings of the Triton kernels on this GPU.\n"
        "Every later run of esm-packed on a GPU of the same name uses them.",
        epilog=_TUNE_EPILOG,
    )
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        choices=(*ESM2_MODELS, "all"),
        metavar="NAME",
        help=f"ESM-2 model to tune for, such as {DEFAULT_MODEL}; may be repeated (default: all)",
    )
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        type=values.dtypes(TUNED_DTYPES),
        default=("fp16",),
        metavar="LIST",
        help=f"precisions, from {','.join(TUNED_DTYPES)} (default: fp16)",
    )
    parser.add_argument(
        "--tokens",
        type=values.whole_number(1024),
        default=16384,
        metavar="N",
        help="tokens in a batch of proteins of mixed lengths (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=values.device, default="cuda", help="cuda or cuda:INDEX (default: cuda)"
    )
    parser.add_argument(
        "--time-limit",
        type=values.whole_number(1),
        metavar="SECONDS",
        help="do not start another kernel after this time",
    )
    parser.add_argument(
        "--jobs",
        type=values.whole_number(0),
        metavar="N",
        help="processes that compile settings ahead of their turn (default: all CPU cores but one)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=values.output_file,
        metavar="FILE.json",
        help="file to write or update (default: the one that esm-packed reads, in its installation)",
    )


def _add_validate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "validate",
        run.validate,
        "esm_packed.runners.validate",
        help="measure the error of each precision on your proteins",
        description="Embed proteins of a FASTA file in every precision, packed and padded, with every\n"
        "available attention backend, compare with FP64, and report a verdict on each precision.",
        epilog=_VALIDATE_EPILOG,
    )
    add_model(parser)
    add_fasta(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=values.output_directory,
        metavar="DIR",
        help="directory of the report",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report in DIR")
    parser.add_argument("--quiet", action="store_true", help="print only the verdict, warnings and errors")
    _add_verdict(parser)
    parser.add_argument(
        "--limit",
        type=values.whole_number(0),
        default=200,
        metavar="N",
        help="maximum number of proteins, evenly spaced by length; 0 for all (default: %(default)s)",
    )
    add_max_length(parser)
    add_device(parser)
    parser.add_argument("--token-budget", type=values.whole_number(1), metavar="N", help="tokens in a batch")
    add_threads(parser)
    add_read_rules(parser)


def _add_verdict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        type=values.dtypes(DTYPES),
        default=("fp32", "tf32", "fp16", "bf16"),
        metavar="LIST",
        help=f"precisions, from {','.join(DTYPES)} (default: all but fp64; tf32 if the device has it)",
    )
    parser.add_argument(
        "--threshold",
        dest="thresholds",
        type=values.threshold,
        action="append",
        default=[],
        metavar="DTYPE=L2[,COSINE]",
        help=f"largest error and smallest cosine allowed in a precision ({','.join(DTYPES)}), such as "
        "fp16=1e-3,0.99999; may be repeated",
    )
    parser.add_argument(
        "--reference",
        choices=REFERENCES,
        default="esm-packed",
        help="FP64 reference: esm-packed, or fair-esm if it is installed (default: %(default)s)",
    )


def _add_report(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "report",
        help="write a report of benchmark results",
        description="Write a report of benchmark results: HTML, Markdown, CSV and figures.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="report", metavar="KIND", title="reports", required=True)
    speedup = add_command(
        kinds,
        "speedup",
        run.report_speedup,
        "esm_packed.reports.speedup.page",
        help="compare speeds with other packages and with older results",
        description="Compare precisions, packed and padded batches, other packages and older results.",
    )
    speedup.add_argument(
        "results",
        type=values.path,
        metavar="OUT.json",
        help="from pytest benchmarks --benchmark-json OUT.json",
    )
    speedup.add_argument(
        "older", type=values.path, nargs="*", metavar="OLDER.json", help="results to compare with"
    )
    speedup.add_argument(
        "-o", "--output", type=values.output_directory, required=True, metavar="DIR", help="output directory"
    )
