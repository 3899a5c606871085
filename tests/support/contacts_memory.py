"""Prints the bytes that one call for one protein takes at the peak beyond the weights, and the seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from loading_memory import status
from proteins import random_proteins

from esm_packed import ESM2


def main(name: str, call: str, length: str) -> None:
    torch.set_num_threads(1)
    model = ESM2.from_pretrained(name, dtype="fp32", device="cpu")
    compute = {"embed": lambda sequence: model.embed([sequence]), "contacts": model.predict_contacts}[call]
    (sequence,) = random_proteins([int(length)])
    compute(sequence[:100])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status("VmRSS")
    start = time.perf_counter()
    compute(sequence)
    seconds = time.perf_counter() - start
    print(status("VmHWM") - before, f"{seconds:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
