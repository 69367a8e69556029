"""Settings that make iterations fast without changing the arithmetic: what each gains alone, and all together.

To measure on a CPU, without CUDA graphs:

    python -m pytest bench/test_switches.py -q -s --benchmark-quiet --results=bench/results
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import harness
from dcvae_fast.training.step import TrainStep
from harness import ON_GPU, Absent
from results import Document
from test_step import ROWS_ON_CPU, ROWS_ON_GPU, Iterate, Row, iterations, time_iterations

NONE: dict[str, Any] = {"precision": "float32", "compile": False, "graphs": False, "channels_last": False}
SWITCHES: dict[str, dict[str, Any]] = {
    "none": NONE,
    "channels last": {**NONE, "channels_last": True},
    "bfloat16": {**NONE, "precision": "bfloat16"},
    "compile": {**NONE, "compile": True},
    "graphs": {**NONE, "graphs": True},
    "ours": {"precision": "bfloat16", "compile": True, "graphs": True, "channels_last": True},
}


class Contiguous(TrainStep):
    """TrainStep with torch's default memory format, channels first."""

    memory_format = torch.contiguous_format


def switched(row: Row, name: str) -> Iterate:
    """Return our iteration with some of the switches.

    Raises:
        Absent: a switch needs a GPU.
    """
    settings = dict(SWITCHES[name])
    if settings["graphs"] and not ON_GPU:
        raise Absent("CUDA graphs need a GPU")
    make = TrainStep if settings.pop("channels_last") else Contiguous
    return iterations(make(replace(row.config, train=replace(row.config.train, **settings)), harness.DEVICE), row)


pytestmark = harness.timed(0.3 if ON_GPU else 0.02)
NAMES = ("cifar10-64", "faces128") if ON_GPU else ("cifar10-8",)
ROWS = [replace(row, targets=()) for row in (*ROWS_ON_GPU, *ROWS_ON_CPU) if row.name in NAMES]
BENCHMARK = harness.Benchmark("switches", ROWS, SWITCHES, modes=("iteration",), on_cpu=True)


@harness.cases((row, peer, "iteration") for row in ROWS for peer in SWITCHES)
def test_switches(row: Row, peer: str, mode: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, measure)


def measure(cell: Document, benchmark: Any, row: Row, peer: str, mode: str) -> None:
    harness.free_memory()
    time_iterations(cell, benchmark, row, switched(row, peer))
