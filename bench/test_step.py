"""Training iterations of ours beside the baseline, on the rows of step_cases.py.

The baseline is the method as the authors' code has it, in plain PyTorch, eager, float32, with torch's defaults: see
baselines.py. Both train from the same weights on the same images, which lie on the device. A time is that of an
iteration, averaged over those that step the autoencoder and those that do not. The times count on a CPU as well:

    python -m pytest bench/test_step.py -q -s --benchmark-quiet --results=bench/results
"""

from collections.abc import Callable
from typing import Any

import pytest

import harness
import suite
from step_cases import MAKERS, PEERS, ROWS_ON_CPU, ROWS_ON_GPU, Row, errors, expected_loss, warm_up
from step_targets import MODE, targets

pytestmark = pytest.mark.benchmark(timer=harness.timer, disable_gc=True)

ROWS = ROWS_ON_GPU if harness.ON_GPU else ROWS_ON_CPU
BENCHMARK = suite.Benchmark("step", ROWS, PEERS, (), targets, (MODE,), on_cpu=True)
CASES = [(row, peer, MODE, "wall") for row in ROWS for peer in PEERS]


@suite.parametrized(CASES)
def test_step(row: Row, peer: str, mode: str, timing: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, timing, measure)


def measure(row: Row, peer: str, mode: str, timing: str, benchmark: Any) -> dict[str, Any]:
    """What belongs into the cell of the result file: times are those of an iteration."""
    expected_loss(row)  # runs the baseline once, so it must come before memory is counted
    harness.reset_peak()
    iterate = MAKERS[peer](row)
    found = errors(row, iterate())
    warm_up(row, iterate)

    def period() -> None:
        for _ in range(row.period):
            iterate()

    wall = harness.measure(benchmark, period, row.period, min_batches=3)
    peak, launches = harness.peak_since_reset(), harness.launches(period)
    return {
        "wall": wall,
        "errors": found,
        "peak_bytes": peak,
        "launches": None if launches is None else round(launches / row.period),
        "waiting_share": harness.waiting_share(period, wall["median_us"] * row.period),
    }
