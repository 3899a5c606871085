"""The summary of a run that is printed at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from esm_packed.runners.input.fasta import Modified, shorten
from esm_packed.runners.input.index import FastaIndex
from esm_packed.runners.output.reader import EmbeddingReader
from esm_packed.runners.state.shard import STATUS_FAILED, STATUS_RECOMPUTED, Comparison
from esm_packed.runners.system.terminal import counted
from esm_packed.runners.watch.console import byte_size, duration
from esm_packed.runners.watch.metrics import STAGES, StageTimes

if TYPE_CHECKING:
    from esm_packed.checkpoints import Checkpoint
    from esm_packed.runners.state.request import EmbedRequest

JUDGED_PACKS = 20
"""With fewer packs, the last ones, which are not full, dominate the efficiency."""

JUDGED_SECONDS = 10.0

_IDS_SHOWN = 5
_NAME_WIDTH, _VALUE_WIDTH, _ID_WIDTH = 20, 60, 50
"""Characters of names, values and IDs in the summary, for a terminal of 80 columns."""


def parts_line(reader: EmbeddingReader) -> str:
    """`2 files in out.h5.parts/1a2b3c4d (3.4 GB)`, or nothing if there are no parts."""
    if not reader.parts:
        return ""
    size = byte_size(sum(part.bytes for part in reader.parts))
    return f"{counted(len(reader.parts), 'file')} in {reader.attributes['parts']} ({size})"


def _counted(counts: Mapping[str, tuple[int, str, str]]) -> dict[str, str]:
    """Lines for the counts that are not zero, each a number, a noun and what follows it."""
    return {name: counted(count, noun) + what for name, (count, noun, what) in counts.items() if count}


class Changed(NamedTuple):
    """Sequences changed in one way from the input: how many, and the first IDs."""

    number: int
    first_ids: list[str]

    def after(self, text: str) -> str:
        """`text: IDs`, with as many IDs as fit on the line, or on a second line if it would be too long."""
        for count in range(len(self.first_ids), 0, -1):
            ids = [shorten(each, _ID_WIDTH) for each in self.first_ids[:count]]
            shown = ", ".join(ids + ["..."] * (count < self.number))
            if len(shown) <= _VALUE_WIDTH:
                break
        line = f"{text}: {shown}"
        return line if len(line) <= _VALUE_WIDTH else f"{text}:\n{shown}"


@dataclass
class Summary:
    """What a run did; `already_complete` if the output existed and there was nothing to do."""

    output: Path
    model_name: str
    model_sha256: str
    dtype: str
    device: str
    token_budget: int
    num_sequences: int
    num_residues: int
    num_replaced: int
    num_duplicates: int
    num_left_out: int
    num_identical: int
    attention: str = ""
    num_truncated: int = 0
    changed: dict[str, Changed] = field(default_factory=dict)
    """By kind of change, named as in `EmbeddingReader.changed`."""
    num_recomputed: int = 0
    num_failed: int = 0
    comparisons: list[Comparison] = field(default_factory=list)
    num_to_compare: int = 0
    stages: StageTimes = field(default_factory=StageTimes)
    seconds: float = 0.0
    embedding_seconds: float = 0.0
    merging_seconds: float = 0.0
    already_complete: bool = False
    part: str = ""
    parts: str = ""
    """Where the rows of residues are, if not in the output."""
    missing_shards: int = 0
    """Unfinished shards of other slices, without which there is no output."""

    @classmethod
    def of_run(
        cls, request: EmbedRequest, checkpoint: Checkpoint, index: FastaIndex, identity: Mapping[str, Any]
    ) -> Summary:
        """The summary before anything is computed."""
        return cls(
            output=request.output,
            model_name=checkpoint.model_name,
            model_sha256=checkpoint.sha256,
            dtype=identity["dtype"],
            device="",
            token_budget=identity["token_budget"],
            num_sequences=index.num_records,
            num_residues=index.total_residues,
            num_replaced=index.num_replaced,
            num_duplicates=index.num_duplicates,
            num_left_out=len(index.problems),
            num_identical=index.num_identical,
            num_to_compare=request.fp32_compare,
        )

    def read_output(self) -> None:
        """Add what only the output knows, including work of earlier processes."""
        with EmbeddingReader(self.output) as reader:
            status = reader.column("status")
            self.num_failed = int(np.count_nonzero(status == STATUS_FAILED))
            self.num_recomputed = int(np.count_nonzero(status == STATUS_RECOMPUTED))
            self.changed = {
                change: Changed(
                    len(rows), [reader.sequence_ids(row, row + 1)[0] for row in rows[:_IDS_SHOWN].tolist()]
                )
                for change, rows in reader.changed().items()
            }
            self.num_truncated = self.changed["truncated"].number
            self.comparisons = [each.comparison for each in reader.comparisons()]
            self.parts = parts_line(reader)
            self.attention = reader.attributes.get("attention_backend", "")

    def warnings(self) -> list[str]:
        """What the user should look at."""
        found = []
        efficiency = self.stages.packing_efficiency
        if self.stages.packs >= JUDGED_PACKS and efficiency < 0.85:
            level = "error" if efficiency < 0.8 else "warning"
            found.append(
                f"packing {level}: packs are only {efficiency:.0%} full; a --token-budget well above the "
                "longest sequence fills them"
            )
        if self.stages.wall >= JUDGED_SECONDS and self.stages.busy < 0.8:
            level = "critical" if self.stages.busy < 0.5 else "mild"
            found.append(
                f"device idle ({level}): it computed only {self.stages.busy:.0%} of the time; "
                f"of the other stages, {self._slowest_other()} took the longest"
            )
        return found

    def _slowest_other(self) -> str:
        others = [stage for stage in STAGES if stage != "computing"]
        return max(others, key=lambda stage: float(getattr(self.stages, stage)))

    def lines(self, verbose: bool = False) -> list[str]:
        """The summary for the terminal.

        Args:
            verbose: print everything; otherwise the output, counts, the rate, and anything unusual.
        """
        values = {**self._result_lines(), **self._exception_lines(), **self._comparison_lines()}
        if verbose:
            values |= self.detail_lines(self.attention)
        return [
            f"{name if number == 0 else '':<{_NAME_WIDTH}}{line}"
            for name, value in values.items()
            for number, line in enumerate(value.split("\n"))
        ]

    def _result_lines(self) -> dict[str, str]:
        time = f"{duration(self.seconds)}"
        if self.stages.packs:
            time += f", {self.stages.residues / max(self.embedding_seconds, 1e-9):,.0f} residues/s"
        whole = " in the whole input" * bool(self.missing_shards)
        lines = {
            "sequences": f"{self.num_sequences:,} ({counted(self.num_residues, 'residue')}){whole}",
            "model": f"{self.model_name} in {self.dtype} on {self.device}",
            "time": time,
        }
        if self.missing_shards:
            shards = counted(self.missing_shards, "shard")
            return lines | {"slice": f"{self.part} is done; {shards} of other slices unfinished"}
        output = f"{self.output} ({byte_size(self.output.stat().st_size)})"
        if self.parts:
            output += f",\nwith {self.parts}"
        return {"output": output} | lines

    def input_lines(self, listed_in: str) -> dict[str, str]:
        """Counts of what reading changed or left out, if any.

        Args:
            listed_in: where the records that were left out are listed.
        """
        counts = {
            "replaced": (self.num_replaced, "residue", " outside the alphabet, by X"),
            "duplicates": (self.num_duplicates, "record", " with the ID of an earlier record"),
            "left out": (self.num_left_out, "record", f", listed in {listed_in}"),
            "identical": (self.num_identical, "sequence", " with the rows of an equal one"),
        }
        return _counted(counts)

    def _exception_lines(self) -> dict[str, str]:
        """Counts of unusual events, if any."""
        counts = {"reused": (self.stages.reused, "sequence", ", whose rows are those of --reuse")}
        ids = {"replaced": Modified.RESIDUES_REPLACED.label, "duplicates": Modified.RENAMED.label}
        if not self.missing_shards:  # the output has them
            for name, flag, what in (
                ("gaps dropped", Modified.GAPS_DROPPED, " with gaps"),
                ("stops dropped", Modified.TRAILING_STOP_DROPPED, " ending in *"),
            ):
                counts[name] = (self.changed[flag.label].number, "sequence", what)
                ids[name] = flag.label
            ids["truncated"] = "truncated"
            counts |= {
                "truncated": (self.num_truncated, "sequence", ", to the first --max-length residues"),
                "recomputed": (self.num_recomputed, "sequence", " in fp32, listed in `problems`"),
                "failed": (self.num_failed, "sequence", ", whose rows are NaN, listed in `problems`"),
            }
        counts["split"] = (self.stages.num_halved, "pack", ", after running out of memory")
        lines = self.input_lines("`problems`") | _counted(counts)
        for name, change in ids.items():
            if name in lines and (changed := self.changed.get(change)) and changed.number:
                lines[name] = changed.after(lines[name])
        return lines

    def detail_lines(self, attention: str) -> dict[str, str]:
        """Times, packs and stages of the run; `attention` names the backends of the output."""
        stages = self.stages
        lines = {
            "model sha256": self.model_sha256,
            "embedding": duration(self.embedding_seconds),
            "merging": duration(self.merging_seconds),
        }
        if not self.missing_shards:
            lines["attention"] = attention
        if stages.packs:
            overlong = f", {stages.overlong_packs:,} of them a single longer sequence" * bool(
                stages.overlong_packs
            )
            wall = max(stages.wall, 1e-9)
            shares = ", ".join(f"{stage} {getattr(stages, stage) / wall:.0%}" for stage in STAGES)
            lines |= {
                "packs": f"{stages.packs:,} of up to {self.token_budget:,} tokens{overlong}",
                "packing efficiency": f"{self.stages.packing_efficiency:.1%}",
                "stages": f"{shares} of the time; {stages.bottleneck} was the slowest",
            }
        return lines

    def _comparison_lines(self) -> dict[str, str]:
        if self.missing_shards or (not self.comparisons and not self.num_to_compare):
            return {}
        if not self.comparisons:
            return {"against fp32": f"none of {self.num_to_compare:,} compared yet"}
        cosines = [each.cosine for each in self.comparisons]
        return {
            "against fp32": f"{counted(len(cosines), 'sequence')}: cosine at least {min(cosines):.8f}, "
            f"largest error {max(each.max_error for each in self.comparisons):.3g}, relative error at most "
            f"{max(each.relative_error for each in self.comparisons):.3g}"
        }
