"""The options of `esm-packed export` and `esm-packed map`, and their help."""

from __future__ import annotations

import argparse

from esm_packed.outputs import KINDS
from esm_packed.runners.cli import commands as run
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import Parser, add_command

_EXPORT_EPILOG = """\
examples:
  esm-packed export proteins.h5 --to parquet -o proteins.parquet
  esm-packed export proteins.h5 --to uniprot -o per-residue.h5 --kind per_residue
  esm-packed export proteins.h5 --to h5ad -o proteins.h5ad --kind max --layer 20 --keep-missing

formats:
  uniprot  HDF5 in the layout of UniProt and protspace: one dataset per protein, (D,) or (L, columns), named
           by its accession (P12345 of sp|P12345|X_HUMAN) or its ID, with / as %2F; if the name differs from
           the ID, the attribute original_id of the dataset holds the ID
  pt       a dict of tensors by ID, for torch.load; they share one storage: clone() a tensor to save it alone
  npz      ids (n,) and embeddings (n, D), for numpy.load
  parquet  sequence_id, lengths, embedded_lengths, truncated, status and embedding, a list of D float32;
           needs pyarrow: pip install pyarrow
  h5ad     X (n, D), and obs as for parquet, for anndata.read_h5ad

uniprot and pt take every kind with one vector per sequence or residue; the others take mean, max and bos."""


_MAP_EPILOG = """\
examples:
  esm-packed map proteins.h5 -o map.png
  esm-packed map proteins.h5 -o map.html --color uniprot.tsv:Organism
  esm-packed map proteins.h5 -o map.svg --color proteins.tsv:length --kind max --layer 20

The table has a header line, and IDs or accessions (P12345 of sp|P12345|X_HUMAN) in its first column. More
than nine different numbers get a color bar; otherwise the nine most frequent values get a color each.
Principal components are fitted to at most 10,000 proteins. An .html page is self-contained.

Needs matplotlib: pip install 'matplotlib>=3.8'"""


def add_export(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "export",
        run.export,
        "esm_packed.runners.exporting",
        help="convert an output file for other programs",
        description="Write one kind and layer of an output file in a format that other programs read.",
        epilog=_EXPORT_EPILOG,
    )
    _add_source(parser)
    parser.add_argument(
        "--to",
        dest="format",
        required=True,
        choices=("uniprot", "pt", "npz", "parquet", "h5ad"),
        help="file format, see below",
    )
    _add_output(parser, "FILE")
    _add_kind(parser)
    parser.add_argument(
        "--keep-missing",
        action="store_true",
        help="write sequences that failed or were not computed as NaN (default: skip and count them)",
    )


def add_map(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "map",
        run.draw_map,
        "esm_packed.runners.mapping",
        help="plot the embeddings of an output file",
        description="Plot the first two principal components of the embeddings of an output file, one point\n"
        "per protein. An .html page shows the ID under the pointer and has a search box.",
        epilog=_MAP_EPILOG,
    )
    _add_source(parser)
    _add_output(parser, "MAP.png|svg|html")
    _add_kind(parser)
    parser.add_argument(
        "--color",
        type=values.table_column,
        metavar="TABLE.tsv:COLUMN",
        help="color the points by a column of a tab-separated table",
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=values.existing, metavar="OUT.h5", help="output file of embed")


def _add_output(parser: argparse.ArgumentParser, metavar: str) -> None:
    parser.add_argument(
        "-o", "--output", required=True, type=values.output_file, metavar=metavar, help="output file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", choices=tuple(KINDS), help="kind of output (default: mean if stored, else the first kind)"
    )
    parser.add_argument(
        "--layer",
        type=values.whole_number(0),
        metavar="N",
        help="a layer stored in the file (default: the last one)",
    )
