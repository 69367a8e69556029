"""Limits for the work that `info_nce` does on the CPU, for a call so short that the GPU waits for the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Calls of Python functions by dcvae_kernels, including what it calls in Triton: about 0.3 to 1 µs each. Unlike time,
# they are the same on every machine.
LIMITS = {"forward without gradient": 25, "forward": 25, "forward and backward": 30}


def test_few_python_calls():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parent / "host_cost.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    calls = {name: cost["calls"] for name, cost in json.loads(result.stdout).items()}
    assert calls.keys() == LIMITS.keys()
    excessive = {name: calls[name] for name, limit in LIMITS.items() if calls[name]["dcvae_kernels"] > limit}
    assert not excessive, json.dumps(excessive, indent=1)
