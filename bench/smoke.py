"""Check that everything runs on this device: `python bench/smoke.py CHECK`. Used by bench/gpu.py.

    device         print the device, versions, installed and missing packages, measured matrix and copy rates
    ops            compare info_nce and spectral_norm with float64, forward and backward, in every dtype
    step SWITCH…   run iterations of two networks with each of these settings of test_switches.SWITCHES
    train [--X Y]  train the digits, stop by SIGTERM, resume, sample and reconstruct; writes to the folder $OUT

Prints one line per check. Exits with 1 if a check failed, after running all of them.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import results

OPTIONAL = (
    "apex deepspeed inf_cl info_nce jsonargparse lightly liger_kernel lmdb matplotlib nvidia.dali numpy PIL "
    "pytest_timeout safetensors scipy sklearn tensorboard torch_fidelity torchvision xdist yaml"
).split()
FOR_TRAINING = ("PIL", "jsonargparse", "numpy", "safetensors", "sklearn", "tensorboard", "yaml")
# One network of each architecture. 16×16 is the first resolution at which the growing one uses all its heads.
NETWORKS = {"cifar10-64": {}, "faces64": {"resolution": 16, "narrow": True}}
TRAIN_SECONDS = 90  # limit for the first log line, including compilation


class Failed(Exception):
    """Raised by a check that fails; the message is one sentence."""


# Name of a check, and a function that runs it and returns what to print.
Check = tuple[str, Callable[[], Any]]


def device_checks(_: list[str]) -> Iterator[Check]:
    yield "device", lambda: {key: value for key, value in results.environment().items() if value}
    yield "C compiler", lambda: shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang")
    yield "C++ compiler", lambda: shutil.which("g++") or shutil.which("clang++")
    yield "cores", os.cpu_count
    yield "installed", lambda: " ".join(filter(is_installed, OPTIONAL))
    yield "missing", lambda: " ".join(x for x in OPTIONAL if not is_installed(x)) or "nothing"
    yield "TFLOP/s in matrix products, GB/s in copies", harness.device_rates


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def ops_checks(_: list[str]) -> Iterator[Check]:
    import test_info_nce
    import test_spectral_norm

    def info_nce(row: test_info_nce.Row) -> Any:
        problem = test_info_nce.make_problem(row, harness.DEVICE)
        outputs = test_info_nce.make_call(problem, test_info_nce.ours(problem), "forward_backward")()
        return test_info_nce.errors(row, outputs, test_info_nce.reference(problem))

    def spectral_norm(row: test_spectral_norm.Row) -> Any:
        network, gradients = test_spectral_norm.prepared(row, "ours")
        call = test_spectral_norm.make_call(network, gradients, "forward_backward")
        return test_spectral_norm.checked(network, gradients, call, 1)

    for row in (row for row in test_info_nce.ROWS if not row.name.endswith("-bf16")):
        # The float64 reference of the largest rows takes too long.
        small = replace(row, batch=min(row.batch, 1024), queue=row.queue and min(row.queue, 8192))
        for dtype in ("float32", "bfloat16", "float16"):
            case = replace(small if harness.ON_GPU else row.shrunk(), dtype=dtype)
            yield f"info_nce {row.name} {dtype}", partial(info_nce, case)
    for row in test_spectral_norm.ROWS:
        yield f"spectral_norm {row.name}", partial(spectral_norm, row if harness.ON_GPU else row.shrunk())


def step_checks(switches: list[str]) -> Iterator[Check]:
    import torch

    import test_step
    from test_switches import switched

    def step(row: test_step.Row, switch: str) -> Any:
        begin = time.perf_counter()
        iterate = switched(row, switch)
        errors = test_step.errors(row, iterate())
        test_step.warm_up(row, iterate)
        metrics = [iterate() for _ in range(2 * row.period)]
        last = {name: value.item() for iteration in metrics for name, value in iteration.items()}
        if not all(map(math.isfinite, last.values())):
            raise Failed(f"a metric is not finite: {last}")
        torch.compiler.reset()
        seconds = time.perf_counter() - begin
        return f"{seconds:.0f} s, {errors}, discriminator's loss {last['loss/discriminator']:.4f}"

    rows = {row.name: row for row in test_step.ROWS_ON_GPU}
    for name, settings in NETWORKS.items():
        row = replace(rows[name], **settings)
        for switch in switches:
            yield f"step {name} {switch}", partial(step, row if harness.ON_GPU else row.shrunk(), switch)


def train_checks(settings: list[str]) -> Iterator[Check]:
    out = Path(os.environ["OUT"])
    run = out / "run"
    if not harness.ON_GPU:
        settings = [*settings, "--train.images", "96", "--log.every", "32", "--log.held_out", "0"]
    train = [sys.executable, str(results.ROOT / "train.py"), "--recipe", "digits", "--run", str(run), *settings]
    dcvae = [sys.executable, "-m", "dcvae_fast.cli"]

    def stopped() -> str:
        if missing := [module for module in FOR_TRAINING if not is_installed(module)]:
            raise harness.Absent(f"needs {', '.join(missing)}")
        begin, metrics = time.monotonic(), run / "metrics.jsonl"
        process = subprocess.Popen(train, cwd=out, stdout=sys.stderr)
        try:
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                if harness.ON_GPU and time.monotonic() > begin + TRAIN_SECONDS:
                    raise Failed(f"nothing was logged within {TRAIN_SECONDS} s")
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            if process.wait() != 128 + signal.SIGTERM:
                raise Failed(f"training exited with {process.returncode} instead of {128 + signal.SIGTERM}")
        finally:
            process.kill()
            process.wait()
        return f"{time.monotonic() - begin:.0f} s until the first log and a checkpoint"

    def call(*command: str) -> str:
        if not run.exists():
            raise harness.Absent("there is no training run")
        begin = time.monotonic()
        status = subprocess.run(command, cwd=out, stdout=sys.stderr).returncode
        if status:
            raise Failed(f"exit status {status}")
        return f"{time.monotonic() - begin:.0f} s"

    yield "train, stopped", stopped
    yield "train, resumed", partial(call, *train)
    yield "sample", partial(call, *dcvae, "sample", str(run))
    yield "reconstruct", partial(call, *dcvae, "reconstruct", str(run), "samples.png")


CHECKS = {"device": device_checks, "ops": ops_checks, "step": step_checks, "train": train_checks}


def main(arguments: list[str]) -> int:
    kind, *rest = arguments
    failed = False
    for name, check in CHECKS[kind](rest):
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except harness.Absent as error:
            print(f"skipped {name}: {error}", flush=True)
        except Exception as error:
            failed = True
            print(f"FAILED  {name}: {harness.one_sentence(error)}", flush=True)
            traceback.print_exc()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
