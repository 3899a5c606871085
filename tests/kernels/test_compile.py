"""What the compiler makes of every kernel for GPUs that are not here: no spills, wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from stub_driver import SHARED_MEMORY

SUPPORT = Path(__file__).parents[1] / "support"
TABLE = Path(__file__).with_name("compile_table.json")
REGISTER_MARGIN = 8


def compile_offline(cache: Path, *arguments: str) -> dict[str, Any]:
    """Run `offline_compile.py` in a process of its own: this one may interpret its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "offline_compile.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def complaints(compiled: dict[str, Any]) -> list[str]:
    """Everything a kernel does that it should not."""
    table = json.loads(TABLE.read_text())
    assert compiled["triton"] in table, f"no registers are recorded for Triton {compiled['triton']}"
    recorded = table[compiled["triton"]]
    found = []
    for name, entry in compiled["kernels"].items():
        for capability, needs in entry.items():
            kernel = f"{name} on sm_{capability}"
            if needs["spills"] or needs["stack"]:
                found.append(f"{kernel}: {needs['spills']} spills, {needs['stack']} bytes of stack")
            if needs["shared"] > SHARED_MEMORY[int(capability)]:
                found.append(f"{kernel}: {needs['shared']} bytes of shared memory")
            limit = recorded[name][capability] + REGISTER_MARGIN
            if needs["registers"] > limit:
                found.append(f"{kernel}: {needs['registers']} registers, at most {limit} expected")
            by_tma = name.startswith("gemm_bias_gelu") and int(capability) >= 90
            if not by_tma and not {"128", "256"} & needs["accesses"].keys():
                found.append(f"{kernel}: no 128-bit access, only {needs['accesses']}")
            # A bias, or one flag a sequence. A lost alignment shows as one narrow access for each element.
            narrow = needs["accesses"].get("16", 0) + needs["accesses"].get("8", 0)
            if narrow > 2:
                found.append(f"{kernel}: {narrow} accesses of 8 or 16 bits")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All kernels at the size of ESM-2 650M, FP16 and FP32, for sm_80 and sm_90."""
    return compile_offline(tmp_path_factory.mktemp("cache"), "--capabilities", "80", "90")


def test_kernels_compile_well(compiled: dict[str, Any]) -> None:
    assert len(compiled["kernels"]) > 20
    assert all(entry.keys() == {"80", "90"} for entry in compiled["kernels"].values())
    assert complaints(compiled) == []


def test_matrix_units_are_used(compiled: dict[str, Any]) -> None:
    """Half types and TF32 run on tensor cores; genuine FP32 must not."""
    kernels = compiled["kernels"]
    for name in ("packed_attention/64/float16", "packed_attention/64/tf32", "gemm_bias_gelu/1280/float16"):
        assert kernels[name]["90"]["matrix_units"] == ["HGMMA"], name
    assert kernels["packed_attention/64/tf32x3"]["90"]["matrix_units"] == ["HMMA"]
    assert kernels["packed_attention/64/ieee"]["90"]["matrix_units"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernels_compile_well_for_every_gpu_model_and_dtype(tmp_path: Path) -> None:
    compiled = compile_offline(tmp_path, "--full")
    assert all(
        entry.keys() == {str(capability) for capability in SHARED_MEMORY}
        for entry in compiled["kernels"].values()
    )
    assert complaints(compiled) == []
