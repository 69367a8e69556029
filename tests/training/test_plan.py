"""Plans against real training: FLOPs of iterations, number of iterations, and memory."""

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


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of convolutions and matrix products on the CPU."""

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
    """Return the FLOPs of real iterations after `images` images, averaged over the first few."""
    step.images = images
    step.grow(step.schedule)
    batch = batch_at(step)
    with FlopCounter() as counter:
        for iteration in range(iterations):
            step.images, step.iterations = images, iteration
            step(batch)
    return counter.flops / iterations


@pytest.fixture(scope="module")
def stages() -> list[tuple[StageRange, Cost]]:
    return list(zip(stage_ranges(CONFIG), stage_costs(TrainStep(CONFIG, "meta")), strict=True))


def test_costs_equal_those_of_real_iterations(stages: list[tuple[StageRange, Cost]]):
    assert [str(stage_range) for stage_range, _ in stages] == ["4×4", "8×8 fading", "8×8", "16×16 fading", "16×16"]
    step = TrainStep(CONFIG)
    for stage_range, cost in stages:
        assert cost.flops == real_flops(step, stage_range.stage.begin + 1) > 0, str(stage_range)
        assert cost.networks == sum(tensor.nbytes for tensor in step.networks.state_dict().values())


def test_moments_equal_those_of_real_training(stages: list[tuple[StageRange, Cost]]):
    step, sizes = TrainStep(CONFIG), {}
    while step.images < TRAIN.images:
        if step.schedule.resolution != step.resolution:
            step.grow(step.schedule)
        step(batch_at(step))
        moments = step.engine.moments().values()
        sizes[step.resolution, step.alpha < 1] = sum(m.exp_avg.nbytes + m.exp_avg_sq.nbytes for m in moments)
    assert sizes == {(s.stage.resolution, s.stage.fades): cost.moments for s, cost in stages}


@pytest.mark.parametrize("config", [CONFIG, FIXED], ids=["progressive", "autogan"])
def test_flops_are_averaged_over_autoencoder_updates_and_penalties(config: Config):
    loss = LossConfig(adversarial="logistic_r1", penalty_every=3)
    config = replace(config, loss=loss, train=replace(TRAIN, n_critic=2))
    step = TrainStep(config, "meta")
    assert iteration_flops(step, batch_at(step)) == real_flops(TrainStep(config), images=0, iterations=6)
    assert step.images == 0


@pytest.mark.parametrize("images", [0, 1, 28, 29, 100, 140, 10_000])
@pytest.mark.parametrize("fade_images", [0, 2, 20])  # a fade of 2 images is shorter than a batch
def test_stage_ranges_cover_all_images(images: int, fade_images: int):
    growth = replace(CONFIG.growth, fade_images=fade_images)
    config = replace(CONFIG, growth=growth, train=replace(TRAIN, images=images))
    ranges = stage_ranges(config)
    assert sum(r.last - r.first for r in ranges) == images
    assert [r.first for r in ranges] == [0, *(r.last for r in ranges)][: len(ranges)]

    iterations, shown = Counter(), 0
    while shown < images:
        schedule = schedule_at(config, shown)
        iterations[schedule.resolution, schedule.alpha < 1, schedule.batch] += 1
        shown += schedule.batch
    assert iterations == {(r.stage.resolution, r.stage.fades, r.batch): r.iterations for r in ranges}


def test_report_for_growing_networks(stages: list[tuple[StageRange, Cost]]):
    images = ImageSet("noise", torch.zeros(70, 3, 16, 16, dtype=torch.uint8), None)
    report = plan(CONFIG, images, torch.device("cpu"))
    assert "forward, at 16×16" in report
    assert "140 images = 2.0 epochs of 70 = 22 iterations; 1 in 1 updates the autoencoder" in report
    rows = [line.split()[-6:] for line in report.splitlines() if line.startswith(("4×4", "8×8", "16×16"))]
    assert [tuple(map(int, row[:4])) for row in rows] == [
        (0, 32, 4, 8),
        (32, 48, 2, 8),
        (48, 80, 4, 8),
        (80, 100, 4, 5),
        (100, 140, 8, 5),
    ]
    for row, (stage_range, cost) in zip(rows, stages, strict=True):
        assert float(row[4]) == pytest.approx(cost.flops / stage_range.batch / 1e9, abs=5e-4)
    assert "; the maximum is at 16×16 fading" in report and "float32" not in report


def test_report_has_only_stages_that_training_reaches():
    images = ImageSet("noise", torch.zeros(70, 3, 16, 16, dtype=torch.uint8), None)
    short = replace(CONFIG, train=replace(TRAIN, images=30, precision="bfloat16"))
    report = plan(short, images, torch.device("cpu"))
    assert "\n4×4" in report and "\n8×8" not in report
    assert "counted in float32" in report


def test_peak_memory_excludes_existing_tensors():
    excluded, other = torch.zeros(100, device="meta"), torch.zeros(10, device="meta")
    with PeakMemory(exclude=[excluded]) as peak:
        excluded.mul_(2)
        freed = excluded[:50] * 2  # 200 bytes
        del freed
        other.add_(1)  # 40 bytes
        _product = excluded * other[0]  # 400 bytes
    assert peak.peak == 440


def test_training_flops_sum_all_or_the_remaining_iterations(
    stages: list[tuple[StageRange, Cost]], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("dcvae_fast.training.plan.stage_costs", lambda step: [cost for _, cost in stages])
        assert training_flops(CONFIG) == sum(stage_range.iterations * cost.flops for stage_range, cost in stages)
        last, cost = stages[-1]
        assert training_flops(CONFIG, last.first + last.batch) == (last.iterations - 1) * cost.flops
        assert training_flops(CONFIG, 10**9) == 0
    step = TrainStep(FIXED, "meta")
    assert training_flops(FIXED) == pytest.approx(-(-TRAIN.images // 4) * iteration_flops(step, batch_at(step)))
