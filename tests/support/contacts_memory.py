"""Prints the bytes that each call for one protein takes at the peak beyond the weights."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
from loading_memory import status
from proteins import random_proteins

from esm_packed import ESM2


def main(name: str, length: str, *calls: str) -> None:
    torch.set_num_threads(1)
    model = ESM2.from_pretrained(name, dtype="fp32", device="cpu")
    functions = {"embed": lambda sequence: model.embed([sequence]), "contacts": model.predict_contacts}
    (sequence,) = random_proteins([int(length)])
    for call in calls:
        functions[call](sequence[:100])
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier call has left
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status("VmRSS")
        functions[call](sequence)
        print(status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
