"""Options of the benchmarks, what is printed while they run, and the fixtures that fill and write a result file."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.module.BENCHMARK.document()


@pytest.fixture
def fill(request: pytest.FixtureRequest, document: dict[str, Any], benchmark: Any) -> Iterator[Callable[..., None]]:
    """suite.fill for this module's result file, which is written after each case, so that whatever stops the run leaves
    what it had measured."""
    import suite  # not before the deadline is set: it imports torch

    deadline = request.config.stash[DEADLINE]
    yield functools.partial(suite.fill, document, benchmark, deadline is not None and time.monotonic() > deadline)
    folder: Path | None = request.config.getoption("--results")
    if folder is not None:
        request.module.BENCHMARK.write(document, folder)
