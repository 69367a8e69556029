"""What the benchmarks have in common: the cells of a result file, and how each is filled.

A benchmark is a file test_NAME.py that says as `BENCHMARK` what is compared, and has one test, which asks the fixture
`fill` for a case: a row, an implementation, a mode and a timing.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

import harness
import records
from harness import MODES, Unavailable
from targets import UNMEASURED

TIMINGS = ("wall", "graph") if harness.ON_GPU else ("wall",)
NO_TIME, NOT_RUN = UNMEASURED
REHEARSING = records.REHEARSAL_VARIABLE in os.environ


class Row(Protocol):
    """One problem."""

    @property
    def name(self) -> str: ...

    def shrunk(self) -> "Row":
        """For a rehearsal."""
        ...

    def description(self) -> dict[str, Any]:
        """What tells it from other problems, its name and, of an op, its floors: by mode, what cannot be avoided."""
        ...


@dataclass(frozen=True)
class Benchmark:
    """What a result file compares.

    targets: given the file's contents, one entry for each target.
    on_cpu: whether times on a CPU count for something; else there is only a rehearsal.
    """

    name: str
    rows: Sequence[Row]
    peers: Iterable[str]
    packages: Iterable[str]
    targets: Callable[[dict[str, Any]], list[dict[str, Any]]]
    modes: Sequence[str] = MODES
    on_cpu: bool = False

    def document(self) -> dict[str, Any]:
        """The result file's contents. At first no cell has been run."""
        rehearsal = not harness.ON_GPU and (REHEARSING or not self.on_cpu)
        rows = [row.shrunk() if rehearsal else row for row in self.rows]
        empty = dict.fromkeys(("wall", "graph", "graph_reason", "peak_bytes", "launches", "errors"))
        cells = [{"peer": p, "mode": m, "reason": NOT_RUN, **empty} for p in self.peers for m in self.modes]
        return {
            **records.environment(self.packages),
            "benchmark": self.name,
            "rehearsal": rehearsal,
            "device_rates": harness.device_rates(),
            "rows": [{**row.description(), "cells": [dict(cell) for cell in cells]} for row in rows],
        }

    def write(self, document: dict[str, Any], folder: Path) -> None:
        contents = {**document, "targets": self.targets(document)}
        records.write(folder / records.slug(document["device"]) / f"{self.name}.json", contents)


def parametrized(cases: Iterable[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """A test for each case: (row, implementation, mode, timing)."""
    cases = list(cases)
    names = [f"{row.name}-{'-'.join(rest)}" for row, *rest in cases]
    return pytest.mark.parametrize(("row", "peer", "mode", "timing"), cases, ids=names)


def fill(
    document: dict[str, Any],
    benchmark: Any,
    out_of_time: bool,
    row: Row,
    peer: str,
    mode: str,
    timing: str,
    measure: Callable[[Any, str, str, str, Any], dict[str, Any]],
) -> None:
    """Puts what `measure` finds into the case's cell, or why it has no time, and prints it.

    Args:
        measure: given row, implementation, mode, timing and pytest-benchmark's fixture, what belongs into the cell.
            It raises Unavailable for what cannot compute this row or computes it wrongly, or anything else. All but
            Absent is a failure if it is ours.
    """
    (cells,) = (r["cells"] for r in document["rows"] if r["name"] == row.name)
    (cell,) = (c for c in cells if c["peer"] == peer and c["mode"] == mode)
    case = f"{row.name:12} {peer:17} {mode:17} {timing:6}"
    reason_key = "graph_reason" if timing == "graph" else "reason"
    try:
        if out_of_time:
            raise Unavailable(NO_TIME)
        if timing == "graph" and cell["reason"]:
            raise Unavailable(cell["reason"])
        measured = measure(row.shrunk() if document["rehearsal"] else row, peer, mode, timing, benchmark)
        cell.update(measured, **{reason_key: None})
        print(f"{case} {measured[timing]['median_us']:>12,.1f} µs", flush=True)
    except Exception as error:
        benchmark.skipped = True  # not a mistake of this test: it says in the file why it has no time
        reason = cell[reason_key] = str(error) if isinstance(error, Unavailable) else harness.one_sentence(error)
        print(f"{case} {'–':>12}    {reason}", flush=True)
        if not harness.device_works():
            pytest.exit(f"{peer} in row {row.name} left the device unusable: {reason}", returncode=1)
        if peer == "ours" and not out_of_time and not isinstance(error, harness.Absent):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def measured(
    benchmark: Any,
    timing: str,
    call: Callable[[], Any],
    checked: Callable[[Callable[[], Any], int], dict[str, float]],
) -> dict[str, Any]:
    """What belongs into a cell for one call.

    Args:
        checked: given what returns a call's outputs, and how many calls it makes, the errors of the last one.

    Raises:
        Unavailable: from `checked`, the outputs are wrong.
    """
    if timing == "graph":
        replay, outputs = harness.captured(call)

        def replayed() -> Any:
            replay()
            return outputs

        checked(replayed, harness.CALLS_PER_GRAPH)
        return {"graph": harness.measure(benchmark, replay, harness.CALLS_PER_GRAPH)}
    errors = checked(call, 1)
    wall = harness.measure(benchmark, call)
    return {"wall": wall, "errors": errors, "peak_bytes": harness.peak_bytes(call), "launches": harness.launches(call)}
