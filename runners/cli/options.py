"""What `esm-packed` can be asked on the command line: its commands, their options and their help."""

from __future__ import annotations

import argparse
import errno
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from esm_packed.config import DEFAULT_MODEL, DEFAULT_TOKEN_BUDGETS, ESM2_MODELS
from esm_packed.runners.cli import commands as run
from esm_packed.runners.system.terminal import EXIT_USAGE, complain
from esm_packed.version import __version__

# The names in `numerics.PRECISIONS` and `attention.BACKENDS`, which cannot be imported without torch.
DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16")
ATTENTIONS = ("auto", "flash3", "fa3_fwd", "flash4", "varlen", "flash2", "triton", "sdpa", "reference")
TUNED_DTYPES = ("fp16", "bf16", "fp32", "tf32")

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

REFERENCES = ("esm-packed", "fair-esm")

_VALIDATE_EPILOG = """\
examples:
  esm-packed validate esm2_t33_650M_UR50D proteins.fasta -o report
  esm-packed validate my-finetune.pt proteins.fasta -o report --dtype fp16,bf16 --threshold fp16=1e-3
  esm-packed validate demo proteins.fasta -o report --reference fair-esm --limit 20

A mode passes when the mean embedding of every protein, on every path, is as close to the FP64 reference as
its threshold asks, in relative L2 and cosine: fp32 1e-5; tf32 and fp16 5e-3, 0.99999; bf16 3e-2, 0.9995.
Figures need matplotlib: pip install 'matplotlib>=3.8'

exit codes: 0 every mode that ran passes, 1 one fails, 2 wrong input or option, 4 interrupted"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        sys.exit(EXIT_USAGE)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="esm-packed",
        description="ESM-2 protein embeddings without padding: from FASTA files to HDF5.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"esm-packed {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_embed(commands)
    _add_info(commands)
    _add_check(commands)
    _add_checkpoint(commands)
    _add_merge(commands)
    _add_status(commands)
    _add_tune(commands)
    _add_validate(commands)
    _add_report(commands)
    return parser


def _runs(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int], module: str) -> None:
    """Let `parser` lead to `command`, which needs `module` and what that imports."""
    parser.set_defaults(run=command, module=module)


def _add_embed(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "embed",
        help="embed the proteins of FASTA files",
        description="Embed every protein of the FASTA files, in input order, into one HDF5 file:\n"
        "the mean over its residues of the last layer, or of the layers asked for.",
        epilog=_EMBED_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _runs(parser, run.embed, "esm_packed.runners.session")
    parser.add_argument(
        "fasta",
        nargs="+",
        type=_input,
        metavar="FASTA",
        help="FASTA file, plain or gzip; - is standard input",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=_path, metavar="OUT.h5", help="HDF5 file to make"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT.h5, or an unfinished run of other options"
    )
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.h5.run when OUT.h5 is made")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="say nothing but what goes wrong")
    amount.add_argument(
        "--verbose", action="store_true", help="a summary with stages, packing and all counts at the end"
    )
    parser.add_argument(
        "--log-json",
        type=_path,
        metavar="FILE",
        help="append metrics to FILE every ten seconds, a JSON object in each line",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", default=DEFAULT_MODEL, help="see below (default: %(default)s)")
    model.add_argument(
        "--layers",
        type=_layers,
        default=(-1,),
        metavar="LIST",
        help="layers to keep, such as 6,12 or -1 (the last, the default); the last one listed is "
        "`embeddings` in the file, the others are `mean/LAYER`",
    )
    model.add_argument(
        "--max-length",
        type=_count(0),
        default=1022,
        metavar="N",
        help="keep the first N residues of longer proteins, 0 for all (default: %(default)s)",
    )
    model.add_argument(
        "--store-dtype", choices=("fp32", "fp16"), default="fp32", help="of the stored embeddings"
    )

    compute = parser.add_argument_group("computing")
    compute.add_argument(
        "--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:INDEX (default: auto)"
    )
    compute.add_argument("--dtype", choices=DTYPES, help="precision (default: fp16 on a GPU, fp32 on a CPU)")
    compute.add_argument(
        "--fp32-compare",
        type=_count(0),
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
        type=_count(1),
        metavar="N",
        help="tokens computed together, BOS and EOS included (default: "
        + ", ".join(f"{budget} on {device}" for device, budget in DEFAULT_TOKEN_BUDGETS.items())
        + ")",
    )
    compute.add_argument(
        "--threads", type=_count(1), metavar="N", help="CPU threads of each worker (default: torch's choice)"
    )
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

    many = parser.add_argument_group("several devices and machines")
    many.add_argument(
        "--devices",
        type=_gpu_numbers,
        metavar="all|LIST",
        help="GPUs of this machine, such as 0,1; a worker on each, through Ray",
    )
    many.add_argument(
        "--workers",
        type=_count(1),
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
        metavar="INDEX/COUNT|auto",
        help="compute this slice of the run alone, without Ray; auto takes both from torchrun or Slurm. The "
        "process that finishes last makes OUT.h5",
    )

    _add_read_rules(parser)


def _add_info(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "info",
        help="describe an output, a run, a FASTA file or a model",
        description="Describe an HDF5 output, an unfinished run, a FASTA file, or a model given by name, "
        "file or folder.",
        allow_abbrev=False,
    )
    _runs(parser, run.info, "esm_packed.runners.cli.info")
    parser.add_argument("subject", metavar="FILE|MODEL")
    parser.add_argument(
        "--all", action="store_true", help="list all faults of a FASTA file, not only the first ten"
    )
    parser.add_argument("--json", action="store_true", help="an output or a run as JSON, for machines")


def _add_check(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "check",
        help="compare a model's outputs here with published ones",
        description="Compute a few proteins in FP32 and in the device's default precision, and compare with\n"
        "outputs of the published model that others computed. `demo` has its own.",
        epilog="exit codes: 0 passed, 1 differs, 2 no golden values for this model, or wrong option",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _runs(parser, run.check, "esm_packed.runners.check")
    parser.add_argument("model", metavar="MODEL", help="name, file or folder, as for embed --model")
    parser.add_argument(
        "--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:INDEX (default: auto)"
    )
    parser.add_argument(
        "--threads", type=_count(1), metavar="N", help="CPU threads (default: torch's choice)"
    )


def _add_checkpoint(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="write a model as fair-esm reads it",
        description="Write a model as a fair-esm checkpoint, with its contact-regression file beside it.",
        allow_abbrev=False,
    )
    _runs(parser, run.checkpoint, "esm_packed.weights")
    parser.add_argument("model", metavar="MODEL", help="name, file or folder, as for embed --model")
    parser.add_argument(
        "-o", "--output", required=True, type=_path, metavar="esm2_OUT.pt", help="file to make"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def _add_status(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "status",
        help="say how far a run is",
        description="Say how far the run of an output is, and which processes are at work on it.",
        allow_abbrev=False,
    )
    _runs(parser, run.status, "esm_packed.runners.status")
    parser.add_argument("output", type=_path, metavar="OUT.h5", help="the output, or its folder OUT.h5.run")


def _add_merge(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "merge",
        help="put the finished shards of a run together",
        description="Put the shards of a run together when all are finished. `embed` does this itself; it\n"
        "is needed when the last process was killed before it could. It takes neither model nor GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _runs(parser, run.merge, "esm_packed.runners.merging")
    parser.add_argument("output", type=_path, metavar="OUT.h5", help="the output, or its folder OUT.h5.run")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.h5 if it is there")
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.h5.run when OUT.h5 is made")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="make OUT.h5 of the shards that are finished; the other rows are NaN, their status is 3",
    )


def _add_tune(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the fastest settings of the GPU kernels",
        description="Measure which launch settings of the Triton kernels are fastest on this GPU.\n"
        "Every run of esm-packed on a GPU of this name then uses them.",
        epilog=_TUNE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _runs(parser, run.tune, "esm_packed.runners.tune")
    parser.add_argument(
        "--model",
        action="append",
        choices=(*ESM2_MODELS, "all"),
        metavar="NAME",
        help=f"tune for this ESM-2 model, such as {DEFAULT_MODEL}; may be repeated (default: all)",
    )
    parser.add_argument(
        "--dtype",
        type=_tuned_dtypes,
        default=("fp16",),
        metavar="LIST",
        help=f"precisions, of {','.join(TUNED_DTYPES)} (default: fp16)",
    )
    parser.add_argument(
        "--tokens",
        type=_count(1024),
        default=16384,
        metavar="N",
        help="tokens computed together, in proteins of mixed lengths (default: %(default)s)",
    )
    parser.add_argument("--device", type=_device, default="cuda", help="cuda or cuda:INDEX (default: cuda)")
    parser.add_argument(
        "--time-limit", type=_count(1), metavar="SECONDS", help="begin no further kernel after this time"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=_path,
        metavar="FILE.json",
        help="file to write or complete (default: the one esm-packed reads, in its installation)",
    )


def _add_validate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "validate",
        help="report how far each precision is from FP64 on your proteins",
        description="Compute proteins of a FASTA file in every precision, packed and padded, with every\n"
        "attention backend there is, compare with FP64, and write a report with a verdict on each precision.",
        epilog=_VALIDATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _runs(parser, run.validate, "esm_packed.runners.validate")
    parser.add_argument("model", metavar="MODEL", help="name, file or folder, as for embed --model")
    parser.add_argument(
        "fasta", type=_input, metavar="FASTA", help="FASTA file, plain or gzip; - is standard input"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=_path, metavar="DIR", help="folder for the report"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is in DIR")
    parser.add_argument("--quiet", action="store_true", help="no notes and no progress; the verdict remains")
    parser.add_argument(
        "--dtype",
        type=_validated_dtypes,
        default=("fp32", "tf32", "fp16", "bf16"),
        metavar="LIST",
        help=f"precisions, of {','.join(DTYPES)} (default: all but fp64; tf32 where the device has it)",
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
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
    parser.add_argument(
        "--limit",
        type=_count(0),
        default=200,
        metavar="N",
        help="most proteins, evenly spaced by length; 0 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=_count(0),
        default=1022,
        metavar="N",
        help="keep the first N residues of longer proteins, 0 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:INDEX (default: auto)"
    )
    parser.add_argument("--token-budget", type=_count(1), metavar="N", help="tokens computed together")
    parser.add_argument(
        "--threads", type=_count(1), metavar="N", help="CPU threads (default: torch's choice)"
    )
    _add_read_rules(parser)


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "report",
        help="make a report of benchmark results",
        description="Make a report of benchmark results: HTML, Markdown, CSV and figures.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="report", metavar="KIND", title="reports", required=True)
    speedup = kinds.add_parser(
        "speedup",
        help="how fast, beside what, and what changed",
        description="Compare precisions, packed and padded batches, other packages and older results.",
        allow_abbrev=False,
    )
    _runs(speedup, run.report_speedup, "esm_packed.reports.speedup.page")
    speedup.add_argument(
        "results", type=_path, metavar="OUT.json", help="of pytest benchmarks --benchmark-json OUT.json"
    )
    speedup.add_argument("older", type=_path, nargs="*", metavar="OLDER.json", help="results to compare with")
    speedup.add_argument("-o", "--output", type=_path, required=True, metavar="DIR", help="folder to fill")


def _add_read_rules(parser: argparse.ArgumentParser) -> None:
    rules = parser.add_argument_group(
        "input rules (by default a fault is an error, before anything is computed)"
    )
    rules.add_argument(
        "--invalid",
        choices=("error", "x", "skip"),
        default="error",
        help="characters outside the alphabet: replace them by X, or leave their records out",
    )
    rules.add_argument(
        "--duplicates",
        choices=("error", "first", "rename"),
        default="error",
        help="records of one ID: keep the first, or rename later ones to ID__2, ID__3 ...",
    )
    rules.add_argument("--gaps", choices=("error", "drop"), default="error", help="gaps - and . in sequences")
    rules.add_argument(
        "--full-header", action="store_true", help="the ID is the whole header, not its first word"
    )
    rules.add_argument("--force", action="store_true", help="go on with sequences that look like DNA")


def join_negative_layers(arguments: Sequence[str]) -> list[str]:
    """`--layers -1,-2` as `--layers=-1,-2`: argparse takes the list for an option otherwise."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--layers" and re.match("-[0-9]", argument):
            joined[-1] = f"--layers={argument}"
        else:
            joined.append(argument)
    return joined


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or folder is empty")
    path = Path(text)
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise argparse.ArgumentTypeError(f"{shown!r}: {error.strerror}") from error
    return path


def _input(text: str) -> str:
    _path(text)
    return text


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not re.fullmatch("-?[0-9]{1,18}", text) or not least <= int(text) <= 2**31 - 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {2**31 - 1}")
        return int(text)

    return count


def _layers(text: str) -> tuple[int, ...]:
    if not re.fullmatch("-?[0-9]{1,9}(,-?[0-9]{1,9})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 6,12 or -1")
    return tuple(int(layer) for layer in text.split(","))


def _tuned_dtypes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(TUNED_DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(TUNED_DTYPES)}")
    return names


def _device(text: str) -> str:
    if text.partition(":")[0] == "mps":
        raise argparse.ArgumentTypeError(
            "mps is not supported: its results have not been checked against fair-esm; use cpu"
        )
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:INDEX")
    return text


def _gpu_numbers(text: str) -> tuple[int, ...]:
    if text == "all":
        return ()
    if not re.fullmatch("[0-9]{1,3}(,[0-9]{1,3})*", text) or len(set(text.split(","))) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a list of GPU numbers such as 0,1")
    return tuple(map(int, text.split(",")))


def _validated_dtypes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(DTYPES)}")
    return names


def _threshold(text: str) -> tuple[str, float, float | None]:
    dtype, _, numbers = text.partition("=")
    try:
        relative_l2, cosine = [*map(float, numbers.split(",")), None][:2]
    except ValueError:
        relative_l2 = cosine = None
    if re.search("[^-+.,0-9A-Za-z]", numbers):  # float() takes more, such as the digits of other scripts
        relative_l2 = None
    if dtype not in DTYPES or relative_l2 is None or numbers.count(",") > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not DTYPE=L2[,COSINE], such as fp16=1e-3,0.99999")
    if not 0 <= relative_l2 < math.inf or (cosine is not None and not -1 <= cosine <= 1):
        raise argparse.ArgumentTypeError(
            f"{text!r}: the relative L2 error must be finite and not below 0, the cosine within -1 to 1"
        )
    return dtype, relative_l2, cosine
