"""Growth schedules against a table, and settings that are rejected."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config, ContrastConfig, GrowthConfig, ModelConfig, OptimConfig, TrainConfig
from dcvae_fast.errors import ConfigError
from dcvae_fast.training.schedule import ScheduleState, Stage, schedule_at, stages


@pytest.fixture(scope="module")
def celebahq512() -> Config:
    return parse_config(["--recipe", "celebahq512"])[0]


def config(resolution: int = 16, layers: tuple = ("final",), **growth) -> Config:
    return Config(
        model=ModelConfig("progressive", resolution),
        growth=GrowthConfig(**growth),
        contrast=ContrastConfig(layers=layers),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(sampled_batch=None),
    )


@pytest.mark.parametrize(
    ("images", "resolution", "alpha", "batch"),
    [
        (0, 4, 1.0, 16),  # the first resolution does not fade in
        (599_999, 4, 1.0, 16),
        (600_000, 8, 0.0, 16),
        (600_016, 8, 16 / 600_000, 16),
        (900_000, 8, 0.5, 16),
        (1_199_999, 8, 599_999 / 600_000, 16),
        (1_200_000, 8, 1.0, 16),
        (1_799_999, 8, 1.0, 16),
        (1_800_000, 16, 0.0, 16),
        (3_000_000, 32, 0.0, 16),
        (4_200_000, 64, 0.0, 16),
        (5_400_000, 128, 0.0, 16),
        (6_000_000, 128, 1.0, 16),
        (6_599_999, 128, 1.0, 16),
        (6_600_000, 256, 0.0, 14),
        (7_199_999, 256, 599_999 / 600_000, 14),
        (7_200_000, 256, 1.0, 14),
        (7_799_999, 256, 1.0, 14),
        (7_800_000, 512, 0.0, 6),
        (7_950_000, 512, 0.25, 6),
        (8_399_999, 512, 599_999 / 600_000, 6),
        (8_400_000, 512, 1.0, 6),
        (9_000_000, 512, 1.0, 6),  # the last stage has no end
        (10**12, 512, 1.0, 6),
    ],
)
def test_celebahq512_grows_as_progressive_gan(celebahq512: Config, images, resolution, alpha, batch):
    assert schedule_at(celebahq512, images) == ScheduleState(resolution, alpha, batch, 1e-3)


def test_stages_follow_one_another():
    assert stages(config(fade_images=30, stable_images=50)) == [
        Stage(4, 0, 50, fades=False),
        Stage(8, 50, 30, fades=True),
        Stage(8, 80, 50, fades=False),
        Stage(16, 130, 30, fades=True),
        Stage(16, 160, 50, fades=False),
    ]


def test_without_fades_resolutions_change_immediately():
    growing = config(fade_images=0, stable_images=50)
    assert stages(growing) == [Stage(4, 0, 50, False), Stage(8, 50, 50, False), Stage(16, 100, 50, False)]
    for images, resolution in ((0, 4), (49, 4), (50, 8), (99, 8), (100, 16), (10**9, 16)):
        assert schedule_at(growing, images)[:2] == (resolution, 1.0)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (8, [(8, 0, False), (16, 50, True), (16, 80, False)]),
        (16, [(16, 0, False)]),  # no growth, no fade
    ],
)
def test_growth_can_start_at_a_higher_resolution(start, expected):
    growing = config(start=start, fade_images=30, stable_images=50, batch={8: 5, 16: 3})
    assert [(stage.resolution, stage.begin, stage.fades) for stage in stages(growing)] == expected
    assert schedule_at(growing, 0) == ScheduleState(start, 1.0, {8: 5, 16: 3}[start], 1e-3)
    assert schedule_at(growing, 10**9) == ScheduleState(16, 1.0, 3, 1e-3)


def test_learning_rate_by_resolution_defaults_to_optim_lr():
    growing = config(fade_images=30, stable_images=50, lr={8: 2e-3, 16: 3e-3})
    for images, lr in ((0, 1e-3), (49, 1e-3), (50, 2e-3), (80, 2e-3), (129, 2e-3), (130, 3e-3), (10**9, 3e-3)):
        assert schedule_at(growing, images).lr == lr


def test_networks_of_one_resolution_do_not_grow():
    fixed = Config(train=TrainConfig(images=1_000, batch=7), growth=GrowthConfig(start=8, lr={32: 1.0}))
    assert stages(fixed) == [Stage(32, 0, 1_000, fades=False)]
    for images in (0, 999, 1_000, 10**9):
        assert schedule_at(fixed, images) == ScheduleState(32, 1.0, 7, 2e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: config(48), "model.resolution is 48"),
        (lambda: config(batch={4: 2, 16: 2}), "growth.batch is .*set for 8 too"),
        (lambda: config(batch={4: 2}), "growth.batch is .*set for 8, 16 too"),
        (lambda: config(start=32), r"growth.start is 32; it must be one of \[4, 8, 16\]"),
        (lambda: config(start=12), "growth.start is 12"),
        (lambda: config(start=0), "growth.start is 0"),
        (lambda: config(layers=("b2", "final")), "contrast.layers is .*low, final for progressive at 16×16"),
        (lambda: config(8, layers=("low", "final")), "contrast.layers is .*a subset of final for progressive at 8×8"),
        (lambda: config(layers=("low",)), "contrast.layers is .*with final if growth.start is below 16"),
        (lambda: config(lr={32: 1e-3}), r"growth.lr is .*for resolutions among \[4, 8, 16\]"),
        (lambda: Config(train=TrainConfig(micro_batch=4)), "train.micro_batch is 4; it must be null for autogan"),
        (lambda: Config(train=TrainConfig(checkpoint_activations=True)), "train.checkpoint_activations is True"),
        (
            lambda: replace(config(batch={4: 16, 8: 16, 16: 14}), train=TrainConfig(sampled_batch=None, micro_batch=4)),
            "train.micro_batch is 4; it must be at least the batch, 14, unless both are multiples of 4",
        ),
        (
            lambda: replace(config(), train=TrainConfig(sampled_batch=7)),
            "train.sampled_batch is 7; it must be null for",
        ),
        (lambda: GrowthConfig(fade_images=-1), "growth.fade_images is -1"),
        (lambda: GrowthConfig(stable_images=0), "growth.stable_images is 0"),
        (lambda: GrowthConfig(batch={4: 16, 8: 0}), r"growth.batch\[8\] is 0"),
        (lambda: GrowthConfig(lr={16: 0.0}), r"growth.lr\[16\] is 0.0"),
    ],
)
def test_invalid_settings_are_reported(build: Callable[[], object], message: str):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build()
