"""Options of the CPU comparison, order of its rounds, what is recorded of the machine, and the summary."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_peers_summary import RECORDS, summary_lines

REPOSITORY = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("esm-packed benchmarks")
    fasta = REPOSITORY.parent / "shared/data/mycoplasma_genitalium.fasta"
    group.addoption("--fasta", type=Path, default=fasta, help="proteins to embed (default: %(default)s)")
    group.addoption("--proteins", type=int, help="use at most so many proteins, for a trial")
    group.addoption("--blocks", type=int, default=3, help="rounds of every provider (default: %(default)s)")
    group.addoption("--threads", type=int, default=2, help="threads (default: %(default)s)")
    group.addoption("--token-budget", type=int, help="tokens in a pack of esm-packed (default: the CPU's)")
    group.addoption("--esm-cpp-python", help="interpreter of an environment with esm-cpp 0.2.1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "block" in metafunc.fixturenames:  # first, so that it varies slowest
        metafunc.parametrize("block", range(metafunc.config.getoption("--blocks")))
    for name, values in getattr(metafunc.module, "PARAMETERS", {}).items():
        metafunc.parametrize(name, values)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    build = torch.__config__.show().splitlines()
    libraries = ("Math Kernel Library", "MKL-DNN", "CPU capability")
    machine_info["cpu_model"] = _cpu_model()
    machine_info["torch"] = torch.__version__
    machine_info["torch_libraries"] = [
        line.strip(" -") for line in build if any(library in line for library in libraries)
    ]
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    machine_info["git_commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if records := config.stash.get(RECORDS, []):
        terminalreporter.section("medians over blocks")
        for line in summary_lines(records):
            terminalreporter.write_line(line)
