"""Options of the benchmarks, and the fixtures that fill and write a result file."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dcvae benchmarks")
    group.addoption("--results", type=Path, help="write RESULTS/<device>/<benchmark>.json")
    group.addoption("--deadline", type=float, default=float("inf"), help="seconds after which no measurement starts")


def pytest_configure(config: pytest.Config) -> None:
    seconds: Any = config.getoption("--deadline")
    config.stash[DEADLINE] = time.monotonic() + seconds


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Print no dots: each benchmark prints a line."""
    return ("passed", "", "PASSED") if report.passed and report.when == "call" else None


@pytest.fixture(scope="module")
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.module.BENCHMARK.document()


@pytest.fixture
def fill(request: pytest.FixtureRequest, document: dict[str, Any], benchmark: Any) -> Iterator[Callable[..., None]]:
    """harness.fill for this module's result file, which is written after each case so that it survives a kill."""
    import harness  # imports torch, which takes seconds: after the deadline is set

    yield functools.partial(harness.fill, document, benchmark, time.monotonic() > request.config.stash[DEADLINE])
    if folder := request.config.getoption("--results"):
        request.module.BENCHMARK.write(document, folder)
