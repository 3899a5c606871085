"""Measurements of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

RESULTS_AHEAD = 2
"""Computed packs that may wait to be written before computing pauses."""

STAGES = ("reading", "copying", "computing", "writing")


@dataclass
class StageTimes:
    """Seconds that each stage worked, and how much was processed."""

    reading: float = 0.0
    copying: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    wall: float = 0.0
    tokens: int = 0
    residues: int = 0
    sequences: int = 0
    packs: int = 0
    overlong_packs: int = 0
    """Packs of a single sequence longer than the budget."""
    tokens_in_budget: int = 0
    """Tokens of sequences in the other packs, excluding padding."""
    token_room: int = 0
    """Tokens that the other packs have room for."""
    packs_queued: int = 0
    """Packs ready when one was taken, summed over packs; near zero, the device waited for packs."""
    num_halved: int = 0
    reused: int = 0
    """Sequences whose rows came from an earlier output."""
    reused_residues: int = 0

    def add(self, other: StageTimes) -> None:
        """Add the measurements of `other`."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def residues_done(self) -> int:
        """Residues computed or taken from an earlier output."""
        return self.residues + self.reused_residues

    @property
    def packing_efficiency(self) -> float:
        """Tokens over (packs x budget), excluding overlong packs; 1 if there are no others."""
        return self.tokens_in_budget / self.token_room if self.token_room else 1.0

    @property
    def busy(self) -> float:
        """Share of the wall time in which the device computed."""
        return self.computing / self.wall if self.wall else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage that worked longest."""
        return max(STAGES, key=lambda stage: float(getattr(self, stage)))


@dataclass(frozen=True)
class Snapshot:
    """The state of a pipeline at one moment.

    Args:
        times: measurements so far.
        shard: the shard being computed; None between shards.
        packs_waiting: packs that are ready to be computed.
        results_waiting: packs that are computed but not yet written.
        memory_bytes: bytes allocated on the device; None where it does not report them.
        utilization: utilization of the device in percent; None where it does not report it.
    """

    times: StageTimes
    shard: int | None
    packs_waiting: int
    results_waiting: int
    memory_bytes: int | None
    utilization: int | None
