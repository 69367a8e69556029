"""What each switch of a training iteration gains, alone and together: step_cases.SWITCHES, on two of its rows.

All do the same arithmetic, ours; see test_step.py for the times of others. On a CPU graphs are left out:

    python -m pytest bench/test_switches.py -q -s --benchmark-quiet --results=bench/results
"""

from collections.abc import Callable
from typing import Any

import pytest

import harness
import suite
from step_cases import ROWS_ON_CPU, ROWS_ON_GPU, SWITCHES, Row, errors, switched, warm_up
from step_targets import MODE

pytestmark = pytest.mark.benchmark(timer=harness.timer, disable_gc=True)

NAMES = ("cifar10-64", "faces128") if harness.ON_GPU else ("cifar10-8",)
ROWS = [row for row in (*ROWS_ON_GPU, *ROWS_ON_CPU) if row.name in NAMES]
BENCHMARK = suite.Benchmark("switches", ROWS, SWITCHES, (), lambda document: [], (MODE,), on_cpu=True)
CASES = [(row, peer, MODE, "wall") for row in ROWS for peer in SWITCHES]


@suite.parametrized(CASES)
def test_switches(row: Row, peer: str, mode: str, timing: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, timing, measure)


def measure(row: Row, peer: str, mode: str, timing: str, benchmark: Any) -> dict[str, Any]:
    """What belongs into the cell of the result file: times are those of an iteration."""
    harness.free_memory()
    iterate = switched(row, peer)
    found = errors(row, iterate())
    warm_up(row, iterate)

    def period() -> None:
        for _ in range(row.period):
            iterate()

    return {"wall": harness.measure(benchmark, period, row.period, min_batches=3), "errors": found}
