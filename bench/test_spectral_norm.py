"""Spectral norm of whole networks beside torch's own, on the rows of spectral_norm_cases.py.

Columns: spectral_norm_peers.py; eager is `torch.nn.utils.parametrizations.spectral_norm`, and torch.compile the same
compiled. One call updates u and v and gives all weights W/σ, in training mode. Forward runs without autograd;
forward_backward asks `torch.autograd.grad` for the gradients in the weights, of fixed ones in W/σ. What differs from
the same update in float64 is reported as wrong instead of timed.
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
from spectral_norm_cases import ROWS, Row, errors, make_problem, reference
from spectral_norm_peers import PEERS, Network
from spectral_norm_targets import targets

pytestmark = pytest.mark.benchmark(timer=harness.timer, disable_gc=True)

BENCHMARK = suite.Benchmark("spectral_norm", ROWS, PEERS, (), targets)
# Implementation by implementation, forward and backward first: what the targets need comes early.
CASES = [
    (row, peer, mode, timing)
    for peer, mode, row, timing in itertools.product(PEERS, reversed(harness.MODES), ROWS, suite.TIMINGS)
]


@suite.parametrized(CASES)
def test_spectral_norm(row: Row, peer: str, mode: str, timing: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, timing, measure)


def measure(row: Row, peer: str, mode: str, timing: str, benchmark: Any) -> dict[str, Any]:
    """What belongs into the cell of the result file."""
    network, gradients = prepared(row, peer, mode)
    call = caller(network, gradients, mode)
    return suite.measured(benchmark, timing, call, functools.partial(checked, network, gradients))


def caller(network: Network, gradients: list[Tensor], mode: str) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """The call that is timed: it returns the normalised weights and, backward too, the gradients in the weights."""
    weights, _, _ = network.tensors()

    @torch.no_grad()
    def forward() -> tuple[list[Tensor], list[Tensor]]:
        return network(), []

    def forward_backward() -> tuple[list[Tensor], list[Tensor]]:
        normalized = network()
        return normalized, list(torch.autograd.grad(normalized, weights, gradients))

    return forward if mode == "forward" else forward_backward


def checked(
    network: Network,
    gradients: list[Tensor],
    run: Callable[[], tuple[list[Tensor], list[Tensor]]],
    updates: int,
) -> dict[str, float]:
    """The errors of what `run` returns, the last of some updates, from u and v as they are before it."""
    weights, *vectors = network.tensors()
    us, vs = ([x.clone() for x in some] for some in vectors)
    return errors(run(), reference(weights, us, vs, gradients, updates, network.u_first))


@functools.lru_cache(maxsize=1)
def prepared(row: Row, peer: str, mode: str) -> tuple[Network, list[Tensor]]:
    """The network and the gradients, kept while the timings of the mode are taken."""
    harness.free_memory()
    problem = make_problem(row, harness.DEVICE)
    return PEERS[peer](problem.layers), problem.gradients
