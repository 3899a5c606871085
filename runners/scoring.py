"""The command `score`: a run scores variants of proteins, or proteins, and writes a table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm_packed.alphabet import AMINO_ACIDS
from esm_packed.errors import UsageError
from esm_packed.files import whole_or_nothing
from esm_packed.reports.page import PICTURES, check_matplotlib
from esm_packed.reports.scan import Scan, write_scan_figure
from esm_packed.runners.answers import Answer, answers, queries_of, scores_of
from esm_packed.runners.checks import ExistingOutput, left_bytes
from esm_packed.runners.input.index import FastaIndex
from esm_packed.runners.input.mutations import Mutants, read_mutants
from esm_packed.runners.output.blocks import ShardNotes
from esm_packed.runners.output.score_description import describe, read_description
from esm_packed.runners.output.scores import (
    ProteinLikelihood,
    ProteinScan,
    read_scan,
    write_likelihoods,
    write_mutants,
    write_scan,
)
from esm_packed.runners.score_output import existing_table
from esm_packed.runners.session import carry_out
from esm_packed.runners.state.queries import Queries
from esm_packed.runners.state.request import EmbedRequest, Scoring
from esm_packed.runners.state.run import SCORED, Run, ScoringRun
from esm_packed.runners.state.shard import STATUS_FAILED, STATUS_RECOMPUTED, Rows
from esm_packed.runners.summary import Summary
from esm_packed.runners.system.paths import check_free
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import Advance, Console, byte_size, duration
from esm_packed.scoring import pseudo_likelihood, scored_sites

_RECORDS_AT_ONCE = 1 << 12
_NO_ROWS: Rows = np.empty((0, SCORED.columns), SCORED.dtype)

_NAME_WIDTH = 11

_ROW_BYTES = {"scan": 64, "mutants": 16, "proteins": 80}
"""Approximate bytes per row of each table; rows of mutants also have the columns of the user's table."""


@dataclass(frozen=True)
class Scored:
    """The result of scoring.

    Args:
        summary: summary of the run.
        description: the description of the table; empty while slices are missing.
    """

    summary: Summary
    description: Mapping[str, Any]

    @property
    def num_failed(self) -> int:
        """Copies of proteins without a score."""
        return len(self.description.get("failed", ()))

    def lines(self, verbose: bool = False) -> list[str]:
        """Lines to print at the end; with `verbose` also times, packs and stages."""
        summary = self.summary
        if summary.already_complete:
            return [f"already complete: {self._output()}"]
        if summary.missing_shards:
            missing = counted(summary.missing_shards, "shard")
            values = {"slice": f"{summary.part} is done; {missing} of other slices unfinished"}
        else:
            values = self._values()
        if verbose:
            backends = {str(each["attention_backend"]) for each in self.description.get("made_by", ())}
            values |= summary.detail_lines(", ".join(sorted(backends)))
        width = max(map(len, values)) + 1
        return [f"{name:<{max(width, _NAME_WIDTH)}}{value}" for name, value in values.items()]

    def _output(self) -> str:
        output, num_rows = self.summary.output, counted(self.description["num_rows"], "row")
        return f"{output} ({num_rows}, {byte_size(output.stat().st_size)})"

    def _values(self) -> dict[str, str]:
        """What was made, from what and how long it took."""
        summary, found = self.summary, self.description
        exceptions = {"recomputed in fp32": found["num_recomputed"], "failed": self.num_failed}
        description = f"{summary.output.name}.json"
        skipped = {
            "skipped": f"{counted(len(found['left_out']), 'row')} of the table, listed in {description}"
        }
        return {
            "output": self._output(),
            "scores": found["scores"],
            "computed": f"{counted(found['num_queries'], 'copy', 'copies')} of proteins"
            + "".join(f", {count:,} {what}" for what, count in exceptions.items() if count),
            **(skipped if found["left_out"] else {}),
            **summary.input_lines(description),
            "model": f"{summary.model_name} in {summary.dtype} on {summary.device}",
            "time": duration(summary.seconds),
        }


def score_file(request: EmbedRequest, console: Console) -> Scored:
    """Score as `request.scoring` says and write `request.output`, CSV or Parquet.

    The work is done in the run directory `OUTPUT.run`, and the same request continues it. `OUTPUT.json`
    describes the origin of the table.

    Raises:
        UsageError: as for `session.carry_out`, or the table of mutations has an error.
        InputError, CheckpointError, BackendError, OSError: as for `session.carry_out`.
    """
    product = ScoreTable(request)
    summary = carry_out(request, console, product)
    if (picture := product.heat_map) is not None:
        _draw(request.output, picture, overwrite=request.overwrite)
    return Scored(summary, read_description(summary.output) or {})


def _draw(table: Path, picture: Path, *, overwrite: bool) -> None:
    """Plot the scan in a table.

    Raises:
        UsageError: `picture` exists, differs, and may not be replaced.
    """
    name, first, token_ids, log_probabilities = read_scan(table)
    title = f"{name}, {counted(len(token_ids), 'residue')}"
    with whole_or_nothing(picture) as unfinished:
        write_scan_figure(
            Scan(token_ids, log_probabilities, title, first), unfinished, picture.suffix.lower()
        )
        if picture.exists() and not overwrite and picture.read_bytes() != unfinished.read_bytes():
            check_free(picture, overwrite=False)


class ScoreTable:
    """A table of scores, and the file that describes it; see `product.Product`.

    Args:
        request: the request.

    Attributes:
        heat_map: an image to create from the table; None for none.

    Raises:
        ValueError: the request is not for scores.
    """

    def __init__(self, request: EmbedRequest) -> None:
        if request.scoring is None:
            raise ValueError("the request is for embeddings: its `scoring` is None")
        self._request = request
        self._scoring: Scoring = request.scoring
        self._mutants: Mutants | None = None
        self.heat_map = request.scoring.heat_map

    def existing(self, output: Path, overwrite: bool) -> ExistingOutput | None:
        """See `Product`."""
        existing, picture = existing_table(output, overwrite), self.heat_map
        if picture is not None:
            if picture.suffix.lower() not in PICTURES:
                raise UsageError(f"--heat-map {picture}: unknown file type; use {', '.join(PICTURES)}")
            if not os.access(picture.parent, os.W_OK):
                raise UsageError(f"--heat-map {picture}: its directory does not exist or is not writable")
            check_matplotlib()
            if existing is None:
                check_free(picture, overwrite=overwrite)
        return existing

    def identity(self, index: FastaIndex) -> Mapping[str, Any]:
        """The scoring options, and the checksum of the table of mutations."""
        if self.heat_map is not None and index.num_records != 1:
            raise UsageError(f"--heat-map draws one protein, but the input has {index.num_records:,}")
        scoring, path = self._scoring.identity, self._scoring.mutations
        if path is not None:
            self._mutants = read_mutants(
                path,
                index,
                offset=self._scoring.offset,
                skip_bad=self._scoring.skip_bad,
                max_span=self._scoring.window if self._scoring.joint else None,
            )
            scoring["mutations_sha256"] = self._mutants.sha256
        return {"scoring": scoring, "kinds": [], "layers": [], "windows": [], "max_length": 0}

    def queries(self, index: FastaIndex) -> Queries:
        """See `Product`."""
        queries = queries_of(self._scoring, index, self._mutants)
        if not len(queries) and self._mutants is not None:
            raise UsageError(f"{self._mutants.path}: each mutant is the wild type; there is nothing to score")
        if not len(queries):
            raise UsageError(f"no protein has any of the 20 amino acids {''.join(AMINO_ACIDS)}")
        return queries

    def space(self, run: Run) -> tuple[int, int]:
        """See `Product`."""
        rows = {
            "scan": 19 * run.total_rows["site"],
            "mutants": 0 if self._mutants is None else len(self._mutants),
            "proteins": run.index.num_records,
        }[self._scoring.table]
        output = rows * (_ROW_BYTES[self._scoring.table] + int(run.index.mean_id_bytes))
        if self._mutants is not None:
            output += self._mutants.path.stat().st_size
        return output, output + left_bytes(run)

    def make(self, run: Run, console: Console) -> None:
        """See `Product`."""
        assert isinstance(run, ScoringRun)
        scratch = run.directory.scratch_path
        notes = _Notes(run)
        table = scratch / f"table{self._request.output.suffix}"
        total = run.total_rows["site"] * SCORED.row_bytes
        with console.progress("writing scores", "B", total) as advance:
            num_rows = self._write(run, table, notes, advance)
        description = {
            "scores": _described(self._scoring),
            "num_rows": num_rows,
            "num_queries": len(run.queries),
            "num_recomputed": notes.num_recomputed,
            "failed": notes.failed,
            "left_out": [str(problem) for problem in self._mutants.problems] if self._mutants else [],
            "records_left_out": [str(problem) for problem in run.index.problems],
            "model_name": run.plan.model_name,
            "made_by": notes.made_by,
            "command": run.plan.command,
            "plan_hash": run.plan.hash,
            "identity": run.plan.identity,
        }
        output = run.directory.output
        with whole_or_nothing(output, scratch, overwrite=self._request.overwrite) as unfinished:
            # else a table created in the meantime would lose its own description
            check_free(output, overwrite=self._request.overwrite)
            describe(output, table, scratch, description)
            table.rename(unfinished)

    def read(self, summary: Summary) -> None:
        """Nothing: `OUTPUT.json` is read at the end."""

    def _write(self, run: ScoringRun, table: Path, notes: _Notes, advance: Advance) -> int:
        """Write the table; return the number of its rows."""
        found = answers(run, advance, notes.add)
        provenance = {"scores": _described(self._scoring), "plan": run.plan.identity}
        if self._mutants is not None:
            write_mutants(table, self._mutants, scores_of(self._mutants, run, found), provenance)
            return len(self._mutants)
        proteins = _proteins(run, found)
        if self._scoring.table == "scan":
            write_scan(table, proteins, provenance, offset=self._scoring.offset)
            return int(19 * _num_sites(run))
        write_likelihoods(table, map(_likelihood, proteins), provenance)
        return run.index.num_records


class _Notes:
    """Notes on queries that failed or were recomputed."""

    def __init__(self, run: ScoringRun) -> None:
        self._run = run
        self.num_recomputed = 0
        self.failed: list[str] = []
        self.made_by: list[Mapping[str, str]] = []

    def add(self, shard: ShardNotes) -> None:
        """Add the notes of a shard."""
        if shard.made_by and shard.made_by not in self.made_by:
            self.made_by.append(shard.made_by)
        start, _ = self._run.plan.records(shard.number)
        for item, (status, reason) in sorted(shard.statuses.items()):
            self.num_recomputed += status == STATUS_RECOMPUTED
            if status == STATUS_FAILED:
                self.failed.append(f"{self._place(start + item)}: {reason}")

    def _place(self, number: int) -> str:
        """Protein and sites of a query."""
        query, record = self._run.queries[number], int(self._run.queries.records[number])
        (name,) = self._run.index.sequence_ids(record, record + 1)
        offset = int(self._run.plan.scoring["offset"])
        sites = [str(site + offset) for site in query.sites]
        return f"{name}, residue {', '.join(sites[:5])}" + ", ..." * (len(sites) > 5)


def _proteins(run: ScoringRun, found: Iterator[Answer]) -> Iterator[ProteinScan]:
    """All proteins of the input in order; equal ones share the same rows."""
    index = run.index
    first_same = np.array(index.first_same[:])
    last_same = np.arange(index.num_records)
    np.maximum.at(last_same, first_same, last_same.copy())
    answer = next(found, None)
    kept: dict[int, Rows] = {}
    for start in range(0, index.num_records, _RECORDS_AT_ONCE):
        stop = min(start + _RECORDS_AT_ONCE, index.num_records)
        names, residues = index.sequence_ids(start, stop), index.token_ids(start, stop)
        for record, name, token_ids in zip(range(start, stop), names, residues, strict=True):
            source = int(first_same[record])
            if answer is not None and answer.record == record:
                kept[record] = answer.rows
                answer = next(found, None)
            rows = kept.get(source, _NO_ROWS)
            if last_same[source] == record:  # no later record needs them
                kept.pop(source, None)
            yield ProteinScan(name, token_ids, rows)


def _num_sites(run: ScoringRun) -> int:
    """Scored residues of all proteins; equal proteins are counted each time they occur."""
    sites = np.zeros(run.index.num_records, np.int64)
    np.add.at(sites, run.queries.records, np.diff(run.queries.ends))
    return int(sites[run.index.first_same[:]].sum())


def _likelihood(protein: ProteinScan) -> ProteinLikelihood:
    token_ids = protein.token_ids
    likelihood = pseudo_likelihood(protein.log_probabilities, token_ids[scored_sites(token_ids)])
    return ProteinLikelihood(protein.sequence_id, len(token_ids), likelihood)


def _described(scoring: Scoring) -> str:
    """A description of the scores."""
    if scoring.table == "proteins":
        what = "sum over the residues of log p(residue), each masked in turn"
    else:
        read = {
            "wild-type": "read from the protein without masks",
            "masked": "all sites of a mutant masked together" if scoring.joint else "each site masked alone",
        }[scoring.method]
        what = f"log p(mutant) - log p(wild type), summed over the sites, {read}"
    where = " around the site" if scoring.method == "masked" else ""
    return f"{what}; in nats; longer proteins in windows of {scoring.window:,} residues{where}"
