"""Compile candidates as `esm-packed tune` does ahead of its search, then launch them on full inputs.

Prints as JSON what was launched meanwhile, and how many kernels were compiled by each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
from stub_driver import StubDriver
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from esm_packed.config import ESM2Config
from esm_packed.kernels import dispatch, launch
from esm_packed.numerics import PRECISIONS
from esm_packed.runners import tuning_compilation
from esm_packed.runners.tuning_problems import problems

CPU = torch.device("cpu")
CONFIG = ESM2Config(num_layers=1, hidden_size=64, num_heads=2)
KERNELS = ("packed_attention", "gemm_bias_gelu", "add_layer_norm_", "bias_gelu_", "add_attention_maps_")


def num_compiled() -> int:
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))


def main() -> None:
    dispatch.TRITON_DEVICES = {"cpu"}
    stub = StubDriver(90)
    driver.set_active(stub)
    launch.capability = lambda device: 90  # type: ignore[assignment]
    launch.num_multiprocessors = lambda device: 132  # type: ignore[assignment]
    tokens, precisions = 4096, [PRECISIONS["fp16"]]
    run = JITFunction.run
    tuning_compilation.begin([CONFIG], precisions, tokens, CPU)
    work = problems([CONFIG], precisions, tokens, CPU)
    chosen = [number for number, problem in enumerate(work) if problem.case.name in KERNELS]
    could = [tuning_compilation.compile_candidate(number, 0, CPU) for number in chosen]
    ahead, launched = num_compiled(), len(stub.launches)

    JITFunction.run = run
    tuned = launch.tuned_settings(CPU)
    tuned.clear()
    for number in chosen:
        tuned[work[number].key] = work[number].candidates[0]
        work[number].case.function(**work[number].arguments())
    found = {"could": could, "ahead": ahead, "launched_ahead": launched, "later": num_compiled() - ahead}
    print(json.dumps(found | {"launched": len(stub.launches)}))


if __name__ == "__main__":
    main()
