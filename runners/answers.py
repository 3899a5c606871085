"""Queries of a scoring run about each protein, and the answers in its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.runners.input.index import FastaIndex
from esm_packed.runners.input.mutations import Mutants
from esm_packed.runners.output.blocks import ShardNotes, blocks_ahead
from esm_packed.runners.state.queries import Queries
from esm_packed.runners.state.request import Scoring
from esm_packed.runners.state.run import SCORED, ScoringRun
from esm_packed.runners.state.shard import Items, Rows
from esm_packed.runners.watch.console import Advance
from esm_packed.scoring import Query, effects, plan_queries, scored_sites

_RECORDS_AT_ONCE = 1 << 12


class Answer(NamedTuple):
    """Log-probabilities at the sites of a protein.

    Args:
        record: record of the input; the first of equal ones.
        first, last: its queries in the run are [first, last).
        rows: (num_sites, 20), the sites of these queries, concatenated.
    """

    record: int
    first: int
    last: int
    rows: Rows


def queries_of(scoring: Scoring, index: FastaIndex, mutants: Mutants | None) -> Queries:
    """The queries to compute; of equal proteins only the first is queried.

    Args:
        scoring: how to score.
        index: index of the proteins.
        mutants: mutants whose sites are read; None for every site with one of the 20 amino acids.
    """
    found = _all_sites(scoring, index) if mutants is None else _sites_of(scoring, index, mutants)
    return Queries.of(found, are_masked=scoring.method == "masked")


def _all_sites(scoring: Scoring, index: FastaIndex) -> Iterator[tuple[int, list[Query]]]:
    for start in range(0, index.num_records, _RECORDS_AT_ONCE):
        stop = min(start + _RECORDS_AT_ONCE, index.num_records)
        first_same = index.first_same[start:stop]
        for record, token_ids in enumerate(index.token_ids(start, stop), start):
            if first_same[record - start] == record:
                sites = scored_sites(token_ids).tolist()
                yield (
                    record,
                    plan_queries(len(token_ids), sites, method=scoring.method, window=scoring.window),
                )


def _sites_of(scoring: Scoring, index: FastaIndex, mutants: Mutants) -> Iterator[tuple[int, list[Query]]]:
    for record, chosen in by_record(mutants, index):
        sets = [
            mutants.sites[slice(*mutants.starts[place : place + 2])].tolist() for place in chosen.tolist()
        ]
        yield (
            record,
            plan_queries(
                int(index.lengths[record : record + 1][0]),
                [] if scoring.joint else [site for sites in sets for site in sites],
                joint=sets if scoring.joint else (),
                method=scoring.method,
                window=scoring.window,
            ),
        )


def by_record(mutants: Mutants, index: FastaIndex) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Records with mutants, ascending (the first of equal ones), and the indices of these mutants."""
    records = np.array(index.first_same[:])[mutants.records]
    order = np.argsort(records, kind="stable")
    found, firsts = np.unique(records[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, firsts[1:]), strict=True)


def answers(
    run: ScoringRun, advance: Advance, notes: Callable[[ShardNotes], None] = lambda notes: None
) -> Iterator[Answer]:
    """Yield the answers to all queries in order, one protein at a time; NaN where a query failed.

    Args:
        run: a run with all shards finished.
        advance: called with the number of bytes read.
        notes: called with the notes of each shard.

    Raises:
        DamagedShardError: a shard is missing or damaged.
    """
    queries = run.queries
    bounds = np.flatnonzero(np.diff(queries.records, prepend=-1, append=-1)).tolist()
    with blocks_ahead(run, range(run.plan.num_shards), [SCORED]) as found:

        def blocks() -> Iterator[Rows]:
            for each in found:
                if isinstance(each, ShardNotes):
                    notes(each)
                else:
                    advance(each.rows.nbytes)
                    yield each.rows.copy()

        unread, rest = blocks(), np.empty((0, SCORED.columns), SCORED.dtype)
        for first, last in pairwise(bounds):
            count = int(queries.ends[last] - queries.ends[first])
            while len(rest) < count:
                rest = np.concatenate([rest, next(unread)])
            yield Answer(int(queries.records[first]), first, last, rest[:count])
            rest = rest[count:]
        for _ in unread:  # the notes of shards without rows
            pass


def scores_of(mutants: Mutants, run: ScoringRun, found: Iterable[Answer]) -> npt.NDArray[np.float64]:
    """(num_mutants,) sums over the sites of each mutant, in nats.

    Args:
        mutants: mutants whose sites the run has.
        run: the run that scores them.
        found: all answers.
    """
    queries, of_each = run.queries, np.zeros(len(mutants.sites))
    places = dict(by_record(mutants, run.index))
    for answer in found:
        chosen = _substitutions(mutants, places[answer.record])
        if run.plan.scoring["joint"]:
            rows = answer.rows[_rows_of_sets(answer, queries, mutants, places[answer.record])]
        else:  # each site is in one query, in ascending order
            sites = queries.sites[slice(*queries.ends[[answer.first, answer.last]].tolist())]
            rows = answer.rows[np.searchsorted(sites, mutants.sites[chosen])]
        of_each[chosen] = effects(rows, mutants.wild_types[chosen], mutants.mutants[chosen])
    return mutants.sums(of_each)


def _substitutions(mutants: Mutants, places: Items) -> Items:
    """Indices of the substitutions of some mutants, concatenated."""
    ranges = [np.arange(*mutants.starts[place : place + 2]) for place in places.tolist()]
    return np.concatenate(ranges)


def _rows_of_sets(answer: Answer, queries: Queries, mutants: Mutants, places: Items) -> Items:
    """Rows of an answer for the sites of some mutants, each from the query that masks the mutant's sites."""
    known = {b"": np.arange(0)}  # of the wild type
    for query in range(answer.first, answer.last):
        first, last = (queries.ends[query : query + 2] - queries.ends[answer.first]).tolist()
        known[queries.sites[slice(*queries.ends[query : query + 2])].tobytes()] = np.arange(first, last)
    return np.concatenate(
        [
            known[mutants.sites[slice(*mutants.starts[place : place + 2])].tobytes()]
            for place in places.tolist()
        ]
    )
