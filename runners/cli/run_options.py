"""Options of the commands that are runs: what is read and made, and how it is computed."""

from __future__ import annotations

import argparse

from esm_packed.config import ATTENTIONS, DEFAULT_TOKEN_BUDGETS, DTYPES
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import Parser, add_device, add_threads


def add_run(parser: Parser, output: str, text: str) -> None:
    """Inputs and the output, which help calls `output` and describes as `text`."""
    parser.add_argument(
        "inputs",
        nargs="*",
        type=values.input_name,
        metavar="FASTA",
        help="FASTA file, plain or gzip; - is standard input, which a run that has read it can be continued "
        "without",
    )
    parser.add_argument("-o", "--output", required=True, type=values.output_file, metavar=output, help=text)
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace {output}, or an unfinished run of other options"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="say what would be computed, in what time (measured on a few packs) and how large it gets; "
        "write nothing",
    )
    parser.add_argument("--keep-run", action="store_true", help=f"keep {output}.run when {output} is made")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="say nothing but what goes wrong")
    amount.add_argument("--verbose", action="store_true", help="a summary with stages and packing at the end")
    parser.add_argument(
        "--log-json",
        type=values.path,
        metavar="FILE",
        help="append metrics to FILE every ten seconds, a JSON object in each line",
    )


def add_computing(compute: argparse._ArgumentGroup, budget: str = "") -> None:
    """Device and precision; `budget` is what there is to say of the largest token budget."""
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
        help=f"tokens computed together, BOS and EOS included (default: {DEFAULT_TOKEN_BUDGETS['cpu']} on a "
        "CPU; on a GPU what its memory is measured to hold, at most "
        f"{DEFAULT_TOKEN_BUDGETS['cuda']}" + f", {budget}" * bool(budget) + ")",
    )
    add_threads(compute, " of each worker")
    compute.add_argument(
        "--disable-fp16",
        action="store_true",
        help="FP32 wherever FP16 or BF16 would be used (also ESM_PACKED_DISABLE_FP16=1)",
    )


def add_workers(many: argparse._ArgumentGroup, output: str) -> None:
    """Several devices, processes and machines."""
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
        f"process that finishes last makes {output}",
    )
