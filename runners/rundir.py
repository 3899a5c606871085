"""The directory a run is worked on in, and who may do what in it.

.OUT.h5.claim               held by the one process that plans, admits, merges or cleans up
OUT.h5.run/
    plan.json               what the run is (see `plan`)
    index/                  the records of the inputs (see `index`); index.new/ until known to be the plan's
    shards/00007.h5         finished work, each file whole or not there
    slices/3-of-8.claim     held by a process that computes one slice of the shards
    logs/                   a log of each worker

A process that computes all shards holds `.OUT.h5.claim` from beginning to end. One with a slice holds
it while it joins and while it leaves, so that nobody joins a run that is being replaced, merged or removed.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from esm_packed.runners.claims import Claim, is_live
from esm_packed.runners.slices import Slice

WHOLE_RUN = "the whole run"


class RunDirectory:
    """`OUT.h5.run`, beside the output it becomes."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.run")
        self.plan_path = self.path / "plan.json"
        self.index_path = self.path / "index"
        self.new_index_path = self.path / "index.new"
        self.logs_path = self.path / "logs"
        self._slices = self.path / "slices"

    def create(self) -> None:
        """Make the folders that are missing, and remove what killed processes left half-written.

        Call it with the claim held. While slices are being computed nothing is removed.
        """
        for name in ("index", "shards", "slices", "logs"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        if self.live_slices():
            return
        name = glob.escape(self.output.name)
        for litter in (
            self.output.parent.glob(f".{name}.*.tmp"),
            self.output.parent.glob(f"..{name}.claim.*.tmp"),
            self.path.glob(".*.tmp"),
            (self.path / "shards").glob(".*.tmp"),
            self._slices.iterdir(),
        ):
            for path in litter:
                path.unlink(missing_ok=True)

    def shard_path(self, shard: int) -> Path:
        """Where a finished shard lies."""
        return self.path / "shards" / f"{shard:05}.h5"

    def finished(self, num_shards: int) -> list[int]:
        """Shards whose files are there; what they hold is checked when they are read."""
        names = {entry.name for entry in os.scandir(self.path / "shards")}
        return [shard for shard in range(num_shards) if self.shard_path(shard).name in names]

    def claim(self, purpose: str = WHOLE_RUN) -> Claim:
        """The claim on the whole run; it lies outside the directory and outlives it."""
        return Claim(self.output.with_name(f".{self.output.name}.claim"), purpose)

    def slice_claim(self, part: Slice) -> Claim:
        """The claim of the process that computes `part`."""
        return Claim(self._slices / f"{part.index}-of-{part.count}.claim", f"slice {part}")

    def live_slices(self) -> dict[Slice, Path]:
        """Slices that are being computed, and their claims."""
        if not self._slices.is_dir():
            return {}
        now = self._clock()
        names = sorted(entry.name for entry in os.scandir(self._slices) if entry.name.endswith(".claim"))
        live = {}
        for name in names:
            index, _, count = name.removesuffix(".claim").partition("-of-")
            if index.isdecimal() and count.isdecimal() and is_live(self._slices / name, now):
                live[Slice(int(index), int(count))] = self._slices / name
        return live

    def _clock(self) -> float:
        """The time by the clock of the file system, or by our own where nothing can be written."""
        probe = self._slices / f".{secrets.token_hex(8)}.tmp"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def adopt_index(self) -> None:
        """Put the new index in the place of the old one."""
        shutil.rmtree(self.index_path)
        self.new_index_path.rename(self.index_path)

    def forget_shards(self) -> None:
        """Remove all shards: they belong to no plan, or to one that is given up."""
        for entry in (self.path / "shards").iterdir():
            entry.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the directory with all it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
