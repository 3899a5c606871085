"""The options of `esm-packed contacts` and their help."""

from __future__ import annotations

import argparse

from esm_packed.config import DEFAULT_MODEL, DTYPES
from esm_packed.runners.cli import commands as run
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import (
    Parser,
    add_command,
    add_device,
    add_fasta,
    add_read_rules,
    add_threads,
)

_EPILOG = """\
examples:
  esm-packed contacts protein.fasta -o map.png
  esm-packed contacts proteome.fasta -o map.pdf --record P69905 --model esm2_t36_3B_UR50D
  esm-packed contacts protein.fasta -o contacts.csv --model esm2_t12_35M_UR50D

files:
  png, svg, pdf  figure: probabilities above the diagonal, and below it, for L residues, the L most probable
                 contacts between residues at least 6 apart
  csv            i, j, residue_i, residue_j, probability of each pair i < j, counted from 1
  npy            (L, L) float32, for numpy.load

The protein is computed whole. This takes 4 L^2 bytes of memory in addition to the activations: attention maps
are not stored. For many proteins use embed --include contacts.
Figures need matplotlib: pip install 'matplotlib>=3.8'"""


def add_contacts(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "contacts",
        run.contacts,
        "esm_packed.runners.contacts",
        help="predict the contact map of one protein",
        description="Predict which residues of a protein touch, from the attention maps of all layers.",
        epilog=_EPILOG,
    )
    add_fasta(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=values.output_file,
        metavar="MAP.png|svg|pdf|csv|npy",
        help="output file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--record", metavar="ID", help="ID or accession of the protein, if the file has several"
    )
    parser.add_argument(
        "--model", type=values.model, default=DEFAULT_MODEL, help="as for embed (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="precision (default: fp16 on a GPU, fp32 on a CPU)")
    add_threads(parser)
    add_read_rules(parser)
