"""Prints the peaks of memory, in kB, of runs with so many records and no model, in one process."""

from __future__ import annotations

import argparse
import functools
import re
import resource
from pathlib import Path

import pytest
import torch
from proteins import random_proteins, write_fasta

from esm_packed.config import ESM2Config
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS
from esm_packed.outputs import is_ragged
from esm_packed.packing import PackedBatch
from esm_packed.readout import FINITE
from esm_packed.runners import planning
from esm_packed.runners.input.build import build_index
from esm_packed.runners.session import embed_files
from esm_packed.runners.state import cut
from esm_packed.runners.state.request import EmbedRequest
from esm_packed.runners.watch.console import Console


class Model:
    """Every embedding is ones; looks at the memory whenever it is asked for some."""

    config = ESM2Config(5, 96, 6)
    attention_backend, precision_mode = "none", PRECISIONS["fp32"]
    device = torch.device("cpu")
    peak = 0

    def embed_packed(self, batch: PackedBatch, names: list[str], *rest: object) -> dict[str, torch.Tensor]:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found
        self.peak = max(self.peak, int(found[1]))
        rows = {True: batch.total_tokens, False: batch.num_sequences}
        outputs = {name: torch.ones(rows[is_ragged(name)], 96) for name in names}
        return outputs | {FINITE: torch.ones(batch.num_sequences, dtype=torch.bool)}


def peak(folder: Path, number: int, one_shard: bool, kind: str = "mean", parts: bool | None = None) -> int:
    """Embed `number` records; the peak of memory in kB.

    Args:
        folder: where all files go; the run directory stays there.
        number: of records.
        one_shard: all layers of distinct records are one shard, and what counts is all that was resident in
            the process until now. Otherwise all records are copies of one, and what counts is anonymous
            memory while the model is asked.
        kind: of output.
        parts: leave rows of residues in parts.
    """
    model = Model()
    fasta, output = folder / "in.fasta", folder / f"{number}.h5"
    write_fasta(fasta, random_proteins([10] * number) if one_shard else ["MKTLLAGVSE"] * number)
    layers = tuple(range(6)) if one_shard else (-1,)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(ESM2, "from_checkpoint", lambda *call: model)
        patches.setattr(planning, "build_index", functools.partial(build_index, chunk_size=1 << 18))
        if one_shard:
            patches.setitem(cut.FLOPS_PER_SHARD, "cpu", 1e30)
        else:
            patches.setattr(cut, "MAX_SHARD_RECORDS", 4096)  # so that even the shortest input is many shards
        request = EmbedRequest(
            (str(fasta),),
            output,
            model="demo",
            device="cpu",
            threads=1,
            kinds=(kind,),
            layers=layers,
            parts=parts,
            keep_run=True,
        )
        embed_files(request, Console(quiet=True))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if one_shard else model.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("numbers", type=int, nargs="+")
    parser.add_argument("--one-shard", action="store_true")
    parser.add_argument("--kind", default="mean")
    parser.add_argument("--parts", action="store_true", default=None)
    options = parser.parse_args()
    for number in options.numbers:
        print(peak(options.folder, number, options.one_shard, options.kind, options.parts))


if __name__ == "__main__":
    main()
