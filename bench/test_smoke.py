"""Check a new machine: device, ops compared with float64, training iterations, a short training. See gpu.py.

Not part of `make test`. On a CPU, shapes are small and what needs a GPU is skipped. Writes to the folder $OUT.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import harness
import results
import test_info_nce as nce
import test_spectral_norm as norm
import test_step as step
from harness import DEVICE, ON_GPU
from test_switches import switched

OPTIONAL = (
    "apex deepspeed inf_cl info_nce jsonargparse lightly liger_kernel lmdb matplotlib nvidia.dali numpy PIL "
    "pytest_timeout safetensors scipy sklearn tensorboard torch_fidelity torchvision xdist yaml"
).split()
FOR_TRAINING = ("PIL", "jsonargparse", "numpy", "safetensors", "sklearn", "tensorboard", "yaml")
EAGER = ["--train.compile", "false", "--train.graphs", "false"]
TRAIN_SECONDS = 90  # limit for the first log line, including compilation


def missing(modules: Iterable[str]) -> list[str]:
    return [module for module in modules if not (find_spec(module.partition(".")[0]) and find_spec(module))]


def test_device() -> None:
    facts = {key: value for key, value in results.environment().items() if value}
    absent = missing(OPTIONAL)
    lines = [
        f"device: {facts}",
        f"compilers: {[shutil.which(os.environ.get('CC', 'gcc')), shutil.which('g++')]}, cores: {os.cpu_count()}",
        f"installed: {' '.join(x for x in OPTIONAL if x not in absent)}; missing: {' '.join(absent)}",
        f"TFLOP/s in matrix products, GB/s in copies: {harness.device_rates()}",
    ]
    Path(os.environ["OUT"], "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("row", [row for row in nce.ROWS if not row.name.endswith("-bf16")], ids=lambda row: row.name)
def test_info_nce_op(row: nce.Row, dtype: str) -> None:
    # The float64 reference of the largest rows takes too long.
    small = replace(row, batch=min(row.batch, 1024), queue=row.queue and min(row.queue, 8192))
    row = replace(small if ON_GPU else row.shrunk(), dtype=dtype)
    problem = nce.make_problem(row, DEVICE)
    outputs = nce.call_of(problem, nce.ours(problem), "forward_backward")()
    print(nce.errors(row, outputs, nce.reference(problem)))


@pytest.mark.parametrize("row", norm.ROWS, ids=lambda row: row.name)
def test_spectral_norm_op(row: norm.Row) -> None:
    call, check = norm.prepared(row if ON_GPU else row.shrunk(), "ours", "forward_backward")
    print(check(call))


@pytest.mark.parametrize("switch", ["none", "graphs", "ours"])
@pytest.mark.parametrize("name", ["cifar10-64", "faces64"])
def test_iterations(name: str, switch: str) -> None:
    """The growing network is narrow and at 16×16, the first resolution at which it uses all its heads."""
    (row,) = (row for row in step.ROWS_ON_GPU if row.name == name)
    row = replace(row, resolution=16, narrow=True) if name == "faces64" else row
    row = row if ON_GPU else row.shrunk()
    try:
        iterate = switched(row, switch)
    except harness.Absent as error:
        pytest.skip(str(error))
    print(step.errors(row, iterate()))
    step.warm_up(row, iterate)
    metrics = [iterate() for _ in range(2 * row.period)]
    last = {name: value.item() for iteration in metrics for name, value in iteration.items()}
    assert all(map(math.isfinite, last.values())), last
    torch.compiler.reset()


@pytest.mark.parametrize("settings", [[], EAGER], ids=["fast", "eager"])
def test_training(settings: list[str]) -> None:
    """Train the digits, stop by SIGTERM, resume, sample and reconstruct."""
    if absent := missing(FOR_TRAINING):
        pytest.skip(f"needs {', '.join(absent)}")
    out = Path(os.environ["OUT"])
    run, metrics = out / "run", out / "run" / "metrics.jsonl"
    small = [] if ON_GPU else ["--train.images", "96", "--log.every", "32", "--log.held_out", "0"]
    train = [sys.executable, results.ROOT / "train.py", "--recipe", "digits", "--run", run, *settings, *small]
    process = subprocess.Popen(train, cwd=out)
    try:
        begin = time.monotonic()
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            assert not ON_GPU or time.monotonic() < begin + TRAIN_SECONDS, "nothing was logged in time"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM, "training did not stop with a checkpoint"
    finally:
        process.kill()
        process.wait()
    dcvae = [sys.executable, "-m", "dcvae_fast.cli"]
    for command in (train, [*dcvae, "sample", run], [*dcvae, "reconstruct", run, "samples.png"]):
        subprocess.run(command, cwd=out, check=True)
