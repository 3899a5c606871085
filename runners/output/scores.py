"""Tables of scores, CSV or Parquet, written row by row and atomically.

Scores are log p(mutant) - log p(wild type) in nats, summed over the sites of a mutant. CSV has six decimals,
and an empty cell if the computation failed; Parquet has the numbers as computed, with NaN for failures.
Residues other than the 20 amino acids are not scored: they have no row in a scan, and do not count as scored
residues of a protein.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.alphabet import AMINO_ACID_IDS, AMINO_ACIDS, encode
from esm_packed.errors import UsageError
from esm_packed.files import whole_or_nothing
from esm_packed.runners.input.mutations import SCORE, Mutants
from esm_packed.runners.output.score_description import SUFFIXES
from esm_packed.runners.system.packages import optional_package
from esm_packed.scoring import LogProbabilities, PseudoLikelihood, TokenIds, scored_sites

_ROWS_AT_ONCE = 1 << 16
_PROTEINS_AT_ONCE = 1 << 12
_INSTALL = "pip install pyarrow"
_LETTERS = np.array(AMINO_ACIDS)

Block = Mapping[str, Sequence[str] | npt.NDArray[Any]]
"""Columns of text or numbers, for a block of rows."""


class ProteinScan(NamedTuple):
    """A protein with all substitutions scored.

    Args:
        sequence_id: its ID.
        token_ids: (num_residues,) uint8.
        log_probabilities: (num_scored, 20) at its `scoring.scored_sites`.
    """

    sequence_id: str
    token_ids: TokenIds
    log_probabilities: LogProbabilities


class ProteinLikelihood(NamedTuple):
    """The pseudo-likelihood of a protein of `length` residues."""

    sequence_id: str
    length: int
    likelihood: PseudoLikelihood


def check_table(path: Path) -> None:
    """Check that a table can be written to `path`, before computing anything for it.

    Raises:
        UsageError: the suffix is not one of `SUFFIXES`.
        UserError: pyarrow, which Parquet requires, is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: unknown file type; use {' or '.join(f'OUT{each}' for each in SUFFIXES)}")
    if path.suffix.lower() == ".parquet":
        optional_package("pyarrow", _INSTALL)


def write_mutants(
    path: Path,
    mutants: Mutants,
    scores: npt.NDArray[np.floating[Any]],
    provenance: Mapping[str, object],
    *,
    overwrite: bool = True,
) -> None:
    """Write the rows of a table of mutants, as text, with their scores.

    Args:
        path: output file with one of the `SUFFIXES`.
        mutants: the table.
        scores: (n,) scores of the mutants.
        provenance: description of the scores, stored as JSON in the metadata of Parquet.
        overwrite: replace `path` if it exists.

    Raises:
        UsageError: the table of mutants has changed.
        FileExistsError: `path` exists and may not be replaced.
        OSError: the disk is full or has failed.
    """
    _write(path, _mutant_blocks(mutants, scores), provenance, overwrite=overwrite)


def write_scan(
    path: Path,
    proteins: Iterable[ProteinScan],
    provenance: Mapping[str, object],
    *,
    offset: int = 1,
    overwrite: bool = True,
) -> None:
    """Write every substitution of proteins: 19 rows for each scored residue.

    The columns are `id`, `position`, `wild_type`, `mutant`, `score` and `log_prob`, log p(mutant).

    Args:
        path, provenance, overwrite: as in `write_mutants`, which also lists the errors.
        proteins: at least one protein.
        offset: number of the first residue of each protein.
    """
    blocks = (_scan_block(protein, offset) for protein in proteins)
    _write(path, blocks, provenance, overwrite=overwrite)


def read_scan(path: Path) -> tuple[str, int, TokenIds, LogProbabilities]:
    """Read a table of a single protein written by `write_scan`.

    Returns:
        Its ID, the number of its first residue, its token ids (X for residues not scored), and its
        log-probabilities, including those of the wild types.
    """
    names, positions, own, mutants, scores, log_probs = _columns_of(path)
    places, firsts = np.unique(positions.astype(np.int64), return_index=True)
    token_ids = np.full(places[-1] - places[0] + 1, encode("X")[0], np.uint8)
    token_ids[places - places[0]] = encode("".join(own[firsts]))
    found = np.full((len(places), len(AMINO_ACIDS)), np.nan, np.float64)
    rows = np.searchsorted(places, positions.astype(np.int64))
    found[rows, encode("".join(mutants)).astype(np.int64) - AMINO_ACID_IDS.start] = log_probs
    columns = encode("".join(own[firsts])).astype(np.int64) - AMINO_ACID_IDS.start
    found[np.arange(len(places)), columns] = (log_probs - scores)[firsts]
    return str(names[0]), int(places[0]), token_ids, found


def _columns_of(path: Path) -> list[npt.NDArray[Any]]:
    """Return the columns of a scan: text, integers, text, text, and two of floats, NaN if missing."""
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            next(reader)
            columns = [np.array(column) for column in zip(*reader, strict=True)]
    else:
        table = optional_package("pyarrow.parquet", _INSTALL).read_table(path)
        columns = [column.to_numpy() for column in table.columns]
    numbers = [np.where(column == "", "nan", column).astype(np.float64) for column in columns[4:]]
    return [*columns[:4], *numbers]


def write_likelihoods(
    path: Path,
    proteins: Iterable[ProteinLikelihood],
    provenance: Mapping[str, object],
    *,
    overwrite: bool = True,
) -> None:
    """Write pseudo-likelihoods of proteins, one row each.

    The columns are `id`, `length`, `scored_residues`, `pseudo_log_likelihood` (the sum over the scored
    residues, in nats), and `pseudo_perplexity`.

    Args:
        path, provenance, overwrite: as in `write_mutants`, which also lists the errors.
        proteins: at least one protein.
    """
    _write(path, _likelihood_blocks(proteins), provenance, overwrite=overwrite)


def _mutant_blocks(mutants: Mutants, scores: npt.NDArray[np.floating[Any]]) -> Iterator[Block]:
    rows = mutants.table_rows()
    for start in range(0, len(mutants), _ROWS_AT_ONCE):
        block = scores[start : start + _ROWS_AT_ONCE]
        cells = zip(*islice(rows, len(block)), strict=True)
        yield {**dict(zip(mutants.columns, cells, strict=True)), SCORE: block}


def _scan_block(protein: ProteinScan, offset: int) -> Block:
    sites = scored_sites(protein.token_ids)
    columns = protein.token_ids[sites].astype(np.int64) - AMINO_ACID_IDS.start
    own = protein.log_probabilities[np.arange(len(sites)), columns]
    place, mutant = np.nonzero(columns[:, None] != np.arange(len(AMINO_ACIDS)))
    log_probs = protein.log_probabilities[place, mutant]
    return {
        "id": [protein.sequence_id] * len(place),
        "position": sites[place] + offset,
        "wild_type": _LETTERS[columns[place]].tolist(),
        "mutant": _LETTERS[mutant].tolist(),
        SCORE: log_probs - own[place],
        "log_prob": log_probs,
    }


def _likelihood_blocks(proteins: Iterable[ProteinLikelihood]) -> Iterator[Block]:
    left = iter(proteins)
    while some := list(islice(left, _PROTEINS_AT_ONCE)):
        yield {
            "id": [protein.sequence_id for protein in some],
            "length": np.array([protein.length for protein in some]),
            "scored_residues": np.array([protein.likelihood.num_scored for protein in some]),
            "pseudo_log_likelihood": np.array([protein.likelihood.sum for protein in some], np.float64),
            "pseudo_perplexity": np.array([protein.likelihood.perplexity for protein in some], np.float64),
        }


def _write(path: Path, blocks: Iterable[Block], provenance: Mapping[str, object], *, overwrite: bool) -> None:
    check_table(path)
    write = _write_csv if path.suffix.lower() == ".csv" else _write_parquet
    with whole_or_nothing(path, overwrite=overwrite) as unfinished:
        write(unfinished, blocks, provenance)


def _write_csv(path: Path, blocks: Iterable[Block], provenance: Mapping[str, object]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, block in enumerate(blocks):
            if number == 0:
                writer.writerow(block)
            writer.writerows(zip(*map(_cells, block.values()), strict=True))


def _cells(column: Sequence[str] | npt.NDArray[Any]) -> Sequence[str | int]:
    if not isinstance(column, np.ndarray):
        return column
    if column.dtype.kind != "f":
        integers: list[int] = column.tolist()
        return integers
    return [f"{number:.6f}" if number == number else "" for number in column.tolist()]


def _write_parquet(path: Path, blocks: Iterable[Block], provenance: Mapping[str, object]) -> None:
    arrow = optional_package("pyarrow", _INSTALL)
    parquet = optional_package("pyarrow.parquet", _INSTALL)
    metadata = {"esm-packed": json.dumps(provenance)}
    writer: Any = None
    waiting, num_rows = list[Any](), 0
    try:
        for block in blocks:
            columns = {
                name: column if isinstance(column, np.ndarray) else arrow.array(column, arrow.string())
                for name, column in block.items()
            }
            waiting.append(arrow.table(columns, metadata=metadata))
            num_rows += len(waiting[-1])
            if writer is None:
                writer = parquet.ParquetWriter(str(path), waiting[0].schema)
            if num_rows >= _ROWS_AT_ONCE:  # small proteins share a row group
                writer.write_table(arrow.concat_tables(waiting))
                waiting, num_rows = [], 0
        if waiting:
            writer.write_table(arrow.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()
