"""Memory that loading a checkpoint takes, measured in a process of its own."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import threading
from pathlib import Path

import torch
from programs import run_python

from esm_packed import ESM2
from esm_packed.checkpoints import CheckpointError, load_checkpoint

M_MMAP_THRESHOLD = -3  # of malloc.h


def measured(command: str, *arguments: str | Path) -> list[str]:
    """The lines that a command of this file prints."""
    done = run_python(Path(__file__), command, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def status(field: str) -> int:
    """Bytes of this process, as /proc/self/status has them."""
    found = re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[0]) * 1024


def of_model(path: str, dtype: str) -> None:
    """Bytes at the peak beyond those before, and bytes of the model's parameters."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is given back at once
    ESM2.from_pretrained("demo", device="cpu")
    before = peak = status("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = ESM2.from_pretrained(path, dtype=dtype, device="cpu")
    done.set()
    watcher.join()
    peak = max(peak, status("RssAnon"))
    print(peak - before, sum(p.numel() * p.element_size() for p in model.parameters()))


def of_reading(*paths: str) -> None:
    """For each file the anonymous and file-backed bytes that reading all tensors adds, and their sum."""
    torch.ones(10).sum()
    for path in paths:
        anonymous, file_backed, peak = status("RssAnon"), status("RssFile"), 0
        checkpoint = load_checkpoint(path)
        total = 0.0
        for tensor in checkpoint.tensors.values():
            total += tensor.sum().item()
            peak = max(peak, status("RssAnon") - anonymous)
        print(peak, status("RssFile") - file_backed, total)
        del checkpoint, tensor


def in_20_megabytes(*paths: str) -> None:
    """Why each file cannot be loaded."""
    load_checkpoint("demo")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 20_000_000, resource.RLIM_INFINITY))
    for path in paths:
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            print(error)


def of_refusal(path: str) -> None:
    """Why the file cannot be loaded, and bytes at the peak beyond those before."""
    before = status("VmHWM")
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        print(error)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
