"""Run scripts of bench/, and rehearse bench/gpu.py on the CPU once for all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import harness
import results


def run_script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python bench/NAME.py ARGUMENTS` from another folder."""
    command = [sys.executable, str(results.ROOT / "bench" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd="/", env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def script():
    return run_script


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Result folder and output of a rehearsal of everything except training, with two of the tests."""
    folder = tmp_path_factory.mktemp("results")
    checks = ("device", "ops", "iterations", "fast-iterations", "tests/kernels/test_info_nce.py::test_simclr")
    benchmarks = ("info_nce", "spectral_norm", "step")
    arguments = ("--first", "--cpu-rehearsal", "--out", folder, "--only", *checks, *benchmarks)
    result = run_script("gpu", *arguments, DCVAE_COMMIT="0123456789abcdef-dirty")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.fixture
def make_document(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a benchmark's result file for a GPU.

    Its `times` are (wall, graph) in µs by (row, implementation) or (row, implementation, mode).
    """

    def make(benchmark: harness.Benchmark, times: dict, rates: dict | None = None) -> results.Document:
        monkeypatch.setattr(harness, "ON_GPU", True)
        monkeypatch.setattr(harness, "device_rates", lambda: rates)
        document = benchmark.document()
        for row in document["rows"]:
            for cell in row["cells"]:
                key = row["name"], cell["peer"]
                wall, graph = times.get(key) or times.get((*key, cell["mode"])) or (None, None)
                cell |= {"wall": wall and {"median_us": wall}, "graph": graph and {"median_us": graph}, "reason": None}
        return document

    return make
