"""A Triton driver without a GPU: launches on CPU tensors are really compiled for a target, then not run."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import CacheManager, get_cache_manager
from ttir import int32_products

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
"""Bytes of shared memory a program may use, by compute capability (CUDA C Programming Guide, table 'Compute
Capabilities', less the 1 KiB each block reserves from 8.0 on)."""

_MATRIX_UNIT = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _with_inner_loop(code: str) -> tuple[list[str], int, int]:
    """Operations of a disassembled kernel, and the first and the end of those of its inner loop.

    Of the loops that hold no other, the inner loop is the one that multiplies most, and the first of equals.
    """
    operations: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for label, operation in re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(\S.*)", code, re.MULTILINE):
        if label:
            labels[label] = len(operations)
            continue
        operations.append(operation)
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", operation)
        if target and labels.get(target[1], len(operations)) < len(operations) - 1:
            loops.append((labels[target[1]], len(operations)))
    innermost = [
        loop for loop in loops if not any(loop != o and loop[0] <= o[0] < o[1] <= loop[1] for o in loops)
    ]

    def products(loop: tuple[int, int]) -> tuple[int, int]:
        inside = " ".join(operations[slice(*loop)])
        return len(_MATRIX_UNIT.findall(inside)), len(re.findall(r"\bFFMA\b", inside))

    first, end = max(innermost, key=products, default=(len(operations), len(operations)))
    return operations, first, end


def instructions(code: str) -> list[int]:
    """Instructions of a disassembled kernel: all, those before its inner loop, and those of that loop."""
    operations, first, end = _with_inner_loop(code)
    return [len(operations), first, end - first]


def exponentials(code: str) -> list[int]:
    """Exponentials of the inner loop: all, and those behind an HGMMA and before the wait for it."""
    operations, first, end = _with_inner_loop(code)
    found = re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2)\b", "\n".join(operations[first:end]))
    in_flight, last = 0, next((event for event in reversed(found) if event != "MUFU.EX2"), "")
    for event in found:  # what one round leaves in flight is so in the next one
        if event != "MUFU.EX2":
            last = event
        elif last == "HGMMA":
            in_flight += 1
    return [found.count("MUFU.EX2"), in_flight]


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers, stack bytes, spills, global accesses by width in bits, instructions and matrix units."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", "--no-dataflow", file.name)
    registers, stack, local = (
        int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL")
    )
    widths: Counter[int] = Counter()
    for modifiers in re.findall(r"\b(?:LDG|STG|LDGSTS)\b((?:\.\w+)*)", code):
        sizes = [int(size) for size in re.findall(r"\.[USB]?(8|16|64|128|256)\b", modifiers)]
        widths[sizes[-1] if sizes else 32] += 1
    return {
        "registers": registers,
        "stack": stack + local,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "accesses": {str(width): widths[width] for width in sorted(widths)},
        "instructions": instructions(code),
        "exponentials": exponentials(code),
        "matrix_units": sorted(set(_MATRIX_UNIT.findall(code))),
    }


def cached_resources(cubin: bytes, cache: CacheManager) -> dict[str, Any]:
    """`resources`, kept beside the kernel: to disassemble it takes half a second."""
    name = f"resources-{hashlib.sha256(cubin + Path(__file__).read_bytes()).hexdigest()[:16]}.json"
    path = cache.get_file(name)
    if path is None:
        path = cache.put(json.dumps(resources(cubin)), name, binary=False)
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found


class _Utils:
    def __init__(self, driver: StubDriver) -> None:
        self.driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.driver.capability],
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        products = int32_products(self.driver.ttir)
        needs = cached_resources(kernel, self.driver.cache)
        found = {"kernel": name, "shared": shared, "int32_products": products, **needs}
        self.driver.compiled.append(found)
        return object(), 0, found["registers"], found["stack"] // 4, 1024

    def unload_module(self, module: object) -> None:
        pass


class StubDriver:
    """Compiles for `capability` (90 for sm_90); `compiled` collects what each new kernel needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: list[dict[str, Any]] = []
        self.launches: list[str] = []
        self.ttir = ""  # of the kernel that is being loaded
        self.cache: CacheManager  # and where Triton keeps what it is compiled to
        self.utils = _Utils(self)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.cache = get_cache_manager(metadata.hash)
        path = self.cache.get_file(f"{metadata.name}.ttir")
        assert path is not None
        self.ttir = Path(path).read_text()
        return lambda *arguments: self.launches.append(source.name)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a device of its own for each target: separate kernel caches

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu
