"""Variant effects and pseudo-likelihoods from the language-model head.

The score of a substitution is log p(mutant) - log p(wild type) at its site, in nats, and that of a mutant is
the sum over its sites (Meier et al. 2021, "Language models enable zero-shot prediction of the effects of
mutations on protein function"). With the method `masked` each site is masked in a separate copy of the
protein; with `wild-type` all sites are read from one copy without masks. Probabilities are those of
the softmax over all 33 tokens; a site whose residue is not one of the 20 amino acids has no score.

A protein longer than a window is not computed whole. A masked site is computed in the window centered on it,
as far as the ends of the protein allow: ProteinGym's `optimal` window, but that cuts tokens, and here each
window has BOS and EOS. For `wild-type` windows begin every half window, and each site is read from the one in
which it is most central.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch

from esm_packed.alphabet import AMINO_ACID_IDS, MASK_ID
from esm_packed.config import DEFAULT_MAX_LENGTH, SCORING_METHODS
from esm_packed.embedding import embed_together, encode_protein, encode_proteins
from esm_packed.mutations import Mutant, WildType
from esm_packed.outputs import LOG_PROBABILITIES
from esm_packed.packing import SPECIAL_TOKENS, default_token_budget, plan_packs
from esm_packed.rescue import is_finite, named
from esm_packed.windows import Windows

if TYPE_CHECKING:
    from esm_packed.model import ESM2

DEFAULT_WINDOW = DEFAULT_MAX_LENGTH
"""Residues that are computed together at most."""

TokenIds = npt.NDArray[np.uint8]
LogProbabilities = npt.NDArray[np.floating[Any]]
"""(num_sites, 20) in nats, in the order of `alphabet.AMINO_ACIDS`."""


class Query(NamedTuple):
    """A copy of a protein, or of a window of it, and the sites that are read from it.

    Args:
        start, stop: residues of the copy, counted in the protein from 0.
        sites: residues whose log-probabilities are read, counted in the protein from 0, ascending.
        masked: whether these are masked in the copy.
    """

    start: int
    stop: int
    sites: tuple[int, ...]
    masked: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, BOS and EOS included."""
        return self.stop - self.start + SPECIAL_TOKENS

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """(num_sites,) sites counted in the copy."""
        return np.array(self.sites, np.int64) - self.start

    def copy_of(self, token_ids: TokenIds) -> TokenIds:
        """The copy of a protein with these token ids."""
        copy = token_ids[self.start : self.stop].copy()
        if self.masked:
            copy[self.places] = MASK_ID
        return copy


class PseudoLikelihood(NamedTuple):
    """How probable a model finds the residues of a protein, each masked in turn (Salazar et al. 2020).

    Args:
        sum: pseudo-log-likelihood, over the scored residues, in nats.
        mean: that of a residue; NaN if none is scored.
        perplexity: exp(-mean).
        num_scored: residues that are one of the 20 amino acids.
    """

    sum: float
    mean: float
    perplexity: float
    num_scored: int


def optimal_window(length: int, site: int, size: int) -> tuple[int, int]:
    """First residue of the window centered on `site`, within a protein of `length`, and the one behind it."""
    start = max(0, min(site - size // 2, length - size))
    return start, min(start + size, length)


def plan_queries(
    length: int,
    sites: Iterable[int],
    *,
    joint: Iterable[Iterable[int]] = (),
    method: str = "masked",
    window: int = DEFAULT_WINDOW,
) -> list[Query]:
    """Copies of a protein to compute.

    Args:
        length: residues of the protein.
        sites: sites to score one at a time, counted from 0; duplicates count once.
        joint: sets of sites, each of which is masked together in one copy.
        method: one of `config.SCORING_METHODS`.
        window: most residues of a copy.

    Returns:
        In ascending order of the sites, each query once; for `wild-type` one for each window that has a site.

    Raises:
        ValueError: `method` or `window` cannot be, sites are not in the protein, are further apart than a
            window although they are joint, or are joint where nothing is masked.
    """
    check_method(method, joint=bool(joint := list(joint)))
    if window < 1:
        raise ValueError(f"window must be positive, got {window}")
    sets = {(site,) for site in sites} | {tuple(sorted(set(each))) for each in joint} - {()}
    targets: list[tuple[int, ...]] = sorted(sets)
    if targets and not 0 <= targets[0][0] <= max(each[-1] for each in targets) < length:
        raise ValueError(f"sites must be within 0 to {length - 1}, got {targets[0][0]} to {targets[-1][-1]}")
    if method == "wild-type":
        return _windows_of_sites(length, np.array(targets, np.int64).ravel(), window)
    for each in targets:
        if each[-1] - each[0] >= window:
            raise ValueError(
                f"sites that are masked together span {each[-1] - each[0] + 1} residues; "
                f"a window has {window}"
            )
    return [
        Query(*optimal_window(length, (each[0] + each[-1] + 1) // 2, window), each, True) for each in targets
    ]


def _windows_of_sites(length: int, sites: npt.NDArray[np.int64], window: int) -> list[Query]:
    starts = np.array(Windows(window, window // 2).starts(length))
    size = min(window, length)
    off_center = np.abs(2 * (sites[:, None] - starts) - (size - 1))
    nearest = starts[off_center.argmin(1)]
    return [
        Query(start, start + size, tuple(sites[nearest == start].tolist()), False)
        for start in np.unique(nearest).tolist()
    ]


def check_method(method: str, *, joint: bool) -> None:
    """See that mutants can be scored in this way.

    Raises:
        ValueError: there is no such method, or it cannot be joint.
    """
    if method not in SCORING_METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(SCORING_METHODS)}")
    if joint and method != "masked":
        raise ValueError(f"joint masks the sites of a mutant together; the method {method} masks none")


def answer_together(model: ESM2, asked: Sequence[tuple[TokenIds, Query]]) -> list[LogProbabilities]:
    """Log-probabilities at the sites of queries that make one pack.

    Args:
        model: computes.
        asked: token ids of a whole protein, and what is read of it.

    Returns:
        Of each query (num_sites, 20) FP32 (FP64 in the FP64 mode).
    """
    copies = [query.copy_of(token_ids) for token_ids, query in asked]
    sites = [query.places for _, query in asked]
    found = embed_together(model, copies, [LOG_PROBABILITIES], sites)
    return [outputs[LOG_PROBABILITIES] for outputs in found]


def effects(
    log_probabilities: LogProbabilities,
    wild_types: npt.NDArray[np.integer[Any]],
    mutants: npt.NDArray[np.integer[Any]],
) -> npt.NDArray[np.floating[Any]]:
    """(num_sites,) scores of substitutions.

    Args:
        log_probabilities: (num_sites, 20) at their sites.
        wild_types, mutants: (num_sites,) token ids.
    """
    each, first = np.arange(len(wild_types)), AMINO_ACID_IDS.start
    differences: npt.NDArray[np.floating[Any]] = (
        log_probabilities[each, mutants - first] - log_probabilities[each, wild_types - first]
    )
    return differences


@overload
def score(
    model: ESM2,
    sequences: str,
    mutations: Sequence[str],
    *,
    method: str = "masked",
    joint: bool = False,
    offset: int = 1,
    window: int = DEFAULT_WINDOW,
    token_budget: int | None = None,
) -> LogProbabilities: ...


@overload
def score(
    model: ESM2,
    sequences: list[str] | tuple[str, ...],
    mutations: Sequence[Sequence[str]],
    *,
    method: str = "masked",
    joint: bool = False,
    offset: int = 1,
    window: int = DEFAULT_WINDOW,
    token_budget: int | None = None,
) -> list[LogProbabilities]: ...


def score(
    model: ESM2,
    sequences: str | list[str] | tuple[str, ...],
    mutations: Sequence[str] | Sequence[Sequence[str]],
    *,
    method: str = "masked",
    joint: bool = False,
    offset: int = 1,
    window: int = DEFAULT_WINDOW,
    token_budget: int | None = None,
) -> LogProbabilities | list[LogProbabilities]:
    """Score mutants: log p(mutant) - log p(wild type), summed over their sites, in nats.

    Scores that are not finite are recomputed in FP32, and set to NaN if FP32 fails too.

    Args:
        sequences: a protein, or a list of them.
        mutations: mutants of the protein, such as `["A24G", "A24G:K30R"]`; for a list of proteins, one such
            list for each.
        method: `masked` or `wild-type`.
        joint: mask all sites of a mutant together instead of one at a time.
        offset: number of the first residue of each protein.
        window: longer proteins are computed in windows of this many residues.
        token_budget: tokens computed together; None for the default of the device.

    Returns:
        (num_mutants,) FP32 (FP64 in the FP64 mode); for a list of proteins, a list of these.

    Raises:
        ValueError: a mutant does not match its protein (the message says which and why), a sequence is
            empty or has a character outside the alphabet, an argument has an invalid value, or the checkpoint
            has no language-model head.
        TypeError: a sequence or a mutant is not a string, or there is no list of mutants for each protein.

    Warns:
        UserWarning: scores were not finite; the message names the sequences and the outcome.
    """
    check_method(method, joint=joint)
    if isinstance(sequences, str):
        token_ids = [encode_protein("sequence", sequences)]
        parsed = [_parse("mutations", token_ids[0], mutations, offset)]
    else:
        token_ids = encode_proteins(sequences)
        if len(mutations) != len(token_ids):
            raise ValueError(f"{len(mutations)} lists of mutations for {len(token_ids)} sequences")
        parsed = [
            _parse(f"mutations[{index}]", *each, offset)
            for index, each in enumerate(zip(token_ids, mutations, strict=True))
        ]
    plans = [
        _plan(len(ids), mutants, method, window, joint=joint)
        for ids, mutants in zip(token_ids, parsed, strict=True)
    ]
    answers = _answers(model, token_ids, plans, token_budget)
    dtype = np.float64 if model.dtype == torch.float64 else np.float32
    scores: list[LogProbabilities] = [
        np.array(_sums(queries, arrays, mutants, joint=joint), dtype)
        for queries, arrays, mutants in zip(plans, answers, parsed, strict=True)
    ]
    return scores[0] if isinstance(sequences, str) else scores


def _plan(length: int, mutants: Sequence[Mutant], method: str, window: int, *, joint: bool) -> list[Query]:
    sets = [[substitution.site for substitution in mutant] for mutant in mutants]
    if joint:
        return plan_queries(length, [], joint=sets, method=method, window=window)
    return plan_queries(length, [site for sites in sets for site in sites], method=method, window=window)


def _sums(
    queries: Sequence[Query], arrays: Sequence[LogProbabilities], mutants: Sequence[Mutant], *, joint: bool
) -> list[float]:
    """Scores of the mutants of a protein from the answers to its queries."""
    if joint:
        known = {query.sites: rows for query, rows in zip(queries, arrays, strict=True)}
    else:
        known = {
            (site,): rows[place : place + 1]
            for query, rows in zip(queries, arrays, strict=True)
            for place, site in enumerate(query.sites)
        }
    scores = []
    for mutant in mutants:
        sites, wild_types, residues = np.array(mutant, np.int64).T
        keys = [tuple(sites.tolist())] if joint else [(site,) for site in sites.tolist()]
        rows = np.concatenate([known[key] for key in keys])
        scores.append(float(effects(rows, wild_types, residues).sum()))
    return scores


_NO_SITES: LogProbabilities = np.empty((0, 20), np.float32)


def log_probabilities(
    model: ESM2,
    sequences: Sequence[str],
    *,
    method: str = "masked",
    window: int = DEFAULT_WINDOW,
    token_budget: int | None = None,
) -> list[LogProbabilities]:
    """Log-probabilities of the 20 amino acids at every residue.

    Args:
        sequences: as for `embed`.
        method, window, token_budget: as for `score`.

    Returns:
        In the order of `sequences`, (num_residues, 20) FP32 (FP64 in the FP64 mode) in nats, in the order of
        `alphabet.AMINO_ACIDS`; normalized over all 33 tokens, so that a row sums to nearly one.

    Raises, warns: as `score`.
    """
    check_method(method, joint=False)
    token_ids = encode_proteins(sequences)
    plans = [plan_queries(len(ids), range(len(ids)), method=method, window=window) for ids in token_ids]
    # each site is in one query
    return [
        np.concatenate(arrays)[np.argsort([site for query in queries for site in query.sites])]
        for queries, arrays in zip(plans, _answers(model, token_ids, plans, token_budget), strict=True)
    ]


def pseudo_log_likelihood(
    model: ESM2,
    sequences: Sequence[str],
    *,
    window: int = DEFAULT_WINDOW,
    token_budget: int | None = None,
) -> list[PseudoLikelihood]:
    """Pseudo-log-likelihood of each protein: the sum of log p(residue), each residue masked in turn.

    Args:
        sequences: as for `embed`; residues other than the 20 amino acids are not scored.
        window, token_budget: as for `score`.

    Raises, warns: as `score`.
    """
    token_ids = encode_proteins(sequences)
    scored = [scored_sites(ids) for ids in token_ids]
    plans = [
        plan_queries(len(ids), sites.tolist(), window=window)
        for ids, sites in zip(token_ids, scored, strict=True)
    ]
    answers = _answers(model, token_ids, plans, token_budget)
    return [
        pseudo_likelihood(np.concatenate([_NO_SITES, *arrays]), ids[sites])
        for ids, sites, arrays in zip(token_ids, scored, answers, strict=True)
    ]


def scored_sites(token_ids: TokenIds) -> npt.NDArray[np.int64]:
    """(num_scored,) places, from 0, of the residues that are one of the 20 amino acids."""
    return np.flatnonzero((token_ids >= AMINO_ACID_IDS.start) & (token_ids < AMINO_ACID_IDS.stop))


def pseudo_likelihood(log_probabilities: LogProbabilities, residues: TokenIds) -> PseudoLikelihood:
    """Sum up a protein.

    Args:
        log_probabilities: (num_scored, 20) at its scored sites.
        residues: (num_scored,) token ids there.
    """
    columns = residues.astype(np.int64) - AMINO_ACID_IDS.start
    own = log_probabilities[np.arange(len(columns)), columns]
    total = float(own.sum(dtype=np.float64))
    mean = total / len(own) if len(own) else math.nan
    with np.errstate(over="ignore"):  # infinite below -709
        return PseudoLikelihood(total, mean, float(np.exp(-mean)), len(own))


def _parse(name: str, token_ids: TokenIds, texts: Sequence[Any], offset: int) -> list[Mutant]:
    if isinstance(texts, str):
        raise TypeError(f"{name} is one string; pass a list of them")
    if not isinstance(texts, Iterable):
        raise TypeError(f"{name} is {texts!r}; pass a list of strings such as 'A24G'")
    wild_type, mutants = WildType(token_ids, offset), []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{index}] is a {type(text).__name__}; pass strings such as 'A24G'")
        try:
            mutants.append(wild_type.mutant(text))
        except ValueError as error:
            raise ValueError(f"{name}[{index}]: {error}") from None
    return mutants


def _answers(
    model: ESM2, token_ids: Sequence[TokenIds], plans: Sequence[Sequence[Query]], token_budget: int | None
) -> list[list[LogProbabilities]]:
    """Log-probabilities at the sites of all queries of each protein; warns for the caller's caller."""
    owners = [owner for owner, queries in enumerate(plans) for _ in queries]
    asked = [(token_ids[owner], query) for owner, queries in enumerate(plans) for query in queries]
    if token_budget is None:
        token_budget = default_token_budget(model.device)
    arrays: list[list[LogProbabilities]] = [[_NO_SITES] * len(queries) for queries in plans]
    firsts = np.cumsum([0, *map(len, plans)])
    changed: dict[str, dict[int, None]] = {}
    for members in plan_packs([query.num_tokens for _, query in asked], token_budget):
        together = answer_together(model, [asked[index] for index in members])
        for index, rows in zip(members.tolist(), together, strict=True):
            owner = owners[index]
            arrays[owner][index - int(firsts[owner])] = rows
            if not is_finite({"": rows}):
                reason = _recompute(model, asked[index], rows)
                changed.setdefault(reason, {})[owner] = None
    for reason, indices in changed.items():
        warnings.warn(
            f"{len(indices)} of {len(token_ids)} sequences: the log-probabilities are {reason}: "
            f"{named(sorted(indices))}",
            stacklevel=3,
        )
    return arrays


def _recompute(model: ESM2, asked: tuple[TokenIds, Query], rows: LogProbabilities) -> str:
    """Replace the rows of a query, which are not finite; what became of them."""
    _, reason = model.rescue.replace(
        {"rows": rows}, lambda fp32: {"rows": answer_together(fp32, [asked])[0]}, f"dtype {model.precision}"
    )
    return reason
