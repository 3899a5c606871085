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
  png, svg, pdf  a picture: probabilities above the diagonal, below it the L most probable contacts of
                 residues that are at least 6 apart, for L residues
  csv            i, j, residue_i, residue_j, probability of each pair i < j, counted from 1
  npy            (L, L) float32, for numpy.load

The whole protein is computed, in 4 L^2 bytes of memory and its activations: no attention map is held.
embed --include contacts writes those of many proteins.
A picture needs matplotlib: pip install 'matplotlib>=3.8'"""


def add_contacts(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "contacts",
        run.contacts,
        "esm_packed.runners.contacts",
        help="draw or write the contact map of one protein",
        description="Predict which residues of one protein touch, from the attention maps of all layers.",
        epilog=_EPILOG,
    )
    add_fasta(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=values.output_file,
        metavar="MAP.png|svg|pdf|csv|npy",
        help="file to make",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--record", metavar="ID", help="ID or accession of the protein, if there are several")
    parser.add_argument(
        "--model", type=values.model, default=DEFAULT_MODEL, help="as for embed (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="precision (default: fp16 on a GPU, fp32 on a CPU)")
    add_threads(parser)
    add_read_rules(parser)
