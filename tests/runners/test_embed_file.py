"""`esm_packed.embed_file`: the run of the command, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import run_python

import esm_packed
from esm_packed.errors import UserError
from esm_packed.runners.cli import main as cli

PROTEINS = {"a": "MKTAYIAKQR" * 8, "b": "GSHMSLFDFFKNKGS", "c": "MKTAYIAKQRG"}


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name} x\n{sequence}\n" for name, sequence in PROTEINS.items()))
    return path


def test_gives_what_the_command_gives(fasta: Path, tmp_path: Path) -> None:
    options = ["--model", "demo", "--device", "cpu", "--include", "mean,per_residue", "--layers", "2,5"]
    assert cli.main(["embed", str(fasta), "-o", str(tmp_path / "command.h5"), "--quiet", *options]) == 0
    with (
        esm_packed.embed_file(
            fasta,
            tmp_path / "python.h5",
            model="demo",
            device="cpu",
            include=["mean", "per_residue"],
            layers=[2, 5],
            progress=False,
        ) as found,
        esm_packed.open(tmp_path / "command.h5") as expected,
    ):
        assert list(found.ids) == list(PROTEINS)
        np.testing.assert_array_equal(found[:], expected[:])
        np.testing.assert_array_equal(found.per_residue("b", 2), expected.per_residue("b", 2))
        assert found.attributes["plan_hash"] == expected.attributes["plan_hash"]


def test_an_output_that_is_there_is_opened_and_another_run_is_refused(fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    with esm_packed.embed_file(str(fasta), str(output), model="demo", device="cpu", progress=False) as first:
        rows = first[:]
    with esm_packed.embed_file([fasta], output, model="demo", device="cpu", progress=False) as again:
        np.testing.assert_array_equal(again[:], rows)
    with pytest.raises(UserError, match="layers was"):
        esm_packed.embed_file(fasta, output, model="demo", device="cpu", layers=2, progress=False)


def test_options_have_the_types_of_python(fasta: Path, tmp_path: Path) -> None:
    """Paths as text, layers of NumPy."""
    options: dict[str, Any] = {
        "model": "demo",
        "device": "cpu",
        "layers": np.array([2, 5]),
        "progress": False,
    }
    with esm_packed.embed_file(fasta, tmp_path / "old.h5", **options) as old:
        rows = old[:]
    options["reuse"] = str(tmp_path / "old.h5")
    with esm_packed.embed_file(fasta, tmp_path / "new.h5", **options) as new:
        np.testing.assert_array_equal(new[:], rows)
        assert new.layers == [2, 5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 3}, TypeError, "no option 'layer'; choose from attention, "),
        ({"include": "means"}, ValueError, "'means' is not a kind of output; choose from mean, max"),
        ({"include": []}, ValueError, "at least one"),
        ({"store_dtype": "float16"}, ValueError, "store_dtype is 'float16'; choose from fp32, fp16"),
        ({"windows": (100, 60)}, ValueError, "at most half"),
        ({"windows": 100}, TypeError, "windows must be a pair, size and overlap"),
        ({"windows": (1, 0)}, ValueError, "at least 2 residues"),
        (
            {"windows": (100, 20), "max_length": 50},
            UserError,
            "--windows and --max-length cannot be combined",
        ),
        ({"max_length": -1}, ValueError, "negative"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"layers": "2"}, TypeError, "'str' object cannot be interpreted as an integer"),
        ({"invalid": "drop"}, ValueError, "invalid must be one of"),
        ({"windows": (100, 20), "include": "max"}, UserError, "--windows with --include max"),
        ({"layers": 9}, UserError, "layer"),
    ],
)
def test_mistakes_say_what_there_is(
    fasta: Path, tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    call = {"model": "demo", "device": "cpu", "progress": False} | options
    with pytest.raises(error, match=message):
        esm_packed.embed_file(fasta, tmp_path / "out.h5", **call)  # type: ignore[arg-type]
    assert not (tmp_path / "out.h5").exists()


def test_progress_in_a_notebook_is_a_bar(fasta: Path, tmp_path: Path) -> None:
    """As an ipykernel has no terminal; tqdm chooses the widget, or a bar of text where there are none."""
    program = f"""
import sys, types
sys.modules["ipykernel"] = types.ModuleType("ipykernel")
import esm_packed
with esm_packed.embed_file({str(fasta)!r}, {str(tmp_path / "out.h5")!r}, model="demo", device="cpu") as found:
    print(len(found))
"""
    run = run_python(program)
    assert (run.returncode, run.stdout) == (0, "3\n"), run.stderr
    assert "embedding:" in run.stderr and "res" in run.stderr
