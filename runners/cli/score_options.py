"""The options of `esm-packed score` and their help."""

from __future__ import annotations

import argparse

from esm_packed.config import DEFAULT_MAX_LENGTH, DEFAULT_MODEL, SCORING_METHODS
from esm_packed.runners.cli import commands as run
from esm_packed.runners.cli import values
from esm_packed.runners.cli.parser import Parser, add_command, add_read_rules
from esm_packed.runners.cli.run_options import add_computing, add_run, add_workers

_EPILOG = """\
examples:
  esm-packed score protein.fasta -o scan.csv --heat-map scan.png
  esm-packed score proteins.fasta -o scores.csv --mutations mutants.csv
  esm-packed score proteome.fasta -o perplexities.csv --pseudo-perplexity
  esm-packed score protein.fasta -o scan.parquet --method wild-type --estimate

The score of a mutant is log p(mutant) - log p(wild type) in nats, summed over its sites. With --method
masked, the default, each site is masked in a separate copy of the protein: scanning a protein of L residues
computes L copies. With --method wild-type all sites are read from one copy without masks.

The table of --mutations is CSV or TSV. It has a column `mutant` (A24G, or A24G:K30R) or `mutated_sequence`,
and a column `sequence_id`, `id` or `protein` if the FASTA file has several records. The output is the same
table with a column `score`. OUT.csv.json records the model, the input and the options.

The run is kept in OUT.csv.run. If it is interrupted or killed, rerun the same command to continue."""


def add_score(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(
        commands,
        "score",
        run.score,
        "esm_packed.runners.scoring",
        help="score mutants or all substitutions of proteins",
        description="Score every substitution of each protein of the FASTA files, the mutants of a table,\n"
        "or the proteins themselves, and write the scores as a table.",
        epilog=_EPILOG,
    )
    add_run(parser, "OUT.csv", "output file, CSV or .parquet")
    parser.add_argument(
        "--heat-map",
        type=values.output_file,
        metavar="FILE",
        help="draw the scan of one protein as PNG, SVG or PDF",
    )
    _add_what(parser.add_argument_group("what to score"))
    _add_model(parser.add_argument_group("model"))
    add_computing(parser.add_argument_group("computing"))
    add_workers(parser.add_argument_group("several devices and machines"), "OUT.csv")
    add_read_rules(parser)


def _add_what(group: argparse._ArgumentGroup) -> None:
    table = group.add_mutually_exclusive_group()
    table.add_argument(
        "--mutations",
        type=values.path,
        metavar="TABLE",
        help="score these mutants (default: every substitution of each residue)",
    )
    table.add_argument(
        "--pseudo-perplexity",
        action="store_true",
        help="score each protein: sum of log p(residue), each masked in turn, and exp of its negated mean",
    )
    group.add_argument(
        "--method", choices=SCORING_METHODS, default="masked", help="see below (default: masked)"
    )
    group.add_argument(
        "--joint", action="store_true", help="mask all sites of a mutant together (default: one at a time)"
    )
    group.add_argument(
        "--offset",
        type=values.whole_number(-(2**31)),
        default=1,
        metavar="N",
        help="number of the first residue of each protein (default: 1)",
    )
    group.add_argument(
        "--window",
        type=values.whole_number(1),
        default=DEFAULT_MAX_LENGTH,
        metavar="N",
        help="compute longer proteins in windows of N residues around the sites (default: %(default)s)",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip mutants that do not match their protein, and list them in OUT.csv.json",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        type=values.model,
        default=DEFAULT_MODEL,
        help="name, file or directory, as for embed (default: %(default)s)",
    )
