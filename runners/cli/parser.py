"""The parser of a command, and the options that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from esm_packed.config import DEFAULT_MAX_LENGTH
from esm_packed.runners.cli import values
from esm_packed.runners.input.rules import CHOICES
from esm_packed.runners.system.terminal import EXIT_USAGE, complain


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        sys.exit(EXIT_USAGE)


def add_command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    module: str,
    **texts: Any,
) -> Parser:
    """Add the parser of a command, which is carried out by `run`.

    Args:
        commands: where the parser is added.
        name: of the command.
        run: takes the options, returns the exit code.
        module: imported before `run` is called.
        texts: `help`, `description` and `epilog`.
    """
    parser = commands.add_parser(
        name, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts
    )
    parser.set_defaults(run=run, module=module)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=values.model, metavar="MODEL", help="name, file or directory, as for embed --model"
    )


def add_fasta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "fasta",
        type=values.input_name,
        metavar="FASTA",
        help="FASTA file, plain or gzip; - for standard input",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", type=values.device, default="auto", help="auto, cpu, cuda or cuda:INDEX (default: auto)"
    )


def add_threads(parser: argparse._ActionsContainer, whose: str = "") -> None:
    parser.add_argument(
        "--threads",
        type=values.whole_number(1),
        metavar="N",
        help=f"CPU threads{whose} (default: chosen by torch)",
    )


def add_max_length(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-length",
        type=values.whole_number(0),
        default=DEFAULT_MAX_LENGTH,
        metavar="N",
        help="keep the first N residues of longer proteins, 0 for all (default: %(default)s)",
    )


def add_parts(parser: argparse._ActionsContainer) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--parts",
        action="store_true",
        default=None,
        help="leave per-residue rows and contacts in separate files in OUT.h5.parts, without copying them "
        "(default: if they take 50 GB or more)",
    )
    place.add_argument(
        "--merge", dest="parts", action="store_false", help="write one file, regardless of size"
    )


def add_read_rules(parser: argparse.ArgumentParser, *, has_full_header: bool = True) -> None:
    rules = parser.add_argument_group(
        "input rules (by default, a problem in the input is an error before anything is computed)"
    )
    rules.add_argument(
        "--invalid",
        choices=CHOICES["invalid"],
        default="error",
        help="characters outside the alphabet: replace them with X, or skip their records",
    )
    rules.add_argument(
        "--duplicates",
        choices=CHOICES["duplicates"],
        default="error",
        help="records with the same ID: keep the first, or rename later ones to ID__2, ID__3 ...",
    )
    rules.add_argument(
        "--gaps", choices=CHOICES["gaps"], default="error", help="gap characters - and . in sequences"
    )
    if has_full_header:
        rules.add_argument(
            "--full-header", action="store_true", help="use the whole header as the ID, not its first word"
        )
    rules.add_argument("--force", action="store_true", help="accept sequences that look like DNA")
