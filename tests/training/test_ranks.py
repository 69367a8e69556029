"""Several ranks (gloo, on the CPU) match one process, with torch and DeepSpeed; errors and signals end all ranks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from dcvae_fast.commands.train import parse_config
from dcvae_fast.errors import ConfigError
from dcvae_fast.run_folder import load_checkpoint, read_metrics
from dcvae_fast.training.loop import train
from dcvae_fast.training.step import TrainStep
from ranks_worker import CASES, FIXED, advance, follow, record

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.multiprocess
TINY = Path(__file__).parent.parent / "tiny.yaml"
WORKER = Path(__file__).with_name("ranks_worker.py")


def start(count: int, command: list[str], **environment: str) -> list[subprocess.Popen]:
    """Start `count` ranks with a launcher's environment, without waiting for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_SIZE": str(count),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[str]:
    """Return the output of each process. Kill all processes if one does not end in time."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the states of one process without DeepSpeed after each iteration."""
    folder = tmp_path_factory.mktemp("reference")
    for name, config in CASES.items():
        torch.save(record(config), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize(
    ("count", "engines"), [(1, "1"), (2, "torch,1"), pytest.param(2, "0,2", marks=pytest.mark.slow)]
)
def test_any_number_of_ranks_and_any_engine_match_one_process(reference: Path, count: int, engines: str):
    """Compare weights, EMAs, batch statistics, queues and moments, and resume training with another engine."""
    processes = start(count, [str(WORKER), str(reference), engines])
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    for name, config in CASES.items():
        step = TrainStep(config)
        step.load_state_dict(torch.load(reference / f"{name}-of-{count}.pt", weights_only=True))
        follow(step, torch.load(reference / f"{name}.pt", weights_only=True))


# With the default ε, Adam makes full steps from gradients that are rounding errors.
SMOOTH = ["--optim.eps", "0.1"]


def tiny(folder: Path, images: int, *more: str) -> list[str]:
    return ["--recipe", str(TINY), "--train.images", str(images), "--run", str(folder), *more]


RUN_ALL = """
import json, os, sys
from dcvae_fast import cli
from dcvae_fast.console import configure_logging
from dcvae_fast.distributed import exit_process
configure_logging()
for settings in json.loads(sys.argv[1]):
    arguments = settings[int(os.environ["RANK"])] if isinstance(settings[0], list) else settings
    print("exit", cli._run(["train", *arguments]), flush=True)
exit_process(0)
"""


def run_all(runs: list, count: int = 2) -> list[list[tuple[int, str]]]:
    """Run these settings, or lists of settings by rank; return, for each, the exit code and output of each rank."""
    processes = start(count, ["-c", RUN_ALL, json.dumps(runs)])
    outputs = finish(processes)
    by_rank = [re.split(r"^exit (\d+)$", output, flags=re.M) for output in outputs]
    assert all(len(parts) == 2 * len(runs) + 1 for parts in by_rank), "\n".join(outputs)
    return [[(int(parts[2 * i + 1]), parts[2 * i]) for parts in by_rank] for i in range(len(runs))]


def mistakes(tmp_path: Path) -> list[tuple[list, str]]:
    """Return wrong settings, or lists of settings by rank, and the expected error message."""
    base = tiny(tmp_path / "run", 32)
    other_recipe = ["--recipe", "digits", "--train.images", "32", "--run", str(tmp_path / "run")]
    for i in range(2):
        Image.new("L", (32, 32)).save(tmp_path / f"{i}.png")
    files = {"stage3": {"zero_optimization": {"stage": 3}}, "batch": {"train_batch_size": 16}, "empty": None}
    files |= {
        "bf16": {"bf16": {"enabled": True}},
        "adam": {"optimizer": {"type": "AdamW"}},
        "clip": {"gradient_clipping": 1},
    }
    files |= {"kind": {"zero_optimization": {"overlap_comm": "yes"}}, "half": {"communication_data_type": "fp16"}}
    growing = ["--recipe", "faces-small", "--model.resolution", "8", "--contrast.layers", "[final]", *base[2:]]
    growing += ["--data.root", str(tmp_path)]
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text("{" if content is None else json.dumps(content))

    def json_file(name: str) -> list[str]:
        return [*base, "--deepspeed_config", str(tmp_path / f"{name}.json")]

    return [
        ([*base, "--train.batch", "9"], "train.batch is 9, which cannot be divided among 2 ranks"),
        ([*base, "--train.sampled_batch", "7"], "train.sampled_batch is 7, which cannot be divided among 2 ranks"),
        ([*base, "--train.batch", "2"], "train.batch leaves 1 image for each of 2 ranks"),
        ([base, other_recipe], "data.mirror is False on rank 1, but True on rank 0"),
        ([base, [*base, "--train.images", "48"]], "train.images is 48 on rank 1, but 32 on rank 0"),
        ([base, [*base, "--log.every", "16"]], "log.every is 16 on rank 1, but 32 on rank 0"),
        ([base, [*base, "--train.batch", "x"]], "train.batch"),
        (
            [*base, "--data.name", "folder", "--data.root", str(tmp_path)],
            "has 1 images, fewer than the 2 ranks",
        ),
        (json_file("missing"), "missing.json cannot be read (No such file or directory)"),
        (json_file("empty"), "empty.json is not valid JSON"),
        (json_file("stage3"), "zero_optimization.stage is 3; it must be 0, 1 or 2: stage 3 shards the weights too"),
        (json_file("batch"), "train_batch_size is 16; it must be 8 (train.batch on 2 ranks)"),
        (json_file("bf16"), "bf16.enabled is True; it must be False (train.precision is float32)"),
        (json_file("adam"), "optimizer cannot be set here: use the recipe's section optim"),
        (json_file("clip"), "gradient_clipping is 1; it must be 0 (gradients are not clipped)"),
        (json_file("kind"), "zero_optimization.overlap_comm is 'yes'; it must be true or false"),
        (json_file("half"), "communication_data_type is 'fp16'; it must be 'fp32' (gradients are float32)"),
        (
            [*growing, "--growth.batch", "{4: 8, 8: 12}", "--growth.stddev_group", "4"],
            "growth.batch[8] leaves 6 images for each of 2 ranks, but the minibatch standard deviation covers 4 images;"
            " set the batch of each rank with --train.batch_per_rank true, or use --growth.stddev_group 4 with a"
            " multiple of 8.",
        ),
        (
            growing,
            "growth.batch[4] leaves 8 images for each of 2 ranks, but the minibatch standard deviation covers 16",
        ),
        (
            [*growing, "--model.variant", "port"],
            "covers 16 images; set the batch of each rank with --train.batch_per_rank true.",
        ),
        ([*base, "--train.device", "cuda:0"], "the device is 'cuda:0', but each of 2 ranks needs its own"),
    ]


def intact_and_broken(tmp_path: Path) -> list[list[str]]:
    """Return the settings of a run, and of a run with an unreadable image."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        Image.effect_noise((32, 32), 50 + i).save(images / f"{i:02d}.png")
    (images / "21.png").write_bytes(b"damaged")
    damaged = ["--data.name", "folder", "--data.root", str(images), "--train.n_critic", "1"]
    return [tiny(tmp_path / "run", 64, *SMOOTH), tiny(tmp_path / "broken", 800, *damaged)]


class Launched(NamedTuple):
    """Runs with and without mistakes in the same two processes. Results are exit code and output, by run and rank."""

    mistakes: list[tuple[list, str]]
    mistake_results: list[list[tuple[int, str]]]
    mistake_folder: Path
    results: list[list[tuple[int, str]]]
    folder: Path


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    mistake_folder, folder = tmp_path_factory.mktemp("mistakes"), tmp_path_factory.mktemp("runs")
    cases = mistakes(mistake_folder)
    results = run_all([*(case for case, _ in cases), *intact_and_broken(folder)])
    return Launched(cases, results[: len(cases)], mistake_folder, results[len(cases) :], folder)


def test_errors_are_reported_once_and_end_all_ranks(launched: Launched):
    for (settings, message), results in zip(launched.mistakes, launched.mistake_results, strict=True):
        assert [code for code, _ in results] == [1, 1], settings
        errors = [output for _, output in results if "dcvae: error:" in output]
        assert len(errors) == 1 and message in errors[0], (settings, results)
    assert not (launched.mistake_folder / "run").exists()


def test_two_ranks_write_one_run(launched: Launched):
    """Two ranks write one log, one set of checkpoints and grids. An unreadable image stops both after a checkpoint."""
    (first, second), broken = launched.results
    assert first[0] == second[0] == 0 and "64 images shown" in first[1] and not second[1].strip()

    run, single = launched.folder / "run", launched.folder / "single"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000000000032.pt", "000000000064.pt"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert len(list((run / "grids").iterdir())) == 3
    # A single process continues the run.
    for folder in (run, single):
        train(parse_config(tiny(folder, 80, *SMOOTH)).config, folder)
    # Ten iterations amplify rounding errors, on some processors to 3e-4 in batch statistics. The test above compares
    # each iteration strictly.
    for line, expected in zip(read_metrics(run), read_metrics(single), strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - {"images_per_second", "waiting_for_data"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    state, expected = (load_checkpoint(folder) for folder in (run, single))
    assert state is not None and expected is not None and state["sources"] == expected["sources"]
    for name, value in expected["step"]["networks"].items():
        rtol = 3e-3 if "running" in name else 3e-5
        torch.testing.assert_close(state["step"]["networks"][name], value, rtol=rtol, atol=1e-5)

    assert [code for code, _ in broken] == [1, 1]
    errors = [output for _, output in broken if "dcvae: error:" in output]
    assert len(errors) == 1 and "21.png" in errors[0]
    state = load_checkpoint(launched.folder / "broken")
    assert state is not None and [source["images"] for source in state["sources"]] == [state["step"]["images"]] * 2


def test_a_stopped_or_killed_rank_ends_all_and_the_run_can_be_resumed(tmp_path: Path):
    run = tmp_path / "run"
    for engine, ending in (("torch", signal.SIGTERM), ("deepspeed", signal.SIGKILL)):
        previous = set(run.glob("checkpoints/*.pt"))
        options = tiny(run, 1_000_000, "--log.keep", "100", "--train.engine", engine)
        processes = start(2, [str(ROOT / "train.py"), *options])
        while not set(run.glob("checkpoints/*.pt")) - previous:
            assert all(process.poll() is None for process in processes), finish(processes, 1)
            time.sleep(0.05)
        processes[1].send_signal(ending)
        outputs = finish(processes, seconds=60)
        codes = [process.returncode for process in processes]
        if ending == signal.SIGTERM:
            assert codes == [143, 143], outputs
            assert "run the same command to resume" in outputs[0]
        else:
            assert codes == [1, -signal.SIGKILL] and "dcvae: error: another rank has ended" in outputs[0], outputs
    state = load_checkpoint(run)
    assert state is not None
    images = state["step"]["images"]
    train(parse_config(tiny(run, images + 8, "--train.engine", "torch")).config, run)
    assert (run / "checkpoints" / f"{images + 8:012d}.pt").is_file()


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"train\.engine is deepspeed, which cannot be imported"):
        TrainStep(replace(FIXED, train=replace(FIXED.train, engine="deepspeed")))
    monkeypatch.setitem(sys.modules, "apex", None)
    step = TrainStep(replace(FIXED, optim=replace(FIXED.optim, implementation="apex")))
    with pytest.raises(ConfigError, match=r"NVIDIA's Apex \(apex\.optimizers; not the package called apex"):
        advance(step, 1)
