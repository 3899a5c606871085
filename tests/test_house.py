"""The layout of the repository: imports point downward, and the kernels need nothing else of ours."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_python

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "esm_packed", "reports", "runners", "benchmarks"]
"""From the ground up; a folder imports only from itself and from those before it."""

RUNNER_ROOMS = ["system", "input", "state", "watch", "output", "compute", "exports", "session", "cli"]
"""Folders of `runners/` from the ground up; `session` stands for the files beside them."""

ENTRY_POINTS = {ROOT / "esm_packed" / name for name in ("__main__.py", "__init__.py")}
"""`python -m esm_packed` and what `esm_packed` offers hand over to any floor, when they are asked for it."""


def folder_of(module: str) -> str | None:
    """The folder that holds `module`, None when it is not ours."""
    parts = module.split(".")
    if parts[0] == "esm_packed":
        return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "esm_packed"
    return parts[0] if parts[0] in FLOORS else None


def imports_of(path: Path) -> set[str]:
    """Absolute names of all modules a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_downwards(floor: str) -> None:
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    for path in (ROOT / floor).rglob("*.py"):
        if path in ENTRY_POINTS:
            continue
        for module in imports_of(path):
            folder = folder_of(module)
            assert folder is None or folder in allowed, f"{path.relative_to(ROOT)} imports {module}"


def room_of(path: Path) -> str:
    """The folder in `runners/` that holds `path`."""
    inside = path.relative_to(ROOT / "runners").parts
    return inside[0] if len(inside) > 1 else "session"


def test_rooms_of_the_runners_import_downwards() -> None:
    for path in (ROOT / "runners").rglob("*.py"):
        allowed = RUNNER_ROOMS[: RUNNER_ROOMS.index(room_of(path)) + 1]
        for module in imports_of(path):
            parts = module.split(".")
            if parts[:2] == ["esm_packed", "runners"] and len(parts) > 2:
                room = parts[2] if parts[2] in RUNNER_ROOMS else "session"
                assert room in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_model_file_does_no_input_or_output() -> None:
    source = (ROOT / "esm_packed" / "model.py").read_text()
    imported = {module.split(".")[0] for module in imports_of(ROOT / "esm_packed" / "model.py")}
    assert not imported & {"argparse", "time", "sys", "logging"}
    assert not re.search(r"\bprint\(|\bopen\(", source)


def test_kernels_import_alone() -> None:
    """In a fresh process, `esm_packed.kernels` pulls in none of the model's modules."""
    code = (
        "import sys, esm_packed.kernels\n"
        "print(*(name for name in sys.modules if name.startswith('esm_packed.') and 'kernels' not in name))"
    )
    done = run_python(code)
    assert done.stdout.split() == ["esm_packed.version"]


def test_the_package_imports_nothing_until_it_is_used() -> None:
    """In a fresh process; what reads an output needs no torch."""
    code = (
        "import sys, esm_packed\n"
        "print(*(name for name in sys.modules if name.startswith('esm_packed.')))\n"
        "esm_packed.open, esm_packed.read_fasta\n"
        "print('torch' in sys.modules)\n"
        "print(*(name for name in esm_packed.__all__ if getattr(esm_packed, name) is None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines() == ["esm_packed.version", "False", ""]
