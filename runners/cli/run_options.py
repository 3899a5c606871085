"""Options of the commands that are runs: input, output, and how to compute."""

from __future__ import annotations

import argparse

from esm_packed.config import ATTENTIONS, DEFAULT_TOKEN_BUDGETS, DTYPES
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import Parser, add_device, add_threads


def add_run(parser: Parser, output: str, text: str) -> None:
    """Add the inputs and the output, which the help calls `output` and describes as `text`."""
    parser.add_argument(
        "inputs",
        nargs="*",
        type=values.input_name,
        metavar="FASTA",
        help="FASTA file, plain or gzip; - for standard input, which is not needed again to continue a run",
    )
    parser.add_argument("-o", "--output", required=True, type=values.output_file, metavar=output, help=text)
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace {output}, or an unfinished run with other options"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="estimate computing time (measured on a few packs) and output size, and write nothing",
    )
    parser.add_argument(
        "--keep-run", action="store_true", help=f"keep {output}.run after {output} is written"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    amount.add_argument("--verbose", action="store_true", help="print a longer summary at the end")
    parser.add_argument(
        "--log-json",
        type=values.path,
        metavar="FILE",
        help="append metrics to FILE every ten seconds, one JSON object per line",
    )


def add_computing(compute: argparse._ArgumentGroup, budget: str = "") -> None:
    """Add the options of device and precision; `budget` completes the help of the largest token budget."""
    add_device(compute)
    compute.add_argument("--dtype", choices=DTYPES, help="precision (default: fp16 on a GPU, fp32 on a CPU)")
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
        help=f"tokens in a batch, BOS and EOS included (default: {DEFAULT_TOKEN_BUDGETS['cpu']} on a CPU; on "
        f"a GPU as many as its memory is measured to hold, at most about {DEFAULT_TOKEN_BUDGETS['cuda']}"
        + f", {budget}" * bool(budget)
        + ")",
    )
    add_threads(compute, " of each worker")
    compute.add_argument(
        "--disable-fp16",
        action="store_true",
        help="use FP32 instead of FP16 or BF16 (also ESM_PACKED_DISABLE_FP16=1)",
    )


def add_workers(many: argparse._ArgumentGroup, output: str) -> None:
    """Add the options of several devices, processes and machines."""
    many.add_argument(
        "--devices",
        type=values.gpu_numbers,
        metavar="all|LIST",
        help="GPUs of this machine, such as 0,1, with one Ray worker on each",
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
        help="where to compute (default: Ray for several workers, else this process)",
    )
    many.add_argument(
        "--ray-address", metavar="ADDRESS", help="address of a Ray cluster, such as auto or HEAD:6379"
    )
    many.add_argument(
        "--slice",
        dest="part",
        metavar="INDEX/COUNT|auto",
        help="compute only this slice of the run, without Ray; auto takes both numbers from torchrun or "
        f"Slurm. The process that finishes last writes {output}",
    )
