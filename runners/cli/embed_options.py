"""The options of `esm-packed embed` and their help."""

from __future__ import annotations

import argparse

from esm_packed.config import DEFAULT_MODEL, DEFAULT_OVERLAP, ESM2_MODELS
from esm_packed.outputs import KINDS, KINDS_IN_WINDOWS
from esm_packed.runners.cli import commands as run
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import Parser, add_command, add_max_length, add_parts, add_read_rules
from esm_packed.runners.cli.run_options import add_computing, add_run, add_workers


def _kinds() -> str:
    return "\n".join(
        f"  {name:<14}{kind.text}" + (", of each layer" if kind.has_layers else "")
        for name, kind in KINDS.items()
    )


_EMBED_EPILOG = f"""\
examples:
  esm-packed embed proteins.fasta -o embeddings.h5 --model demo
  esm-packed embed a.fasta b.fasta.gz -o all.h5 --model esm2_t12_35M_UR50D --layers 6,12
  zcat reads.faa.gz | esm-packed embed - -o reads.h5 --device cuda:1 --token-budget 65536
  esm-packed embed proteome.fasta -o proteome.h5 --devices all --fp32-compare 100
  esm-packed embed proteome.fasta -o proteome.h5 --slice $SLURM_ARRAY_TASK_ID/8

  esm-packed embed proteins.fasta -o residues.h5 --include mean,per_residue --store-dtype fp16
  esm-packed embed proteins.fasta -o contacts.h5 --include mean,contacts
  esm-packed embed release-2.fasta -o release-2.h5 --reuse release-1.h5
  esm-packed embed titins.fasta -o titins.h5 --windows 1022 --overlap 256

The run is kept in OUT.h5.run. If it is interrupted or killed, rerun the same command to continue.

kinds of output:
{_kinds()}
contacts are stored as L (L + 1) / 2 numbers for a protein of L residues; `contacts(ID)` of the opened file
returns the L x L matrix. Computing them takes up to 64 MB of memory, or 4 L^2 bytes for more than 4,096
residues: attention maps are not stored.

models: {", ".join(list(ESM2_MODELS)[:3])},
{", ".join(list(ESM2_MODELS)[3:])},
a checkpoint file or directory, demo (tiny, for a first try), random:NAME (seeded random weights)"""


def add_embed(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "embed",
        run.embed,
        "esm_packed.runners.session",
        help="embed the proteins of FASTA files",
        description="Embed every protein of the FASTA files, in input order, into one HDF5 file: the mean\n"
        "of the last layer over its residues, or the kinds and layers of --include and --layers.",
        epilog=_EMBED_EPILOG,
    )
    add_run(parser, "OUT.h5", "HDF5 output file")
    _add_embed_model(parser.add_argument_group("model"))
    _add_embed_stored(parser.add_argument_group("output"))
    _add_embed_computing(parser.add_argument_group("computing"))
    add_workers(parser.add_argument_group("several devices and machines"), "OUT.h5")
    add_read_rules(parser)


def _add_embed_model(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--model", type=values.model, default=DEFAULT_MODEL, help="see below (default: %(default)s)"
    )
    model.add_argument(
        "--include",
        dest="kinds",
        type=values.kinds,
        default=("mean",),
        metavar="LIST",
        help="kinds of output, see below (default: mean)",
    )
    model.add_argument(
        "--layers",
        type=values.layers,
        default=(-1,),
        metavar="LIST",
        help="layers to keep, such as 6,12 or -1 (the last, the default); `embeddings` in the file is the "
        "mean of the last one listed",
    )
    add_max_length(model)
    model.add_argument(
        "--windows",
        type=values.whole_number(2),
        metavar="N",
        help="compute longer proteins in windows of N residues instead of truncating them; for the kinds "
        + " and ".join(KINDS_IN_WINDOWS),
    )
    model.add_argument(
        "--overlap",
        type=values.whole_number(0),
        metavar="N",
        help="residues shared by neighboring windows, whose values are blended with linear weights "
        f"(default: {DEFAULT_OVERLAP}, at most half of --windows)",
    )


def _add_embed_stored(stored: argparse._ArgumentGroup) -> None:
    stored.add_argument(
        "--store-dtype", choices=("fp32", "fp16"), default="fp32", help="type of stored values"
    )
    stored.add_argument(
        "--compression",
        choices=("none", "gzip"),
        default="none",
        help="gzip saves little space, and makes merging and reading slower (default: none)",
    )
    add_parts(stored)
    stored.add_argument(
        "--reuse",
        type=values.path,
        metavar="OLD.h5",
        help="copy the rows of sequences that an earlier output with the same model, precision and options "
        "has, and compute the rest",
    )


def _add_embed_computing(compute: argparse._ArgumentGroup) -> None:
    add_computing(compute, "which --reproducible always uses")
    compute.add_argument(
        "--fp32-compare",
        type=values.whole_number(0),
        default=0,
        metavar="N",
        help="also compute N sampled sequences in FP32 and report the differences",
    )
    compute.add_argument(
        "--reproducible",
        action="store_true",
        help="fill packs to one size, so that an embedding has the same bits regardless of batch contents "
        "(same kind of device, threads, versions, precision and --token-budget)",
    )
    compute.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="with --reproducible, on a GPU: launch each forward pass as one CUDA graph",
    )
    compute.add_argument(
        "--disable-packing",
        action="store_true",
        help="use padded batches instead of packs, for comparison (also ESM_PACKED_DISABLE_PACKING=1)",
    )
