"""Pytest plugin that writes the outcome of each test to a file as soon as the test ends: `-p outcomes --outcomes FILE`.

Unlike a JUnit report, the file survives if pytest is killed. Each line is a JSON object with test, outcome (passed,
failed, skipped) and, unless the test passed, text. Imports no torch.
"""

import json
from pathlib import Path

import pytest

FILE = "outcomes.jsonl"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write a line for each test to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        config.pluginmanager.register(Outcomes(path))


class Outcomes:
    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = {} if report.outcome == "passed" else {"text": report.longreprtext}
            print(json.dumps({"test": report.nodeid, "outcome": report.outcome, **text}), file=self.file, flush=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.pytest_runtest_logreport(report)


def read(path: Path) -> list[dict]:
    """Read outcomes; return [] if the file is missing. Ignores an incomplete last line."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
