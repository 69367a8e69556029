"""Pytest plugin that writes the outcome of each test to a file as soon as the test ends.

Use `-p outcomes --outcomes FILE`. Unlike a JUnit report, the file survives if pytest is killed. Each line is a JSON
object with test, outcome (passed, failed, skipped), seconds and, unless the test passed, text. Imports no torch.
"""

import json
from pathlib import Path
from typing import IO

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write a line for each test to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        config.pluginmanager.register(Outcomes(path.open("w", encoding="utf-8")))


class Outcomes:
    def __init__(self, file: IO[str]):
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 2)}
        if report.outcome != "passed":
            line["text"] = report.longreprtext
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read(path: Path) -> list[dict]:
    """Read outcomes; return [] if the file is missing. Ignores an incomplete last line."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
