"""Work that `info_nce` does on the CPU in DC-VAE's call, which is so short that the GPU waits for the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Calls of Python functions by dcvae_kernels, including its calls of Triton. A call takes 0.1 to 1 µs. Unlike the time,
# the numbers are the same on every machine.
LIMITS = {"forward without gradient": 32, "forward": 36, "forward and backward": 40}


@pytest.fixture(scope="module")
def costs() -> dict[str, Any]:
    """The output of `host_cost.py`, run in another process because it replaces Triton's driver."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parent / "host_cost.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", LIMITS)
def test_few_python_calls(costs: dict[str, Any], name: str):
    calls = costs[name]["calls"]
    assert calls["dcvae_kernels"] <= LIMITS[name], json.dumps(calls, indent=1)


@pytest.mark.parametrize("name", LIMITS)
def test_launch_hooks_see_every_kernel(costs: dict[str, Any], name: str):
    launches = costs[name]["launches"]
    assert len(launches["hooked"]) == launches["number"] > 0
