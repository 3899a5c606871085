"""What the compiler makes of every kernel for GPUs that are not here: no spills, wide accesses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from programs import run_python
from stub_driver import SHARED_MEMORY, exponentials, instructions

from esm_packed.kernels import attention, gemm, qkv
from esm_packed.kernels.cases import CASES
from esm_packed.kernels.launch import Settings

# A minute of compilation, which on a busy machine takes many.
pytestmark = pytest.mark.timeout(1800)

SUPPORT = Path(__file__).parents[1] / "support"
TABLE = Path(__file__).with_name("compile_table.json")
REGISTER_MARGIN = 8
INSTRUCTION_MARGIN = 1.03
PARTS = ("in all", "before its inner loop", "in its inner loop")


def without_interpreter(cache: Path, script: Path, *arguments: str) -> dict[str, Any]:
    """What `script` prints, in a process of its own: this one may interpret its kernels."""
    environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    done = run_python(script, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compile_offline(cache: Path, *arguments: str) -> dict[str, Any]:
    return without_interpreter(cache, SUPPORT / "offline_compile.py", *arguments)


def gpus_that_run(kernel: str) -> set[str]:
    """Before sm_80 attention is SDPA's, and the fused matrix product is not chosen."""
    since = CASES[kernel.split("/")[0]].since
    return {str(capability) for capability in SHARED_MEMORY if capability >= since}


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
            limit = recorded[name]["registers"][capability] + REGISTER_MARGIN
            if needs["registers"] > limit:
                found.append(f"{kernel}: {needs['registers']} registers, at most {limit} expected")
            counted = recorded[name]["instructions"].get(capability, [])
            for part, count, most in zip(PARTS, needs["instructions"], counted, strict=False):
                if count > INSTRUCTION_MARGIN * most:
                    found.append(f"{kernel}: {count} instructions {part}, {most} expected")
            products = recorded[name]["int32_products"][capability]
            if needs["int32_products"] > products:
                found.append(
                    f"{kernel}: {needs['int32_products']} 32-bit products go into addresses, not {products}"
                )
            by_tma = name.startswith("gemm_bias") and int(capability) >= 90
            if not by_tma and not {"128", "256"} & needs["accesses"].keys():
                found.append(f"{kernel}: no 128-bit access, only {needs['accesses']}")
            # A bias, or one flag a sequence. A lost alignment shows as one narrow access for each element.
            narrow = needs["accesses"].get("16", 0) + needs["accesses"].get("8", 0)
            if narrow > 2:
                found.append(f"{kernel}: {narrow} accesses of 8 or 16 bits")
    return found


def test_exponentials_between_a_product_and_its_wait_are_counted() -> None:
    lines = ["HGMMA.64x64x16.F32 R24, R4", "MUFU.EX2 R1, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    lines += ["MUFU.EX2 R2, R2", "MUFU.EX2 R3, R3", "@P0 BRA `(.L_x_0)"]

    def code(lines: list[str]) -> str:
        return ".L_x_0:\n" + "".join(f"        /*{n:04x}*/  {line} ;\n" for n, line in enumerate(lines))

    assert exponentials(code(lines)) == [3, 1]
    assert exponentials(code([*lines[1:5], lines[0], lines[5]])) == [3, 1]  # in flight into the next round
    assert exponentials(code(lines[1:])) == [3, 0]


def test_instructions_of_the_inner_loop_that_multiplies_are_counted() -> None:
    code = """
        /*0000*/                   MOV R1, 0x1 ;
.L_x_0:
        /*0010*/                   FFMA R2, R2, R2, R1 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   MOV R1, 0x2 ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3) ;
"""
    assert instructions(code) == [10, 4, 3]
    assert instructions(code[: code.index(".L_x_0:")]) == [1, 1, 0]


@pytest.mark.parametrize("candidates", [gemm.CANDIDATES, qkv.CANDIDATES], ids=["gelu", "rotary"])
def test_candidates_of_fused_products_fit_into_shared_memory_of_sm_90(candidates: list[Settings]) -> None:
    """Two operands of each stage and the tile on its way out, and 1 KiB for barriers."""
    for c in candidates:
        stages = c["num_stages"] * (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * 2
        needed = stages + c["BLOCK_M"] * c["BLOCK_N"] // c.get("NUM_STORES", 1) * 2 + 1024
        # A multiprocessor has 228 KiB, of which each program takes 1 KiB more than it asks for.
        assert c["PROGRAMS"] * (needed + 1024) <= 228 * 1024 + 1024, c
        assert needed <= SHARED_MEMORY[90], c


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    """Triton's, kept: it knows what a kernel is compiled from, and what did not change takes no time."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("triton")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> dict[str, Any]:
    """650M in FP16, and in FP32 the kernels that memory does not limit, for sm_90."""
    return compile_offline(cache, "--capabilities", "90")


def test_kernels_compile_well(compiled: dict[str, Any]) -> None:
    assert {name.split("/")[0] for name in compiled["kernels"]} == set(CASES) - {
        case.name for case in CASES.values() if case.chooses
    }
    for name, entry in compiled["kernels"].items():
        assert entry.keys() == {"90"}, name
    assert complaints(compiled) == []


def test_matrix_units_are_used(compiled: dict[str, Any]) -> None:
    """Half types and TF32 run on tensor cores; genuine FP32 must not."""
    kernels = compiled["kernels"]
    for name in (
        "packed_attention/64/float16",
        "packed_attention_tf32/64/float32",
        "gemm_bias_gelu/1280/float16",
        "gemm_bias_rotary/1280/float16",
    ):
        assert kernels[name]["90"]["matrix_units"] == ["HGMMA"], name
    assert kernels["packed_attention_tf32x3/64/float32"]["90"]["matrix_units"] == ["HMMA"]
    assert kernels["packed_attention/64/float32"]["90"]["matrix_units"] == []


def test_overlapped_attention_multiplies_during_the_exponentials(cache: Path) -> None:
    """In program order products come first; ptxas could still move them, or let each wait."""
    key = "packed_attention/64/float16"
    tuned = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "OVERLAP": 1}
    assert tuned in attention.candidates(torch.float16, "ieee")
    chosen = ["--only", "packed_attention", "--tuned", json.dumps({key: tuned})]
    needs = compile_offline(cache, "--capabilities", "90", *chosen)["kernels"][key]["90"]
    assert needs["exponentials"] == [66, 66]  # 64 weights and two corrections of a thread
    assert needs["spills"] == needs["stack"] == 0


def test_products_in_32_bits_that_go_into_addresses_are_counted(cache: Path) -> None:
    assert without_interpreter(cache, SUPPORT / "offset_kernels.py") == {
        "in_int64": 0,
        "in_int32": 1,
        "extended_too_late": 1,
        "of_loaded_ids": 1,
        "in_a_loop": 2,
        "in_a_branch": 1,
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernels_compile_well_for_every_gpu_model_and_dtype(tmp_path: Path) -> None:
    compiled = compile_offline(tmp_path, "--full")
    for name, entry in compiled["kernels"].items():
        assert entry.keys() == gpus_that_run(name), name
    assert complaints(compiled) == []
