"""Several processes (gloo, on the CPU) do what one does, by torch and by DeepSpeed; and end well."""

import os
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from ranks_worker import CASES, HALF, ITERATIONS, advance, assert_same, learned
from dcvae_fast.training.step import TrainStep

pytestmark = pytest.mark.multiprocess
WORKER = Path(__file__).with_name("ranks_worker.py")


def start(count: int, command: list[str], **environment: str) -> list[subprocess.Popen]:
    """As launchers start `count` ranks, without waiting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[str]:
    """What they printed; all have to end in time."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process without DeepSpeed learns."""
    folder = tmp_path_factory.mktemp("alone")
    for name, config in CASES.items():
        step = TrainStep(config)
        advance(step, HALF)
        half = deepcopy(step.state_dict())
        advance(step, ITERATIONS)
        torch.save({"half": half, "learned": learned(step)}, folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize(("count", "engines"), [(1, "0,1"), (2, "torch,0,1,2")])
def test_the_same_is_learned_by_any_number_of_ranks_and_any_engine(alone: Path, count: int, engines: str):
    """And at half-time any other may go on with it; weights, averages, queues, moments."""
    processes = start(count, [str(WORKER), str(alone), engines])
    printed = finish(processes)
    assert [process.returncode for process in processes] == [0] * count, "\n".join(printed)
    for name, config in CASES.items():
        step = TrainStep(config)
        step.load_state_dict(torch.load(alone / f"{name}-of-{count}.pt", weights_only=True))
        advance(step, ITERATIONS)
        assert_same(learned(step), torch.load(alone / f"{name}.pt", weights_only=True)["learned"])
