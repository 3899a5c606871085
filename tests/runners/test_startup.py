"""What commands import: only what they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from esm_packed.version import __version__

FASTA = ">a first\nMKTLLAGVSE\n>b second\nMKVLA\n"


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=folder
    )


@pytest.mark.parametrize(
    ("arguments", "code", "stdout"),
    [
        (["--version"], 0, __version__),
        (["--help"], 0, "exit codes"),
        (["embed", "--help"], 0, "examples"),
        (["extract", "--help"], 0, "esm-extract"),
        (["checkpoint", "--help"], 0, "fair-esm"),
        (["merge", "--help"], 0, "OUT.h5.run"),
        (["report", "speedup", "--help"], 0, "OLDER.json"),
        (["validate", "--help"], 0, "examples"),
        ([], 2, ""),
        (["embed", "x.fasta", "-o", "y.h5", "--layers", "last"], 2, ""),
    ],
)
def test_help_and_wrong_options_import_no_torch(
    arguments: list[str], code: int, stdout: str, tmp_path: Path
) -> None:
    program = (
        "import sys; from esm_packed.runners.cli.main import main; code = main(); "
        "assert not {'torch', 'h5py', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = run(tmp_path, program, *arguments)
    assert done.returncode == code, done.stderr
    assert stdout in done.stdout


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with `out.h5` and its run directory, and what the process that wrote them printed."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "in.fasta").write_text(FASTA)
    program = """
import gc, sys
from esm_packed.runners.cli.main import main
assert main() == 0
print(*sorted(sys.modules.keys() & {
    "IPython", "anndata", "matplotlib", "numpy.random", "pandas", "pyarrow", "ray", "scipy", "sklearn",
    "sympy", "torch._dynamo", "torch._inductor", "transformers", "triton",
}))
print("torch" in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    options = ["--model", "demo", "--device", "cpu", "--threads", "1", "--keep-run", "--quiet"]
    done = run(folder, program, "embed", "in.fasta", "-o", "out.h5", *options)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.splitlines()


def test_embedding_imports_no_compiler_and_no_optional_package(embedded: tuple[Path, list[str]]) -> None:
    """Torch's compiler takes a second or more to import; interrupted, that ends in errors of its own."""
    assert embedded[1][0] == ""


def test_what_is_imported_is_left_out_of_garbage_collections(embedded: tuple[Path, list[str]]) -> None:
    assert embedded[1][1] == "True True True"


def test_reading_an_output_imports_no_torch(embedded: tuple[Path, list[str]]) -> None:
    program = """
import sys
import esm_packed.runners.mapping
from esm_packed.runners.cli.main import main
assert main(["status", "out.h5"]) == main(["info", "out.h5"]) == main(["info", "in.fasta"]) == 0
assert main(["export", "out.h5", "--to", "npz", "-o", "out.npz"]) == 0
print("torch" in sys.modules)
"""
    done = run(embedded[0], program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
