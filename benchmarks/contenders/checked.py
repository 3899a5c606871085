"""Contenders that compute one quantity of one protein: each is checked against FP64 before it is timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import torch
from contenders.contest import Contest, OtherModelError
from measuring import synchronize
from workloads import proteins

from esm_packed.config import ESM2Config


@cache
def protein(num_residues: int) -> str:
    """A random protein with the residue frequencies of UniRef50."""
    return "".join(proteins("uniref", 2 * num_residues + 1024))[:num_residues]


@dataclass(frozen=True)
class Variant:
    """What is timed.

    Args:
        provider: this package, or another one.
        model: a model, as for `ESM2.from_pretrained`.
        dtype: precision mode.
        num_residues: length of the protein.
    """

    provider: str
    model: str
    dtype: str
    num_residues: int


Timed = TypeVar("Timed", bound=Variant)


class CheckedContest(ABC, Generic[Timed]):
    """Variants, each loaded and checked once.

    Args:
        contest: holds this package's models.
    """

    quantity: ClassVar[str]
    limits: ClassVar[dict[str, float]]
    """Largest difference to FP64 by precision; more means another model."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest
        self._ready: dict[Timed, Any] = {}
        self._truths: dict[tuple[str, int], torch.Tensor] = {}
        self.max_errors: dict[Timed, float] = {}

    def ready(self, variant: Timed) -> Any:
        """Load, run once and check against FP64.

        Raises:
            ImportError: the provider's package is missing.
            OtherModelError: a rival computes a different model.
            AssertionError: this package is wrong.
        """
        if variant not in self._ready:
            contender = self._load(variant)
            contender.prepare(protein(variant.num_residues))
            contender.run()
            synchronize()
            actual = self._result(contender, variant).double().cpu()
            key = variant.model, variant.num_residues
            if key not in self._truths:
                self._truths[key] = self._truth(variant)
            error = float((actual - self._truths[key]).abs().max())
            if not error <= self.limits[variant.dtype]:
                is_own = variant.provider.startswith("esm_packed")
                refusal = AssertionError if is_own else OtherModelError
                raise refusal(f"{self.quantity} to FP64 are off by {error:.1e}")
            self._ready[variant], self.max_errors[variant] = contender, error
        return self._ready[variant]

    def config(self, model: str) -> ESM2Config:
        """Shape of a model."""
        return self._contest.model(model, "fp64").config

    @abstractmethod
    def _load(self, variant: Timed) -> Any:
        """The contender, with `prepare(sequence)` and `run()`."""

    @abstractmethod
    def _result(self, contender: Any, variant: Timed) -> torch.Tensor:
        """What the contender computed, or the part that is checked."""

    @abstractmethod
    def _truth(self, variant: Timed) -> torch.Tensor:
        """The same in FP64, on the CPU."""
