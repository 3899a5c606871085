"""Mutants of a protein, written `A24G` or `A24G:K30R`, checked against the protein."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esm_packed.alphabet import AMINO_ACID_IDS, AMINO_ACIDS, TOKENS, encode

_MUTATION = re.compile(r"(.)(-?[0-9]{1,18})(.)")
_MOST_SHOWN = 60
"""Characters of a mutation in an error."""
_LETTERS = bytes(ord(token) if len(token) == 1 else ord("?") for token in TOKENS).ljust(256, b"?")
_IDS = {letter: TOKENS.index(letter) for letter in AMINO_ACIDS}


class NumberingError(ValueError):
    """The protein has no residue of that number, or another one there."""


class Substitution(NamedTuple):
    """One residue in place of another.

    Args:
        site: place in the protein, from 0.
        wild_type, mutant: token ids, of the 20 amino acids.
    """

    site: int
    wild_type: int
    mutant: int


Mutant = tuple[Substitution, ...]
"""By site, each once; empty for the wild type."""


class WildType:
    """A protein whose mutants are read.

    Args:
        token_ids: (num_residues,) uint8 as `alphabet.encode` gives them.
        offset: number of its first residue.
    """

    def __init__(self, token_ids: npt.NDArray[np.uint8], offset: int = 1) -> None:
        self._token_ids = token_ids
        self._offset = offset
        self._letters = token_ids.tobytes().translate(_LETTERS)
        self._known: dict[str, Substitution] = {}

    def mutant(self, text: str) -> Mutant:
        """The mutant that `text` describes; mutations are separated by `:`, letters may be lower case.

        Raises:
            NumberingError: the protein has no such residue, or another one there.
            ValueError: it is not written as `A24G:K30R`, a residue is not one of the 20 amino acids, or
                a site appears twice.
        """
        known = self._known
        found = [known.get(part) or self._substitution(part.strip()) for part in text.split(":")]
        if len(found) > 1:
            found.sort()
            for one, other in pairwise(found):
                if one.site == other.site:
                    raise ValueError(f"{_shorten(text)}: residue {one.site + self._offset} appears twice")
        return tuple(found)

    def difference(self, sequence: str) -> Mutant:
        """The mutant whose residues are `sequence`.

        Raises:
            ValueError: it is not as long as the protein, or one of the residues that differ is not one of the
                20 amino acids.
        """
        token_ids = encode(sequence)
        if len(token_ids) != len(self._token_ids):
            raise ValueError(
                f"{len(token_ids)} residues, but the protein has {len(self._token_ids)}: "
                "only substitutions are scored"
            )
        sites = np.flatnonzero(token_ids != self._token_ids)
        found = [
            Substitution(*each)
            for each in zip(
                sites.tolist(), self._token_ids[sites].tolist(), token_ids[sites].tolist(), strict=True
            )
        ]
        for substitution in found:
            for token_id in substitution[1:]:
                if not AMINO_ACID_IDS.start <= token_id < AMINO_ACID_IDS.stop:
                    place = f"residue {substitution.site + self._offset}"
                    raise ValueError(f"{place}: {_no_amino_acid(TOKENS[token_id])}")
        return tuple(found)

    def mutated(self, mutant: Iterable[Substitution]) -> str:
        """The residues of a mutant in upper case."""
        letters = bytearray(self._letters)
        for site, _, residue in mutant:
            letters[site] = _LETTERS[residue]
        return letters.decode("ascii")

    def _substitution(self, text: str) -> Substitution:
        match = _MUTATION.fullmatch(text)
        if match is None:
            raise ValueError(f"{_shorten(text)!r} is not a mutation; write A24G, or A24G:K30R for several")
        wild_type, number, mutant = (group.upper() for group in match.groups())
        for letter in (wild_type, mutant):
            if letter not in _IDS:
                raise ValueError(f"{text}: {_no_amino_acid(letter)}")
        site, last = int(number) - self._offset, len(self._token_ids) - 1
        if not 0 <= site <= last:
            raise NumberingError(
                f"{text}: there is no residue {number}; the protein has residues {self._offset} to "
                f"{last + self._offset}"
            )
        if (there := int(self._token_ids[site])) != _IDS[wild_type]:
            raise NumberingError(f"{_shorten(text)}: residue {number} is {TOKENS[there]}, not {wild_type}")
        self._known[text] = substitution = Substitution(site, _IDS[wild_type], _IDS[mutant])
        return substitution


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _no_amino_acid(letter: str) -> str:
    return f"{letter} is not one of the 20 amino acids {''.join(sorted(AMINO_ACIDS))}"
