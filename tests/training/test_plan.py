"""Plans against what training does: arithmetic of real iterations, how many there are, what stays in memory."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dcvae_fast.config import Config, ContrastConfig, GrowthConfig, LossConfig, ModelConfig, TrainConfig
from dcvae_fast.training.plan import (
    Cost,
    PeakMemory,
    StageRange,
    iteration_flops,
    plan,
    stage_costs,
    stage_ranges,
    training_flops,
)
from dcvae_fast.training.schedule import schedule_at
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch, ImageSet

TRAIN = TrainConfig(images=140, batch=4, sampled_batch=None, n_critic=1)
CONFIG = Config(
    model=ModelConfig("progressive", 16, latent_dim=6, base_channels=64, max_channels=8, contrast_dim=5),
    growth=GrowthConfig(fade_images=20, stable_images=28, batch={4: 8, 8: 8, 16: 5}),
    loss=LossConfig(adversarial="wgan_gp"),
    contrast=ContrastConfig(negatives=10, layers=("low", "final")),
    train=TRAIN,
)
FIXED = Config(
    model=ModelConfig(latent_dim=6, decoder_width=8, encoder_width=4, discriminator_width=4, contrast_dim=5),
    contrast=ContrastConfig(negatives=10),
    train=TRAIN,
)


class Arithmetic(TorchDispatchMode):
    """Counts what convolutions and matrix products of the CPU take."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def batch_at(step: TrainStep) -> Batch:
    n, resolution = step.schedule.batch, step.schedule.resolution
    images = torch.zeros(n, step.config.model.image_channels, resolution, resolution, device=step.device)
    return Batch(images, torch.zeros(n, dtype=torch.int64, device=step.device))


def real_flops(step: TrainStep, images: int, iterations: int = 1) -> float:
    """Of a real iteration at this point of the growth, the mean over the first few."""
    step.images = images
    step.grow(step.schedule)
    batch = batch_at(step)
    with Arithmetic() as arithmetic:
        for iteration in range(iterations):
            step.images, step.iterations = images, iteration
            step(batch)
    return arithmetic.flops / iterations


@pytest.fixture(scope="module")
def stages() -> list[tuple[StageRange, Cost]]:
    return list(zip(stage_ranges(CONFIG), stage_costs(TrainStep(CONFIG, "meta")), strict=True))


def test_each_stage_takes_what_its_real_iterations_do(stages: list[tuple[StageRange, Cost]]):
    assert [str(stretch) for stretch, _ in stages] == ["4×4", "8×8 fading", "8×8", "16×16 fading", "16×16"]
    step = TrainStep(CONFIG)
    for stretch, cost in stages:
        assert cost.flops == real_flops(step, stretch.stage.begin + 1) > 0, str(stretch)
        assert cost.networks == sum(tensor.nbytes for tensor in step.networks.state_dict().values())


def test_moments_are_those_that_training_keeps(stages: list[tuple[StageRange, Cost]]):
    step, kept = TrainStep(CONFIG), {}
    while step.images < TRAIN.images:
        if step.schedule.resolution != step.resolution:
            step.grow(step.schedule)
        step(batch_at(step))
        found = step.engine.moments().values()
        moments = sum(moment.exp_avg.nbytes + moment.exp_avg_sq.nbytes for moment in found)
        kept[step.resolution, step.alpha < 1] = moments
    assert kept == {(stretch.stage.resolution, stretch.stage.fades): cost.moments for stretch, cost in stages}


@pytest.mark.parametrize("config", [CONFIG, FIXED], ids=["progressive", "autogan"])
def test_arithmetic_is_averaged_over_what_not_every_iteration_does(config: Config):
    loss = LossConfig(adversarial="logistic_r1", penalty_every=3)
    config = replace(config, loss=loss, train=replace(TRAIN, n_critic=2))
    step = TrainStep(config, "meta")
    assert iteration_flops(step, batch_at(step)) == real_flops(TrainStep(config), images=0, iterations=6)
    assert step.images == 0


@pytest.mark.parametrize("images", [0, 1, 28, 29, 100, 140, 10_000])
@pytest.mark.parametrize("fade_images", [0, 2, 20])  # of 2, a batch goes beyond it
def test_stages_share_all_images_among_them(images: int, fade_images: int):
    growth = replace(CONFIG.growth, fade_images=fade_images)
    config = replace(CONFIG, growth=growth, train=replace(TRAIN, images=images))
    passed = stage_ranges(config)
    assert sum(stretch.last - stretch.first for stretch in passed) == images
    assert [stretch.first for stretch in passed] == [0, *(stretch.last for stretch in passed)][: len(passed)]

    iterations, shown = Counter(), 0
    while shown < images:
        now = schedule_at(config, shown)
        iterations[now.resolution, now.alpha < 1, now.batch] += 1
        shown += now.batch
    assert iterations == {(p.stage.resolution, p.stage.fades, p.batch): p.iterations for p in passed}


def test_a_page_for_networks_that_grow(stages: list[tuple[StageRange, Cost]]):
    images = ImageSet("noise", torch.zeros(70, 3, 16, 16, dtype=torch.uint8), None)
    page = plan(CONFIG, images, torch.device("cpu"))
    assert "forward, at 16×16" in page
    assert "140 images = 2.0 epochs of 70 = 22 iterations; the autoencoder is stepped in 1 of 1" in page
    rows = [line.split()[-6:] for line in page.splitlines() if line.startswith(("4×4", "8×8", "16×16"))]
    assert [tuple(map(int, row[:4])) for row in rows] == [
        (0, 32, 4, 8),
        (32, 48, 2, 8),
        (48, 80, 4, 8),
        (80, 100, 4, 5),
        (100, 140, 8, 5),
    ]
    for row, (stretch, cost) in zip(rows, stages, strict=True):
        assert float(row[4]) == pytest.approx(cost.flops / stretch.batch / 1e9, abs=5e-4)
    assert "; the most, at 16×16 fading" in page and "float32" not in page


def test_a_page_ends_where_training_does():
    images = ImageSet("noise", torch.zeros(70, 3, 16, 16, dtype=torch.uint8), None)
    short = replace(CONFIG, train=replace(TRAIN, images=30, precision="bfloat16"))
    page = plan(short, images, torch.device("cpu"))
    assert "\n4×4" in page and "\n8×8" not in page
    assert "counted in float32" in page


def test_peak_memory_leaves_out_what_was_there():
    there, more = torch.zeros(100, device="meta"), torch.zeros(10, device="meta")
    with PeakMemory(besides=[there]) as peak:
        there.mul_(2)
        made = there[:50] * 2  # 200 bytes
        del made
        more.add_(1)  # 40
        _kept = there * more[0]  # 400
    assert peak.peak == 440


def test_a_whole_training_takes_its_iterations_and_less_once_some_are_done(
    stages: list[tuple[StageRange, Cost]], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("dcvae_fast.training.plan.stage_costs", lambda step: [cost for _, cost in stages])
        assert training_flops(CONFIG) == sum(stretch.iterations * cost.flops for stretch, cost in stages)
        last, cost = stages[-1]
        assert training_flops(CONFIG, last.first + last.batch) == (last.iterations - 1) * cost.flops
        assert training_flops(CONFIG, 10**9) == 0
    step = TrainStep(FIXED, "meta")
    assert training_flops(FIXED) == pytest.approx(-(-TRAIN.images // 4) * iteration_flops(step, batch_at(step)))
