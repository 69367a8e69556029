"""InfoNCE beside every other implementation that can be had, on the rows of info_nce_cases.py.

Columns: info_nce_peers.py. Forward runs without autograd; forward_backward asks `torch.autograd.grad` for the gradient
in q, and in k where there is no queue. What differs from a float64 reference is reported as wrong instead of timed.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
import records
from harness import Unavailable
from info_nce_cases import MODES, ROWS, Problem, Row, errors, make_problem, reference
from info_nce_peers import PACKAGES, PEERS, Loss
from info_nce_targets import targets

pytestmark = pytest.mark.benchmark(timer=harness.timer, disable_gc=True)

NAME = "info_nce"
TIMINGS = ("wall", "graph") if harness.ON_GPU else ("wall",)
NOT_RUN = "not run"
CASES = list(itertools.product(ROWS, PEERS, MODES, TIMINGS))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The result file's contents. At first no cell has been run."""
    rows = ROWS if harness.ON_GPU else [row.shrunk() for row in ROWS]
    empty = dict.fromkeys(("wall", "graph", "graph_reason", "peak_bytes", "launches", "errors"))
    return {
        **records.environment(PACKAGES),
        "benchmark": NAME,
        "rehearsal": not harness.ON_GPU,
        "device_rates": harness.device_rates(),
        "rows": [
            {
                **row.description(),
                "cells": [{"peer": p, "mode": m, "reason": NOT_RUN, **empty} for p in PEERS for m in MODES],
            }
            for row in rows
        ],
    }


@pytest.fixture
def save(document: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[None]:
    """Writes the file after each case, so that whatever stops the run leaves what it had measured."""
    yield
    folder: Path | None = request.config.getoption("--results")
    if folder is not None:
        contents = {**document, "targets": targets(document)}
        records.write(folder / records.slug(document["device"]) / f"{NAME}.json", contents)


@pytest.mark.usefixtures("save")
@pytest.mark.parametrize(
    ("row", "peer", "mode", "timing"), CASES, ids=[f"{row.name}-{'-'.join(rest)}" for row, *rest in CASES]
)
def test_info_nce(
    row: Row, peer: str, mode: str, timing: str, benchmark: Any, document: dict[str, Any], out_of_time: bool
) -> None:
    (cells,) = (r["cells"] for r in document["rows"] if r["name"] == row.name)
    (cell,) = (c for c in cells if c["peer"] == peer and c["mode"] == mode)
    reason_key = "graph_reason" if timing == "graph" else "reason"
    try:
        if out_of_time:
            raise Unavailable("no time left")
        if timing == "graph" and cell["reason"]:
            raise Unavailable(cell["reason"])
        measured = measure(row if harness.ON_GPU else row.shrunk(), peer, mode, timing, benchmark)
        cell.update(measured, **{reason_key: None})
        print(f"{row.name:12} {peer:17} {mode:17} {timing:6} {measured[timing]['median_us']:>12,.1f} µs", flush=True)
    except Exception as error:
        benchmark.skipped = True  # not a mistake of this test: it says in the file why it has no time
        reason = cell[reason_key] = str(error) if isinstance(error, Unavailable) else harness.one_sentence(error)
        print(f"{row.name:12} {peer:17} {mode:17} {timing:6} {'–':>12}    {reason}", flush=True)
        if not harness.device_works():
            pytest.exit(f"{peer} in row {row.name} left the device unusable: {reason}", returncode=1)
        if peer == "ours" and not out_of_time:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def measure(row: Row, peer: str, mode: str, timing: str, benchmark: Any) -> dict[str, Any]:
    """What belongs into the cell of the result file.

    Raises:
        Unavailable: the implementation cannot compute this row, or computes it wrongly.
        Exception: whatever it raises itself.
    """
    problem, expected = stated(row)
    call = caller(problem, prepared(row, peer), mode)
    if timing == "graph":
        replay, outputs = harness.captured(call)
        replay()
        errors(row, outputs, expected)
        return {"graph": harness.measure(benchmark, replay, harness.CALLS_PER_GRAPH)}
    found = errors(row, call(), expected)
    wall = harness.measure(benchmark, call)
    return {"wall": wall, "errors": found, "peak_bytes": harness.peak_bytes(call), "launches": harness.launches(call)}


def caller(problem: Problem, loss: Loss, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: it returns the loss and, backward too, its gradients."""

    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return (loss(),)

    def forward_backward() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, problem.wanted)

    return forward if mode == "forward" else forward_backward


@functools.lru_cache(maxsize=1)
def stated(row: Row) -> tuple[Problem, tuple[Tensor, ...]]:
    """The row's inputs and its reference, kept while the cases of the row run."""
    harness.free_memory()
    problem = make_problem(row, harness.DEVICE)
    expected = reference(problem)
    harness.free_memory()
    return problem, expected


@functools.lru_cache(maxsize=1)
def prepared(row: Row, peer: str) -> Loss:
    return PEERS[peer](stated(row)[0])
