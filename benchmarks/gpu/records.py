"""A pytest plugin: a JSON line when a test begins and one when it ends, no new test after a time limit.

`pytest -p gpu.records --records FILE --stop-after SECONDS --part 0/4`, with `benchmarks/` on PYTHONPATH. When
a test hangs or takes the process with it, the lines up to there remain.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

_MESSAGE_LENGTH = 3000


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("records")
    group.addoption("--records", type=Path, help="file that gets one JSON line for every test")
    group.addoption(
        "--stop-after", type=float, help="skip the tests that have not begun after so many seconds"
    )
    group.addoption("--part", default="0/1", help="K/N: of N parts of the tests, the one that begins with K")


class _Recorder:
    def __init__(self, path: Path | None, seconds: float | None, part: str) -> None:
        self._path = path
        self._first, self._step = (int(number) for number in part.split("/"))
        self._end = None if seconds is None else time.monotonic() + seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._first :: self._step]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._end is not None and time.monotonic() > self._end:
            pytest.skip("time limit of this run")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"test": nodeid, "outcome": "started"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome if report.when == "call" or report.skipped else "error",
            "seconds": round(report.duration, 3),
            "properties": dict(report.user_properties),
        }
        if not report.passed:
            text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
            line["message"] = text[-_MESSAGE_LENGTH:]
        self._write(line)

    def _write(self, line: dict[str, object]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line, default=str) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    options = [config.getoption(name) for name in ("--records", "--stop-after", "--part")]
    config.pluginmanager.register(_Recorder(*options), "gpu-recorder")
