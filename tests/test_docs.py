"""Every command and code example of the README and of `docs/` runs, or says why it cannot.

A fenced block behind the comment `not run: REASON` is left out; one behind `needs: PACKAGES` runs where these
are installed. The blocks of a page run in order in one folder, with small proteins, and the 650M model is a
tiny one of 33 layers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from esm_packed import read_fasta
from esm_packed.checkpoints import save_fair_esm
from esm_packed.config import DEFAULT_MODEL, ESM2Config
from esm_packed.runners.cli.main import main
from esm_packed.stress import stress_checkpoint

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "reports" / "published"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if not page.is_symlink()),
]
SLOW = {"precision.md": "validate takes 6 s"}
RUN = ("sh", "python")
NOT_RUN = ("r", "text", "bibtex")
REASON = re.compile(r"<!-- (not run|needs): (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        where: page and line.
        language: of the fence.
        code: its lines.
        reason: why it is not run; empty if it is.
        needs: packages without which it is not run.
    """

    where: str
    language: str
    code: str
    reason: str
    needs: tuple[str, ...]


def blocks_of(page: Path) -> Iterator[Block]:
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    before = ""
    for number, line in lines:
        if line.startswith("```"):
            code = []
            for _, inside in lines:
                if inside == "```":
                    break
                code.append(inside)
            word, text = found.groups() if (found := REASON.fullmatch(before)) else ("", "")
            yield Block(
                f"{page.name}:{number}",
                line.removeprefix("```"),
                "\n".join(code) + "\n",
                text if word == "not run" else "",
                tuple(text.split(", ")) if word == "needs" else (),
            )
        before = line


def commands_of(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of torch.hub in which a tiny model has the default's name."""
    folder = tmp_path_factory.mktemp("torch")
    path = folder / "hub" / "checkpoints" / f"{DEFAULT_MODEL}.pt"
    path.parent.mkdir(parents=True)
    save_fair_esm(stress_checkpoint(ESM2Config(33, 32, 2)), path)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the blocks of a page run."""
    monkeypatch.setenv("TORCH_HOME", str(models))
    monkeypatch.setattr("esm_packed.checkpoints.download.OFFICIAL_FILES", {})
    proteins = dict(read_fasta(ROOT / "examples" / "proteins.fasta"))
    short = {
        name: proteins[name][:60] for name in ("P01308", "P69905", "P99999", "P62987") if name in proteins
    }
    (tmp_path / "proteins.fasta").write_text("".join(f">{name} x\n{text}\n" for name, text in short.items()))
    (tmp_path / "protein.fasta").write_text(f">P01308\n{proteins['P01308'][:20]}\n")
    (tmp_path / "mutants.csv").write_text("mutant,measured\nA2G,0.5\nA2G:L3V,0.1\n")
    (tmp_path / "more.fasta").write_text(f">more\n{proteins['P62805'][:40]}\n")
    (tmp_path / "proteins.tsv").write_text("id\tfamily\n" + "".join(f"{name}\tglobin\n" for name in short))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in PAGES],
)
def test_examples_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    if page.name in ("README.md", "citing.md"):
        assert main(["embed", "proteins.fasta", "-o", "proteins.h5", "--model", "demo", "--quiet"]) == 0
    for block in blocks_of(page):
        missing = [name for name in block.needs if importlib.util.find_spec(name) is None]
        if block.reason or missing or block.language not in RUN:
            continue
        if block.language == "python":
            exec(compile(block.code, block.where, "exec"), namespace)
            continue
        for program, *words in commands_of(block.code):
            assert program == "esm-packed", f"{block.where}: {program} cannot run here; say why"
            code = main(words)
            assert code == 0, f"{block.where}: {shlex.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_are_closed_and_known(page: Path) -> None:
    assert sum(line.startswith("```") for line in page.read_text().splitlines()) % 2 == 0
    assert {block.language for block in blocks_of(page)} <= {*RUN, *NOT_RUN}


@pytest.mark.parametrize("name", ["precision.md", "equality.md"])
def test_errors_of_mistakes_are_the_published_ones(name: str) -> None:
    published = json.loads((PUBLISHED / "cpu-amd-epyc-2-cores" / "mistakes.json").read_text())
    rows = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("|")]
    for mistake, errors in published["mistakes_in_fp32"].items():
        shown = f"{errors['worst_relative_l2']:.1e}".replace("e-0", "e-")
        assert sum(f"| {shown} |" in row for row in rows) == 1, f"{mistake}: {shown}"


SPEED = PUBLISHED / "cpu-amd-epyc-2-cores" / "speedup.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_speed_ratios_are_published(page: Path) -> None:
    published = SPEED.read_text() + (PUBLISHED / "README.md").read_text()
    quoted = set(re.findall(r"\b\d+\.\d\d?x", page.read_text()))
    assert {ratio for ratio in quoted if ratio not in published} == set()


def run_script(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "examples" / name
    monkeypatch.setattr("sys.argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")


def test_embed_and_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = str(ROOT / "examples" / "locations.tsv")
    run_script("embed_and_look.py", "proteins.fasta", "--table", table, monkeypatch=monkeypatch)
    assert Path("map.png").stat().st_size > 10_000
    assert Path("map.h5").is_file()


def test_variant_scan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("variant_scan.py", "proteins.fasta", "P01308", monkeypatch=monkeypatch)
    assert Path("scan.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[0] == "scan.png: 1,200 scores"


def test_classify_scores_held_out_proteins(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four proteins in two classes each is predicted by a model that has seen a class twice at most."""
    pytest.importorskip("sklearn")
    Path("classes.tsv").write_text("id\tclass\nP01308\ta\nP69905\tb\nP99999\tb\nP62987\ta\n")
    run_script("classify.py", "proteins.fasta", "classes.tsv", monkeypatch=monkeypatch)
    *_, frequencies, most_frequent = capsys.readouterr().out.splitlines()
    assert most_frequent.split()[-2:] == ["50.0%", "50.0%"]
    assert frequencies.split()[-2] in {"0.0%", "25.0%", "50.0%", "75.0%", "100.0%"}


def test_the_slurm_script_makes_the_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call, taken down by a program of the same name, in the environment of an array of two."""
    stub = folder / "bin" / "esm-packed"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > call.txt\n')
    stub.chmod(0o755)
    script = ROOT / "examples" / "embed.sbatch"
    words = [str(script), "proteins.fasta", "slurm.h5", "--model", "demo"]
    subprocess.run(words, check=True, env=os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"})
    call = Path("call.txt").read_text().splitlines()
    for task in ("0", "1"):
        for name, value in {"ID": task, "MIN": "0", "MAX": "1", "STEP": "1", "COUNT": "2"}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        assert main(call) == 0
    assert Path("slurm.h5").is_file()
