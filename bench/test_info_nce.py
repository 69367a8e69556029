"""InfoNCE beside every other implementation that can be had, on the rows of info_nce_cases.py.

Columns: info_nce_peers.py. Forward runs without autograd; forward_backward asks `torch.autograd.grad` for the gradient
in q, and in k where there is no queue. What differs from a float64 reference is reported as wrong instead of timed.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
import suite
from info_nce_cases import ROWS, Problem, Row, errors, make_problem, reference
from info_nce_peers import PACKAGES, PEERS, Loss
from info_nce_targets import targets

pytestmark = pytest.mark.benchmark(timer=harness.timer, disable_gc=True)

BENCHMARK = suite.Benchmark("info_nce", ROWS, PEERS, PACKAGES, targets)


# What the targets need comes first: forward and backward of ours and eager PyTorch in all rows, then of the others.
ORDER = [
    ("forward_backward", ["ours", "eager"]),
    ("forward_backward", [peer for peer in PEERS if peer not in ("ours", "eager")]),
    ("forward", PEERS),
]
CASES = [
    (row, peer, mode, timing)
    for mode, peers in ORDER
    for row, peer, timing in itertools.product(ROWS, peers, suite.TIMINGS)
]


@suite.parametrized(CASES)
def test_info_nce(row: Row, peer: str, mode: str, timing: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, timing, measure)


def measure(row: Row, peer: str, mode: str, timing: str, benchmark: Any) -> dict[str, Any]:
    """What belongs into the cell of the result file."""
    problem, expected = stated(row)
    call = caller(problem, prepared(row, peer), mode)
    return suite.measured(benchmark, timing, call, lambda run, calls: errors(row, run(), expected))


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
