"""What `esm-packed` can be asked on the command line: its commands, their options and their help."""

from __future__ import annotations

import argparse

from esm_packed.config import (
    ATTENTIONS,
    DEFAULT_MODEL,
    DEFAULT_TOKEN_BUDGETS,
    DTYPES,
    ESM2_MODELS,
    REFERENCES,
)
from esm_packed.reports.validation.thresholds import THRESHOLDS
from esm_packed.runners.cli import commands as run
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import (
    Parser,
    add_command,
    add_device,
    add_max_length,
    add_model,
    add_read_rules,
    add_threads,
)
from esm_packed.version import __version__

TUNED_DTYPES = tuple(dtype for dtype in DTYPES if dtype != "fp64")

_EPILOG = """\
examples:
  esm-packed embed proteins.fasta -o embeddings.h5
  esm-packed info embeddings.h5
  esm-packed COMMAND --help

exit codes: 0 complete, 1 failed verdict or internal error, 2 wrong input or option, 3 failed rows,
4 interrupted (repeat the command to continue), 5 out of space"""

_EMBED_EPILOG = f"""\
examples:
  esm-packed embed proteins.fasta -o embeddings.h5 --model demo
  esm-packed embed a.fasta b.fasta.gz -o all.h5 --model esm2_t12_35M_UR50D --layers 6,12
  zcat reads.faa.gz | esm-packed embed - -o reads.h5 --device cuda:1 --token-budget 65536
  esm-packed embed proteome.fasta -o proteome.h5 --devices all --fp32-compare 100
  esm-packed embed proteome.fasta -o proteome.h5 --slice $SLURM_ARRAY_TASK_ID/8

The work is done in OUT.h5.run. Interrupted or killed, the same command continues it.

models: {", ".join(list(ESM2_MODELS)[:3])},
{", ".join(list(ESM2_MODELS)[3:])},
a checkpoint file or folder, demo (tiny, for trying out), random:NAME (seeded random weights)"""

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
        _add_embed,
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


def _add_embed(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "embed",
        run.embed,
        "esm_packed.runners.session",
        help="embed the proteins of FASTA files",
        description="Embed every protein of the FASTA files, in input order, into one HDF5 file:\n"
        "the mean over its residues of the last layer, or of the layers asked for.",
        epilog=_EMBED_EPILOG,
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        type=values.input_name,
        metavar="FASTA",
        help="FASTA file, plain or gzip; - is standard input, which a run that has read it can be continued "
        "without",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=values.output_file, metavar="OUT.h5", help="HDF5 file to make"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT.h5, or an unfinished run of other options"
    )
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.h5.run when OUT.h5 is made")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="say nothing but what goes wrong")
    amount.add_argument("--verbose", action="store_true", help="a summary with stages and packing at the end")
    parser.add_argument(
        "--log-json",
        type=values.path,
        metavar="FILE",
        help="append metrics to FILE every ten seconds, a JSON object in each line",
    )
    _add_embed_model(parser.add_argument_group("model"))
    _add_embed_computing(parser.add_argument_group("computing"))
    _add_embed_workers(parser.add_argument_group("several devices and machines"))
    add_read_rules(parser)


def _add_embed_model(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--model", type=values.model, default=DEFAULT_MODEL, help="see below (default: %(default)s)"
    )
    model.add_argument(
        "--layers",
        type=values.layers,
        default=(-1,),
        metavar="LIST",
        help="layers to keep, such as 6,12 or -1 (the last, the default); the last one listed is "
        "`embeddings` in the file, the others are `mean/LAYER`",
    )
    add_max_length(model)
    model.add_argument(
        "--store-dtype", choices=("fp32", "fp16"), default="fp32", help="of the stored embeddings"
    )


def _add_embed_computing(compute: argparse._ArgumentGroup) -> None:
    add_device(compute)
    compute.add_argument("--dtype", choices=DTYPES, help="precision (default: fp16 on a GPU, fp32 on a CPU)")
    compute.add_argument(
        "--fp32-compare",
        type=values.whole_number(0),
        default=0,
        metavar="N",
        help="compute N sampled sequences in FP32, too, and report how far off the others are",
    )
    compute.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="auto",
        help="attention backend (default: the best installed)",
    )
    compute.add_argument(
        "--token-budget",
        type=values.whole_number(1),
        metavar="N",
        help=f"tokens computed together, BOS and EOS included (default: {DEFAULT_TOKEN_BUDGETS['cpu']} on a "
        "CPU; on a GPU what its memory is measured to hold, at most "
        f"{DEFAULT_TOKEN_BUDGETS['cuda']}, which --reproducible always takes)",
    )
    add_threads(compute, " of each worker")
    compute.add_argument(
        "--reproducible",
        action="store_true",
        help="packs of one size, filled up: an embedding has the same bits whatever it is computed with "
        "(same kind of device, threads, versions, precision and --token-budget)",
    )
    compute.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="with --reproducible, on a GPU: launch each forward pass as one graph, which pays off for small "
        "models",
    )
    compute.add_argument(
        "--disable-packing",
        action="store_true",
        help="padded batches in place of packs, to compare with (also ESM_PACKED_DISABLE_PACKING=1)",
    )
    compute.add_argument(
        "--disable-fp16",
        action="store_true",
        help="FP32 wherever FP16 or BF16 would be used (also ESM_PACKED_DISABLE_FP16=1)",
    )


def _add_embed_workers(many: argparse._ArgumentGroup) -> None:
    many.add_argument(
        "--devices",
        type=values.gpu_numbers,
        metavar="all|LIST",
        help="GPUs of this machine, such as 0,1; a worker on each, through Ray",
    )
    many.add_argument(
        "--workers",
        type=values.whole_number(1),
        metavar="N",
        help="Ray workers, each with one GPU or --threads CPU threads",
    )
    many.add_argument(
        "--engine",
        choices=("auto", "in-process", "ray"),
        default="auto",
        help="who computes (default: Ray for several workers, else this process)",
    )
    many.add_argument("--ray-address", metavar="ADDRESS", help="a Ray cluster, such as auto or HEAD:6379")
    many.add_argument(
        "--slice",
        dest="part",
        metavar="INDEX/COUNT|auto",
        help="compute this slice of the run alone, without Ray; auto takes both from torchrun or Slurm. The "
        "process that finishes last makes OUT.h5",
    )


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
    parser.add_argument(
        "fasta",
        type=values.input_name,
        metavar="FASTA",
        help="FASTA file, plain or gzip; - is standard input",
    )
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
