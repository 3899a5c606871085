"""What pages and messages tell to install can be installed from a clone, and brings what it is for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from esm_packed.runners.cli.options import build_parser

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("extra", ["bench", "test"])
def test_pytest_gets_the_plugins_it_is_configured_for(extra: str) -> None:
    """`timeout` in the configuration is of pytest-timeout: without it every run begins with a warning."""
    assert "timeout" in PROJECT["tool"]["pytest"]["ini_options"]
    assert names(EXTRAS[extra]) >= {"pytest", "pytest-benchmark", "pytest-timeout"}


FOLDERS = ("esm_packed", "kernels", "runners", "reports", "benchmarks", "docs")
FILES = [
    *ROOT.glob("*.md"),
    *(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md")),
]


def test_no_command_installs_a_release_that_does_not_exist() -> None:
    """Before there is one, `pip install 'esm-packed[...]'` fails."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in FILES
        for line in path.read_text().splitlines()
        if re.search(r"pip install \S*esm-packed", line)
    ]
    assert not found


def test_extras_that_pages_install_exist() -> None:
    text = "\n".join(path.read_text() for path in FILES if path.suffix == ".md")
    installed = [
        extra for group in re.findall(r"pip install -e '\.\[([a-z,]+)\]'", text) for extra in group.split(",")
    ]
    assert {"bench", "ray", "report"} <= set(installed) <= EXTRAS.keys()


@pytest.mark.parametrize(
    ("command", "option", "dtypes"),
    [
        ("embed", "--dtype", ("fp64", "fp32", "tf32", "fp16", "bf16")),
        ("validate", "--dtype", ("fp64", "fp32", "tf32", "fp16", "bf16")),
        ("validate", "--threshold", ("fp64", "fp32", "tf32", "fp16", "bf16")),
        ("tune", "--dtype", ("fp32", "tf32", "fp16", "bf16")),
    ],
)
def test_help_lists_every_dtype(
    command: str, option: str, dtypes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    entry = re.split(r"\n  -", capsys.readouterr().out.partition(f"\n  {option} ")[2])[0]
    assert all(dtype in entry for dtype in dtypes), entry
