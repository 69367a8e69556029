"""Work that the ops do on the CPU in DC-VAE's calls, which are so short that the GPU waits for the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Calls of Python functions by dcvae_kernels, including its calls of Triton. A call takes 0.1 to 1 µs. Unlike the time,
# the numbers are the same on every machine. Spectral norm has 23 layers.
LIMITS = {
    "info_nce: forward without gradient": 32,
    "info_nce: forward": 36,
    "info_nce: forward and backward": 40,
    "spectral_norm: forward without gradient": 90,
    "spectral_norm: forward": 90,
    "spectral_norm: forward and backward": 175,
}
LAUNCHES = {
    "spectral_norm: forward without gradient": 2,
    "spectral_norm: forward": 2,
    "spectral_norm: forward and backward": 4,
}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The output of `host_cost.py`, run in another process because it replaces Triton's driver."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parent / "host_cost.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def costs(report: dict[str, Any]) -> dict[str, Any]:
    return report["costs"]


@pytest.mark.parametrize("name", LIMITS)
def test_few_python_calls(costs: dict[str, Any], name: str):
    calls = costs[name]["calls"]
    assert calls["dcvae_kernels"] <= LIMITS[name], json.dumps(calls, indent=1)


@pytest.mark.parametrize("name", LIMITS)
def test_launch_hooks_see_every_kernel(costs: dict[str, Any], name: str):
    launches = costs[name]["launches"]
    assert len(launches["hooked"]) == launches["number"] > 0


@pytest.mark.parametrize("name", LAUNCHES)
def test_number_of_launches(costs: dict[str, Any], name: str):
    assert costs[name]["first launches"]["number"] == costs[name]["launches"]["number"] == LAUNCHES[name]


def test_unaligned_gradients_compile_no_kernels(report: dict[str, Any]):
    assert report["compiled for unaligned gradients"] == 0
