"""Options of the benchmarks, and what is printed while they run."""

import time
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dcvae benchmarks")
    group.addoption("--results", type=Path, help="write RESULTS/<device>/<benchmark>.json")
    group.addoption("--deadline", type=float, help="start no measurement later than this many seconds from now")


def pytest_configure(config: pytest.Config) -> None:
    seconds = config.getoption("--deadline")
    config.stash[DEADLINE] = None if seconds is None else time.monotonic() + seconds


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots: the benchmarks print a line each."""
    if report.skipped or (report.passed and report.when == "call"):
        return report.outcome, "", report.outcome.upper()
    return None


DEADLINE = pytest.StashKey[float | None]()


@pytest.fixture
def out_of_time(request: pytest.FixtureRequest) -> bool:
    deadline = request.config.stash[DEADLINE]
    return deadline is not None and time.monotonic() > deadline
