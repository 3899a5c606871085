"""The command `esm-packed`: its options, its exit codes and what it says when something is wrong.

torch, h5py and numpy are imported by the commands, so that help and wrong options answer at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from esm_packed.config import DEFAULT_MODEL, DEFAULT_TOKEN_BUDGETS, ESM2_MODELS
from esm_packed.version import __version__

EXIT_COMPLETE = 0
EXIT_INTERNAL_ERROR = 1
EXIT_USAGE = 2
EXIT_FAILED_ROWS = 3
EXIT_INTERRUPTED = 4
EXIT_OUT_OF_SPACE = 5

# The names in `numerics.PRECISIONS` and `attention.BACKENDS`, which cannot be imported without torch.
DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16")
ATTENTIONS = ("auto", "flash3", "fa3_fwd", "flash4", "varlen", "flash2", "triton", "sdpa", "reference")
TUNED_DTYPES = ("fp16", "bf16", "fp32", "tf32")

_REPEATED_SIGNAL_SECONDS = 5.0

_EPILOG = """\
examples:
  esm-packed embed proteins.fasta -o embeddings.h5
  esm-packed info embeddings.h5
  esm-packed COMMAND --help

exit codes: 0 complete, 1 internal error, 2 wrong input or option, 3 finished with failed rows,
4 interrupted (repeat the command to continue), 5 out of space"""

_EMBED_EPILOG = f"""\
examples:
  esm-packed embed proteins.fasta -o embeddings.h5 --model demo
  esm-packed embed a.fasta b.fasta.gz -o all.h5 --model esm2_t12_35M_UR50D --layers 6,12
  zcat reads.faa.gz | esm-packed embed - -o reads.h5 --device cuda:1 --token-budget 65536
  esm-packed embed proteome.fasta -o proteome.h5 --devices all --fp32-compare 100
  esm-packed embed proteome.fasta -o proteome.h5 --shard $SLURM_ARRAY_TASK_ID/8

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


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop; `str(error)` is the signal's name."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        sys.exit(EXIT_USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; `sys.argv` when None.

    Returns:
        The exit code.
    """
    parser = _build_parser()
    with _signals_interrupt(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options = parser.parse_args(
                _join_negative_layers(sys.argv[1:] if arguments is None else arguments)
            )
            if options.command is None:
                parser.print_help(sys.stderr)
                return EXIT_USAGE
            command: Callable[[argparse.Namespace], int] = options.run
            return command(options)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else EXIT_USAGE
        except KeyboardInterrupt as error:
            _complain(f"interrupted ({error}); repeat the command to continue")
            return EXIT_INTERRUPTED
        except Exception as error:
            return _report(error)


def _report(error: Exception) -> int:
    """Explain `error` in one line and return the exit code it calls for."""
    if _is_out_of_space(error):
        reason = error.strerror if isinstance(error, OSError) else str(error)
        _complain(f"out of space: {reason}; free some and repeat the command to continue")
        return EXIT_OUT_OF_SPACE
    if _is_of(error, {"esm_packed.runners.ray_engine": "EngineError"}):
        _complain(f"{error}; what is finished is kept, repeat the command to continue")
        return EXIT_INTERRUPTED
    if _is_of(error, _USER_ERRORS):
        _complain(str(error))
        return EXIT_USAGE
    if os.environ.get("ESM_PACKED_DEBUG"):
        traceback.print_exception(error)
    else:
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        _complain(f"internal error: {summary} (set ESM_PACKED_DEBUG=1 for the traceback)")
    return EXIT_INTERNAL_ERROR


def _is_out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind `error`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


_USER_ERRORS = {
    "esm_packed.attention": "BackendError",
    "esm_packed.download": "CheckpointError",
    "esm_packed.runners.fasta": "InputError",
    "esm_packed.runners.plan": "PlanError",
    "esm_packed.runners.request": "UsageError",
    "esm_packed.runners.slices": "SliceError",
    "esm_packed.runners.store": "StoreError",
}
"""What a command raises for its user's mistakes, by module."""


def _is_of(error: Exception, classes: Mapping[str, str]) -> bool:
    """Whether `error` is one of `classes`; a module that is not loaded cannot have raised it."""
    return any(
        isinstance(error, getattr(sys.modules[module], name))
        for module, name in classes.items()
        if module in sys.modules
    )


def _complain(text: str) -> None:
    with suppress(OSError):
        print(f"esm-packed: error: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    with suppress(OSError):
        print(f"esm-packed: warning: {message}", file=sys.stderr, flush=True)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a lost terminal raise `Interrupted`, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -_REPEATED_SIGNAL_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        # a second signal at once, as some schedulers send, must not interrupt the cleaning up
        if time.monotonic() - last >= _REPEATED_SIGNAL_SECONDS:
            last = time.monotonic()
            raise Interrupted(signal.Signals(number).name)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has asked for this
            previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        # once interrupted the process is about to end, and a repeated signal must not change its exit code
        for number, handler in previous.items():
            signal.signal(number, handler if last < 0 else signal.SIG_IGN)


def _join_negative_layers(arguments: Sequence[str]) -> list[str]:
    """`--layers -1,-2` as `--layers=-1,-2`: argparse takes the list for an option otherwise."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--layers" and re.match(r"-\d", argument):
            joined[-1] = f"--layers={argument}"
        else:
            joined.append(argument)
    return joined


def _build_parser() -> argparse.ArgumentParser:
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
    _add_checkpoint(commands)
    _add_merge(commands)
    _add_status(commands)
    _add_tune(commands)
    return parser


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
    parser.set_defaults(run=_embed)
    parser.add_argument(
        "fasta", nargs="+", metavar="FASTA", help="FASTA file, plain or gzip; - is standard input"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT.h5", help="HDF5 file to make"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT.h5, or an unfinished run of other options"
    )
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.h5.run when OUT.h5 is made")
    parser.add_argument("--quiet", action="store_true", help="no notes and no progress; the summary remains")
    parser.add_argument(
        "--log-json",
        type=Path,
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
        "--disable-packing",
        action="store_true",
        default=_is_set("ESM_PACKED_DISABLE_PACKING"),
        help="padded batches in place of packs, to compare with (also ESM_PACKED_DISABLE_PACKING=1)",
    )
    compute.add_argument(
        "--disable-fp16",
        action="store_true",
        default=_is_set("ESM_PACKED_DISABLE_FP16"),
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
        "--shard",
        metavar="INDEX/COUNT",
        help="compute this part of the run alone, without Ray; auto takes both from torchrun or Slurm. The "
        "process that finishes last makes OUT.h5",
    )

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


def _add_info(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "info",
        help="describe an output, a FASTA file or a model",
        description="Describe an HDF5 output, a FASTA file, or a model given by name, file or folder.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_info)
    parser.add_argument("subject", metavar="FILE|MODEL")


def _add_checkpoint(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="write a model as fair-esm reads it",
        description="Write a model as a fair-esm checkpoint, with its contact-regression file beside it.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_checkpoint)
    parser.add_argument("model", metavar="MODEL", help="name, file or folder, as for embed --model")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="esm2_OUT.pt", help="file to make"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def _add_status(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "status",
        help="say how far a run is",
        description="Say how far the run of an output is, and which processes are at work on it.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_status)
    parser.add_argument("output", type=Path, metavar="OUT.h5", help="the output, or its folder OUT.h5.run")


def _add_merge(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "merge",
        help="put the finished shards of a run together",
        description="Put the shards of a run together when all are finished. `embed` does this itself; it\n"
        "is needed when the last process was killed before it could. It takes neither model nor GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_merge)
    parser.add_argument("output", type=Path, metavar="OUT.h5", help="the output, or its folder OUT.h5.run")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.h5 if it is there")
    parser.add_argument("--keep-run", action="store_true", help="keep OUT.h5.run when OUT.h5 is made")


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
    parser.set_defaults(run=_tune)
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
        type=Path,
        metavar="FILE.json",
        help="file to write or complete (default: the one esm-packed reads, in its installation)",
    )


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text) or not least <= int(text) <= 2**31 - 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {2**31 - 1}")
        return int(text)

    return count


def _layers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", text):
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
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:INDEX")
    return text


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _gpu_numbers(text: str) -> tuple[int, ...]:
    if text == "all":
        return ()
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text) or len(set(text.split(","))) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a list of GPU numbers such as 0,1")
    return tuple(map(int, text.split(",")))


def _say(lines: Sequence[str]) -> None:
    """Print the answer; the work is done even if nobody can read it."""
    try:
        print("\n".join(lines), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _embed(options: argparse.Namespace) -> int:
    import torch

    from esm_packed.runners.embed import EmbedRequest, embed_files
    from esm_packed.runners.fasta import ReadOptions
    from esm_packed.runners.progress import Console
    from esm_packed.runners.slices import local_device_number, parse_slice

    device = options.device
    if options.shard == "auto" and device == "auto" and (num_devices := torch.cuda.device_count()):
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
        part=parse_slice(options.shard, os.environ) if options.shard is not None else None,
        dtype=options.dtype,
        disable_fp16=options.disable_fp16,
        attention=options.attention,
        layout="padded" if options.disable_packing else "packed",
        layers=options.layers,
        max_length=options.max_length,
        token_budget=options.token_budget,
        read=ReadOptions(
            invalid=options.invalid,
            duplicates=options.duplicates,
            gaps=options.gaps,
            full_header=options.full_header,
            force=options.force,
        ),
        threads=options.threads,
        store_dtype=options.store_dtype,
        fp32_compare=options.fp32_compare,
        log_json=options.log_json,
        overwrite=options.overwrite,
        keep_run=options.keep_run,
    )
    summary = embed_files(request, Console(options.quiet))
    if summary.already_complete:
        _say([f"already complete: {summary.output} holds this run ({summary.num_sequences:,} sequences)"])
    else:
        _say(summary.lines())
        for warning in summary.warnings():
            warnings.warn(warning, stacklevel=1)
    if summary.num_failed:
        _complain(
            f"{summary.num_failed:,} of {summary.num_sequences:,} embeddings are not finite; their rows are "
            "NaN, and `problems` in the output names them"
        )
        return EXIT_FAILED_ROWS
    return EXIT_COMPLETE


def _merge(options: argparse.Namespace) -> int:
    from esm_packed.runners.embed import merge_files
    from esm_packed.runners.progress import Console

    output = _output_of(options.output)
    missing = merge_files(output, Console(), overwrite=options.overwrite, keep_run=options.keep_run)
    if missing:
        _complain(f"{missing:,} shards of {output} are missing; the command that began the run computes them")
        return EXIT_INTERRUPTED
    _say([f"merged: {output}"])
    return EXIT_COMPLETE


def _output_of(path: Path) -> Path:
    """The output, which may be named by its run directory."""
    return path.with_suffix("") if path.suffix == ".run" else path


def _status(options: argparse.Namespace) -> int:
    from esm_packed.runners.rundir import RunDirectory
    from esm_packed.runners.status import describe_run

    _say(describe_run(RunDirectory(_output_of(options.output).resolve())))
    return EXIT_COMPLETE


def _info(options: argparse.Namespace) -> int:
    from esm_packed.runners.info import describe

    _say(describe(options.subject))
    return EXIT_COMPLETE


def _checkpoint(options: argparse.Namespace) -> int:
    from esm_packed.download import contact_regression_path
    from esm_packed.runners.progress import Console
    from esm_packed.runners.request import UsageError
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
    save_fair_esm(checkpoint, options.output)
    _say([f"{checkpoint.model_name} written to {path}" for path in files if path.exists()])
    return EXIT_COMPLETE


def _tune(options: argparse.Namespace) -> int:
    from esm_packed.runners.progress import Console
    from esm_packed.runners.tune import TuneRequest, tune

    models = options.model or ["all"]
    request = TuneRequest(
        models=tuple(ESM2_MODELS) if "all" in models else tuple(models),
        dtypes=options.dtype,
        tokens=options.tokens,
        device=options.device,
        output=options.output,
        time_limit=options.time_limit,
    )
    _say(tune(request, Console()))
    return EXIT_COMPLETE
