"""Compile every launch for GPUs that are not here, and say what each kernel needs of them.

python tests/support/offline_compile.py --full --table tests/kernels/compile_table.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from stub_driver import StubDriver
from triton.runtime.driver import driver

from esm_packed.config import ESM2_MODELS, ESM2Config
from esm_packed.kernels import dispatch, launch
from esm_packed.kernels.cases import ALL_DTYPES, CASES, FLOAT16, FLOAT32, Arguments, Case, Shape, Workload

CAPABILITIES = (75, 80, 86, 89, 90, 100)
COUNTED = ("80", "90")
"""For these the table holds instructions."""
LENGTHS = [100, 133]


@dataclass(frozen=True)
class HeadShape:
    """The language-model head, whose GELU is as wide as the residual stream."""

    config: ESM2Config
    hidden_size = num_heads = head_dim = 0

    @property
    def ffn_size(self) -> int:
        return self.config.hidden_size


def calls(config: ESM2Config, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Case, Arguments]]:
    """Every launch of a forward pass, in the combinations of dtypes the model may use, and its name."""
    launches: list[tuple[Case, Shape]] = [(case, config) for case in CASES.values() if not case.chooses]
    launches.append((CASES["bias_gelu_"], HeadShape(config)))
    for case, shape in launches:
        workload = Workload(shape, LENGTHS, torch.device("cpu"))
        for dtype in case.dtypes:
            if dtype not in dtypes:
                continue
            for residual_dtype in {dtype, FLOAT32} if case.streams else (dtype,):
                name = launch.settings_key(case.name, getattr(shape, case.size), dtype)
                if case.streams:
                    name += f"+{launch.dtype_name(residual_dtype)}"
                yield name, case, case.arguments(workload, dtype, residual_dtype)


def is_chosen(case: Case, name: str, full: bool, only: tuple[str, ...]) -> bool:
    if only:
        return case.name in only
    return full or case.num_flops is not None or "float16" in name


def compile_all(
    capabilities: tuple[int, ...], full: bool, only: tuple[str, ...] = ()
) -> dict[str, dict[str, dict[str, Any]]]:
    """Case to capability to what `stub_driver.resources` found.

    Args:
        capabilities: compute capabilities, 90 for sm_90.
        full: all models and dtypes, else 650M in FP16, and in FP32 the kernels that memory does not limit.
        only: kernels to compile, those in FP32 too.
    """
    models = list(ESM2_MODELS.values()) if full else [ESM2_MODELS["esm2_t33_650M_UR50D"]]
    dtypes = ALL_DTYPES if full else (FLOAT16, FLOAT32)
    dispatch.TRITON_DEVICES = {"cpu"}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for capability in capabilities:
        stub = StubDriver(capability)
        driver.set_active(stub)
        launch.capability = lambda device, capability=capability: capability  # type: ignore[assignment]
        launch.num_multiprocessors = lambda device: 132  # type: ignore[assignment]
        for config in models:
            for name, case, arguments in calls(config, dtypes):
                if capability < case.since or not is_chosen(case, name, full, only):
                    continue
                if any(str(capability) in found.get(key, {}) for key in (name, f"{name}/0")):
                    continue
                before = len(stub.compiled)
                case.function(**arguments)
                compiled = stub.compiled[before:]
                for index, needs in enumerate(compiled):
                    key = f"{name}/{index}" if len(compiled) > 1 else name
                    found.setdefault(key, {})[str(capability)] = needs
        print(f"sm_{capability}: {len(stub.compiled)} kernels", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--full", action="store_true", help="all models and dtypes")
    parser.add_argument("--only", nargs="+", default=(), help="kernels, such as rotary_qk_")
    parser.add_argument("--tuned", type=json.loads, default={}, help="settings by key, as JSON")
    parser.add_argument("--table", type=Path, help="record the results under this Triton's version")
    options = parser.parse_args()
    launch.tuned_settings(torch.device("cpu")).update(options.tuned)
    found = compile_all(tuple(options.capabilities), options.full, tuple(options.only))
    if options.table is None:
        json.dump({"triton": triton.__version__, "kernels": found}, sys.stdout)
        return
    table = json.loads(options.table.read_text()) if options.table.exists() else {}
    recorded = table.setdefault(triton.__version__, {})
    for name, entry in found.items():
        for quantity in ("registers", "int32_products", "instructions"):
            values = recorded.setdefault(name, {}).setdefault(quantity, {})
            values |= {
                capability: needs[quantity]
                for capability, needs in entry.items()
                if quantity != "instructions" or capability in COUNTED
            }
    lines = (
        f'"{version}": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
        + "\n}"
        for version, entries in sorted(table.items())
    )
    options.table.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
