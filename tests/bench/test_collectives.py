"""What is counted is what the networks' sizes say; the arithmetic on it; the guide's tables come from the result."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import collectives
import records
from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config
from dcvae_fast.training.engine import Engine
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch

RECIPE = """
data: {name: folder}
model: {architecture: progressive, resolution: 16, latent_dim: 6, base_channels: 64, max_channels: 8, contrast_dim: 5}
growth: {start: 16, fade_images: 96, stable_images: 96, batch: {16: 8}}
loss: {adversarial: wgan_gp}
contrast: {negatives: 10, layers: [low, final]}
train: {images: 96, sampled_batch: null, n_critic: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def counted(recipe: Path) -> dict[str, dict[str, Any]]:
    """Rows of two ranks, by engine."""
    out = recipe.with_name("collectives.json")
    script = [str(records.ROOT / "bench" / "collectives.py"), "--recipe", str(recipe), "--engines", "torch,1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, *script, "--out", str(out)],
            env={**common, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return {row["engine"]: row for row in records.read(out)["rows"]}


def total(row: dict[str, Any], purpose: str) -> tuple[float, float]:
    """Calls and bytes."""
    chosen = [each for each in row["collectives"] if each["purpose"] == purpose]
    return sum(each["calls"] for each in chosen), sum(each["bytes"] for each in chosen)


def stepped(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parameters that get gradients, at each optimizer step of an iteration of one process."""
    sizes = []
    monkeypatch.setattr(Engine, "_average", lambda _, gradients: sizes.append(sum(x.numel() for x in gradients)))
    TrainStep(config)(Batch(torch.rand(4, 3, 16, 16), torch.arange(4)))
    return sizes


@pytest.mark.slow
@pytest.mark.multiprocess
def test_counted_are_the_parameters_and_the_keys(recipe, counted, monkeypatch):
    config = parse_config(["--recipe", str(recipe)]).config
    sizes = stepped(config, monkeypatch)
    for engine, row in counted.items():
        calls, size = total(row, "gradients")
        assert size == 4 * sum(sizes), engine
        assert engine != "torch" or calls == len(sizes) == 3
        scales, batch, dim = 2, row["batch"], 5
        assert total(row, "keys") == (2, scales * batch * dim * 4 + batch * 8)
        assert total(row, "message") == (1, 8)
    assert {each["purpose"] for each in counted["torch"]["collectives"]} == {"gradients", "keys", "message"}
    # ZeRO pads what it gathers of each group of weights to a multiple of two elements for each rank.
    calls, size = total(counted["1"], "weights")
    assert 0 <= size - 4 * sum(sizes) < 4 * 2 * 2 * calls


def test_seconds():
    assert collectives.seconds("all_reduce", 3, 400e9, 8) == pytest.approx(3 * 30e-6 + 2 * 7 / 8)
    assert collectives.seconds("all_gather", 1, 50e9, 64) == pytest.approx(60e-6 + 63 / 64)


def test_efficiency():
    """By hand, of 150 TFLOP in 1,000 operators on each of 8 GPUs, with an all-reduce of 400 GB."""
    reduction = {"purpose": "gradients", "kind": "all_reduce", "calls": 1, "bytes": 400e9}
    row = {"batch": 4, "operators": 1000, "collectives": [reduction]}
    cost = {"flops": 150e12, "batch": 16, "per_rank": True}
    assert collectives.efficiency(row, row, cost, 8) == pytest.approx(1 / (1 + 30e-6 + 1.75))
    shared = {**cost, "per_rank": False}  # an eighth of the batch on each
    assert collectives.efficiency(row, row, shared, 8) == pytest.approx(1 / (1 / 8 + 30e-6 + 1.75) / 8)


def test_the_guide_has_the_committed_numbers():
    document = records.read(records.COMMITTED / "cpu" / "collectives.json")
    guide = (records.ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name, table in collectives.tables(document).items():
        assert table in guide, name
