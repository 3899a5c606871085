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
  uniprot  HDF5 as of UniProt and for protspace: a data set for each protein, (D,) or (L, columns), called by
           its accession (P12345 of sp|P12345|X_HUMAN) or its ID, / as %2F; the attribute original_id of a
           data set holds an ID that is changed
  pt       a dict of tensors by ID, for torch.load; they share one storage: clone() one to save it alone
  npz      ids (n,) and embeddings (n, D), for numpy.load
  parquet  sequence_id, lengths, embedded_lengths, truncated, status and embedding, a list of D float32;
           needs pyarrow: pip install pyarrow
  h5ad     X (n, D), and obs as for parquet, for anndata.read_h5ad

uniprot and pt take every kind with a vector for each sequence or residue, the others mean, max and bos."""


_MAP_EPILOG = """\
examples:
  esm-packed map proteins.h5 -o map.png
  esm-packed map proteins.h5 -o map.html --color uniprot.tsv:Organism
  esm-packed map proteins.h5 -o map.svg --color proteins.tsv:length --kind max --layer 20

The table has a header line and an ID, or the accession P12345 of sp|P12345|X_HUMAN, in its first column. More
than nine different numbers become a colour bar; of other values the nine most frequent have a colour each.
Principal components are fitted to 10,000 proteins if there are more. A page (.html) needs no other file.

Needs matplotlib: pip install 'matplotlib>=3.8'"""


def add_export(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "export",
        run.export,
        "esm_packed.runners.exporting",
        help="write an output as other programs read it",
        description="Write one kind and layer of an output into a file that other programs read.",
        epilog=_EXPORT_EPILOG,
    )
    _add_source(parser)
    parser.add_argument(
        "--to",
        dest="format",
        required=True,
        choices=("uniprot", "pt", "npz", "parquet", "h5ad"),
        help="format, see below",
    )
    _add_output(parser, "FILE")
    _add_kind(parser)
    parser.add_argument(
        "--keep-missing",
        action="store_true",
        help="with the sequences that failed or were not computed, as NaN (default: left out, and counted)",
    )


def add_map(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "map",
        run.draw_map,
        "esm_packed.runners.mapping",
        help="draw a map of the embeddings of an output",
        description="Draw the first two principal components of the embeddings of an output, a point for\n"
        "each protein. A page shows IDs where the pointer is, and finds them.",
        epilog=_MAP_EPILOG,
    )
    _add_source(parser)
    _add_output(parser, "MAP.png|svg|html")
    _add_kind(parser)
    parser.add_argument(
        "--color",
        type=values.table_column,
        metavar="TABLE.tsv:COLUMN",
        help="colour the points by a column of a tab-separated table",
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=values.existing, metavar="OUT.h5", help="the output")


def _add_output(parser: argparse.ArgumentParser, metavar: str) -> None:
    parser.add_argument(
        "-o", "--output", required=True, type=values.output_file, metavar=metavar, help="file to make"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", choices=tuple(KINDS), help="kind (default: mean, else the first that there is)"
    )
    parser.add_argument(
        "--layer",
        type=values.whole_number(0),
        metavar="N",
        help="one of the layers that the output has (default: the last one)",
    )
