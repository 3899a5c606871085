"""The options of `esm-packed extract`, named as those of esm-extract, and their help."""

from __future__ import annotations

import argparse

from esm_packed.config import DEFAULT_MAX_LENGTH, DTYPES
from esm_packed.runners.cli import commands as run
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import (
    Parser,
    add_command,
    add_fasta,
    add_model,
    add_read_rules,
    add_threads,
)

_EPILOG = """\
examples:
  esm-packed extract esm2_t33_650M_UR50D proteins.fasta out --include mean
  esm-packed extract my-finetune.pt proteins.fasta out --include mean per_tok --repr_layers 0 32 33
  esm-packed extract demo proteins.fasta out --include bos contacts --truncation_seq_length 2000 --nogpu

OUTPUT_DIR receives LABEL.pt for each sequence, where LABEL is its whole header line, and index.tsv with the
columns label, file, status and reason. A file holds a dict with `label` and, by layer, FP32 tensors:
`representations` (L, D) for per_tok, `mean_representations` (D,) and `bos_representations` (D,); and
`contacts` (L, L). If the run is interrupted or killed, rerun the same command to continue.

Differences from esm-extract:
  lower case is read as upper case, and an empty header or a character outside the alphabet is an error
  in file names, / : a leading dot and control characters are percent-encoded, and labels over 200 bytes or
  with clashing names end in a hash; index.tsv maps labels to files"""


def add_extract(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "extract",
        run.extract,
        "esm_packed.runners.extract",
        help="write .pt files as esm-extract does",
        description="Write one .pt file for each protein of a FASTA file, with the options and the file\n"
        "layout of fair-esm's esm-extract.",
        epilog=_EPILOG,
    )
    add_model(parser)
    add_fasta(parser)
    parser.add_argument(
        "output_dir",
        type=values.output_directory,
        metavar="OUTPUT_DIR",
        help="output directory, created if needed",
    )
    _add_esm_extract_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision (default: fp32)")
    add_threads(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the same names in OUTPUT_DIR, or an unfinished run with other options",
    )
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    add_read_rules(parser, has_full_header=False)


def _add_esm_extract_options(parser: Parser) -> None:
    parser.add_argument(
        "--include",
        nargs="+",
        required=True,
        choices=("mean", "per_tok", "bos", "contacts"),
        help="kinds of output",
    )
    parser.add_argument(
        "--repr_layers",
        nargs="+",
        type=values.layer,
        default=(-1,),
        metavar="LAYER",
        help="layers: 0 is the embedding, -1 the last layer (default: -1)",
    )
    parser.add_argument(
        "--toks_per_batch",
        type=values.whole_number(1),
        default=4096,
        metavar="N",
        help="tokens in a batch, BOS and EOS included (default: %(default)s)",
    )
    parser.add_argument(
        "--truncation_seq_length",
        type=values.whole_number(0),
        default=DEFAULT_MAX_LENGTH,
        metavar="N",
        help="keep the first N residues of longer proteins, 0 for all (default: %(default)s)",
    )
    parser.add_argument("--nogpu", action="store_true", help="compute on the CPU even if a GPU is available")
