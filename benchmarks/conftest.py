"""Options, order of rounds, records of the machine, and of benchmarks that could not run."""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import measuring
import pytest
import torch
from measuring import ON_GPU
from workloads import WORKLOADS

from esm_packed.config import ESM2_MODELS
from esm_packed.numerics import PRECISIONS

if TYPE_CHECKING:
    from contenders.contest import Contest

SMALL, LARGE = "random:esm2_t6_8M_UR50D", "random:esm2_t33_650M_UR50D"
NOT_RUN = pytest.StashKey[dict[tuple[str, str], dict[str, str]]]()


def _names(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is invalid; choose from {', '.join(allowed)}")
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("esm-packed benchmarks")
    names = {"metavar": "A,B"}
    group.addoption("--model", help="models, as `esm-packed embed --model` takes them", **names)
    group.addoption("--workload", type=_names(tuple(WORKLOADS)), help=", ".join(WORKLOADS), **names)
    dtypes = tuple(name for name in PRECISIONS if name != "fp64" and (ON_GPU or name != "tf32"))
    group.addoption("--dtype", type=_names(dtypes), help=", ".join(dtypes), **names)
    group.addoption("--provider", type=lambda text: text.split(","), help="only these contenders", **names)
    group.addoption("--full", action="store_true", help="more models: all six on a GPU, up to 150M on a CPU")
    group.addoption("--blocks", type=_positive, default=5 if ON_GPU else 3, help="default: %(default)s")
    group.addoption("--tokens", type=_positive, help="of each workload, BOS and EOS included")
    group.addoption("--token-budget", type=_positive, help="tokens in a pack (default: the device's)")
    group.addoption("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    group.addoption("--esm-cpp-python", help="interpreter of an environment with esm-cpp 0.2.1")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    if config.option.model:
        config.option.model = config.option.model.split(",")
    elif config.option.full:
        config.option.model = [f"random:{name}" for name in list(ESM2_MODELS)[: 6 if ON_GPU else 3]]
    else:
        config.option.model = [SMALL, LARGE] if ON_GPU else [SMALL]
    config.stash[NOT_RUN] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "block" in metafunc.fixturenames:  # first, so that it varies slowest
        metafunc.parametrize("block", range(metafunc.config.getoption("--blocks")))
    choose = getattr(metafunc.module, "parameters", None)
    for names, values in (choose(metafunc.config) if choose else {}).items():
        if set(names.split(", ")) <= set(metafunc.fixturenames):
            metafunc.parametrize(names, values)


@pytest.fixture(scope="module")
def contest(pytestconfig: pytest.Config) -> Iterator[Contest]:
    from contenders.contest import Contest

    contest = Contest(pytestconfig.getoption("--esm-cpp-python"))
    with closing(contest.cleanup):
        yield contest


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(measuring.machine_info(config.invocation_params.args))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["not_run"] = list(config.stash[NOT_RUN].values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not report.passed:
        reason = str(call.excinfo.value).partition("\n")[0] if call.excinfo else ""
        test = item.originalname
        item.config.stash[NOT_RUN].setdefault(
            (test, reason), {"test": item.nodeid, "outcome": report.outcome, "reason": reason}
        )
    return report
