"""Several processes (gloo, on the CPU) do what one does, by torch and by DeepSpeed; and end well."""

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
    """As launchers start `count` ranks, without waiting."""
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
    """What they printed; all have to end in time."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the states of one process without DeepSpeed after each iteration."""
    folder = tmp_path_factory.mktemp("alone")
    for name, config in CASES.items():
        torch.save(record(config), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize(
    ("count", "engines"), [(1, "1"), (2, "torch,1"), pytest.param(2, "0,2", marks=pytest.mark.slow)]
)
def test_the_same_is_learned_by_any_number_of_ranks_and_any_engine(alone: Path, count: int, engines: str):
    """Compare weights, averages, batch statistics, queues and moments; also continue a training with another engine."""
    processes = start(count, [str(WORKER), str(alone), engines])
    printed = finish(processes)
    assert [process.returncode for process in processes] == [0] * count, "\n".join(printed)
    for name, config in CASES.items():
        step = TrainStep(config)
        step.load_state_dict(torch.load(alone / f"{name}-of-{count}.pt", weights_only=True))
        follow(step, torch.load(alone / f"{name}.pt", weights_only=True))


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
    mine = settings[int(os.environ["RANK"])] if isinstance(settings[0], list) else settings
    print("exit", cli._run(["train", *mine]), flush=True)
exit_process(0)
"""


def run_all(runs: list, count: int = 2) -> list[list[tuple[int, str]]]:
    """For each of these settings, or lists of settings by rank: each rank's exit code and what it printed."""
    processes = start(count, ["-c", RUN_ALL, json.dumps(runs)])
    printed = finish(processes)
    parts = [[part for part in re.split(r"^exit (\d+)$", text, flags=re.M)] for text in printed]
    assert all(len(part) == 2 * len(runs) + 1 for part in parts), "\n".join(printed)
    return [[(int(part[2 * i + 1]), part[2 * i]) for part in parts] for i in range(len(runs))]


def mistakes(tmp_path: Path) -> list[tuple[list, str]]:
    """Wrong settings, or lists of settings by rank, and the expected error message."""
    base = tiny(tmp_path / "run", 32)
    other = ["--recipe", "digits", "--train.images", "32", "--run", str(tmp_path / "run")]
    few = [f"{i}.png" for i in range(2)]
    for name in few:
        Image.new("L", (32, 32)).save(tmp_path / name)
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
        ([*base, "--train.batch", "9"], "train.batch is 9, which 2 ranks cannot share"),
        ([*base, "--train.sampled_batch", "7"], "train.sampled_batch is 7, which 2 ranks cannot share"),
        ([*base, "--train.batch", "2"], "train.batch leaves 1 image for each of 2 ranks"),
        ([base, other], "data.mirror is False on rank 1, but True on rank 0"),
        ([base, [*base, "--train.images", "48"]], "train.images is 48 on rank 1, but 32 on rank 0"),
        ([base, [*base, "--log.every", "16"]], "log.every is 16 on rank 1, but 32 on rank 0"),
        ([base, [*base, "--train.batch", "x"]], "train.batch"),
        (
            [*base, "--data.name", "folder", "--data.root", str(tmp_path)],
            "has fewer images, 1, than there are ranks, 2",
        ),
        (json_file("missing"), "missing.json cannot be read (No such file or directory)"),
        (json_file("empty"), "empty.json is not valid JSON"),
        (json_file("stage3"), "zero_optimization.stage is 3; it must be 0, 1 or 2: stage 3 cuts up the weights too"),
        (json_file("batch"), "train_batch_size is 16, but train.batch on 2 ranks"),
        (json_file("bf16"), "bf16.enabled is True, but train.precision float32 makes it False"),
        (json_file("adam"), "optimizer cannot be set here: Adam's settings are those of the recipe's section optim"),
        (json_file("clip"), "gradient_clipping is 1, but the method, which clips none, makes it 0"),
        (json_file("kind"), "zero_optimization.overlap_comm is 'yes'; it must be true or false"),
        (json_file("half"), "communication_data_type is 'fp16', but the type of the gradients makes it 'fp32'"),
        ([*growing, "--growth.batch", "{4: 4, 8: 6}"], "growth.batch[4] leaves 2 images for each of 2 ranks, too few"),
        ([*growing, "--growth.batch", "{4: 8, 8: 12}", "--train.micro_batch", "4"], "growth.batch[8] leaves 6 images"),
        ([*base, "--train.device", "cuda:0"], "the device is 'cuda:0', but each of 2 ranks needs its own"),
    ]


def whole_and_broken(tmp_path: Path) -> list[list[str]]:
    """Settings of a run, and of a run with an unreadable image."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        Image.effect_noise((32, 32), 50 + i).save(images / f"{i:02d}.png")
    (images / "21.png").write_bytes(b"damaged")
    damaged = ["--data.name", "folder", "--data.root", str(images), "--train.n_critic", "1"]
    return [tiny(tmp_path / "run", 64, *SMOOTH), tiny(tmp_path / "broken", 800, *damaged)]


class Launched(NamedTuple):
    """Results of runs on two ranks that share one start. Each run has, per rank, the exit code and the output."""

    mistakes: list[tuple[list, str]]
    of_mistakes: list[list[tuple[int, str]]]
    wrong: Path
    of_runs: list[list[tuple[int, str]]]
    folder: Path


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    wrong, folder = tmp_path_factory.mktemp("wrong"), tmp_path_factory.mktemp("runs")
    cases = mistakes(wrong)
    found = run_all([*(case for case, _ in cases), *whole_and_broken(folder)])
    return Launched(cases, found[: len(cases)], wrong, found[len(cases) :], folder)


def test_one_rank_says_what_is_wrong_and_none_hangs(launched: Launched):
    for (settings, message), (first, second) in zip(launched.mistakes, launched.of_mistakes, strict=True):
        assert first[0] == second[0] == 1, settings
        said = [text for _, text in (first, second) if "dcvae: error:" in text]
        assert len(said) == 1 and message in said[0], (settings, first, second)
    assert not (launched.wrong / "run").exists()


def test_a_run_of_two_ranks_is_one_run(launched: Launched):
    """There is one log, one checkpoint and one set of pictures; an unreadable image stops all ranks without loss."""
    (first, second), (one, other) = launched.of_runs
    assert first[0] == second[0] == 0 and "64 images shown" in first[1] and not second[1].strip()

    run, alone = launched.folder / "run", launched.folder / "alone"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000000000032.pt", "000000000064.pt"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert len(list((run / "grids").iterdir())) == 3
    # A single process continues the run.
    for folder in (run, alone):
        train(parse_config(tiny(folder, 80, *SMOOTH)).config, folder)
    lines, expected = map(read_metrics, (run, alone))
    # Ten iterations amplify rounding errors, on some processors to 3e-4 in batch statistics. The test above compares
    # each iteration strictly.
    for line, mine in zip(lines, expected, strict=True):  # means over the ranks are those over the whole batch
        assert line.keys() == mine.keys()
        for name in line.keys() - {"images_per_second", "waiting_for_data"}:
            assert line[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-5), name
    mine, theirs = (load_checkpoint(folder) for folder in (run, alone))
    assert mine is not None and theirs is not None and mine["sources"] == theirs["sources"]
    for name, value in theirs["step"]["networks"].items():
        rtol = 3e-3 if "running" in name else 3e-5
        torch.testing.assert_close(mine["step"]["networks"][name], value, rtol=rtol, atol=1e-5)

    assert one[0] == other[0] == 1
    said = [text for _, text in (one, other) if "dcvae: error:" in text]
    assert len(said) == 1 and "21.png" in said[0]
    state = load_checkpoint(launched.folder / "broken")
    assert state is not None and [source["images"] for source in state["sources"]] == [state["step"]["images"]] * 2


def test_when_a_rank_is_stopped_or_dies_all_end_and_the_run_goes_on(tmp_path: Path):
    run = tmp_path / "run"
    for engine, ending in (("torch", signal.SIGTERM), ("deepspeed", signal.SIGKILL)):
        before = set(run.glob("checkpoints/*.pt"))
        options = tiny(run, 1_000_000, "--log.keep", "100", "--train.engine", engine)
        processes = start(2, [str(ROOT / "train.py"), *options])
        while not set(run.glob("checkpoints/*.pt")) - before:
            assert all(process.poll() is None for process in processes), finish(processes, 1)
            time.sleep(0.05)
        processes[1].send_signal(ending)
        printed = finish(processes, seconds=60)
        codes = [process.returncode for process in processes]
        if ending == signal.SIGTERM:
            assert codes == [143, 143], printed
            assert "run the same command to resume" in printed[0]
        else:
            assert codes == [1, -signal.SIGKILL] and "dcvae: error: another rank has ended" in printed[0], printed
    state = load_checkpoint(run)
    assert state is not None
    images = state["step"]["images"]
    train(parse_config(tiny(run, images + 8, "--train.engine", "torch")).config, run)
    assert (run / "checkpoints" / f"{images + 8:012d}.pt").is_file()


def test_an_engine_or_an_adam_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"train\.engine is deepspeed, which cannot be imported"):
        TrainStep(replace(FIXED, train=replace(FIXED.train, engine="deepspeed")))
    monkeypatch.setitem(sys.modules, "apex", None)
    step = TrainStep(replace(FIXED, optim=replace(FIXED.optim, implementation="apex")))
    with pytest.raises(ConfigError, match=r"NVIDIA's Apex \(apex\.optimizers; not the package called apex"):
        advance(step, 1)
