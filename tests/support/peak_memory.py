"""Prints the peak of anonymous memory, in kB, of runs with so many records in small shards and no model.

Usage: peak_memory.py FOLDER NUMBER...
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import pytest
import torch

from esm_packed.config import ESM2Config
from esm_packed.model import ESM2
from esm_packed.numerics import PRECISIONS
from esm_packed.packing import PackedBatch
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

    def embed_packed(self, batch: PackedBatch, layers: list[int]) -> dict[int, torch.Tensor]:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found
        self.peak = max(self.peak, int(found[1]))
        return {layer: torch.ones(batch.num_sequences, 96) for layer in layers}


def main(folder: Path, numbers: list[int]) -> None:
    patches = pytest.MonkeyPatch()
    patches.setattr(cut, "MAX_SHARD_RECORDS", 4096)  # so that even the shortest input is many shards
    patches.setattr(planning, "build_index", functools.partial(build_index, chunk_size=1 << 18))
    for number in numbers:
        model = Model()
        patches.setattr(ESM2, "from_checkpoint", lambda *call, model=model: model)
        fasta = folder / "in.fasta"
        with fasta.open("w") as file:
            file.writelines(f">protein{record}\nMKTLLAGVSE\n" for record in range(number))
        request = EmbedRequest((str(fasta),), folder / "out.h5", model="demo", device="cpu", overwrite=True)
        embed_files(request, Console(quiet=True))
        print(model.peak)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
