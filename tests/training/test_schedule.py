"""Growth schedules against a table, and settings that are rejected."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from dcvae_fast.commands.train import parse_config
from dcvae_fast.config import Config, ContrastConfig, GrowthConfig, ModelConfig, OptimConfig, TrainConfig, Variant
from dcvae_fast.errors import ConfigError
from dcvae_fast.recipes import recipe_config
from dcvae_fast.training.schedule import ScheduleState, Stage, check_batches, schedule_at, stages


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


def in_groups_of_4(last_batch: int, micro_batch: int, **model) -> Config:
    return replace(
        config(batch={4: 16, 8: 16, 16: last_batch}, stddev_group=4),
        model=ModelConfig("progressive", 16, **model),
        train=TrainConfig(sampled_batch=None, micro_batch=micro_batch),
    )


@pytest.mark.parametrize(
    ("images", "resolution", "alpha", "batch"),
    [
        (0, 4, 1.0, 16),  # the first resolution does not fade in
        (799_999, 4, 1.0, 16),
        (800_000, 8, 0.0, 16),
        (800_016, 8, 16 / 800_000, 16),
        (1_200_000, 8, 0.5, 16),
        (1_599_999, 8, 799_999 / 800_000, 16),
        (1_600_000, 8, 1.0, 16),
        (2_399_999, 8, 1.0, 16),
        (2_400_000, 16, 0.0, 16),
        (4_000_000, 32, 0.0, 16),
        (5_600_000, 64, 0.0, 16),
        (7_200_000, 128, 0.0, 16),
        (8_000_000, 128, 1.0, 16),
        (8_799_999, 128, 1.0, 16),
        (8_800_000, 256, 0.0, 14),
        (9_599_999, 256, 799_999 / 800_000, 14),
        (9_600_000, 256, 1.0, 14),
        (10_399_999, 256, 1.0, 14),
        (10_400_000, 512, 0.0, 6),
        (10_600_000, 512, 0.25, 6),
        (11_199_999, 512, 799_999 / 800_000, 6),
        (11_200_000, 512, 1.0, 6),
        (19_000_000, 512, 1.0, 6),  # the last stage has no end
        (10**12, 512, 1.0, 6),
    ],
)
def test_celebahq512_grows_as_preset_v1_of_progressive_gan(celebahq512: Config, images, resolution, alpha, batch):
    assert schedule_at(celebahq512, images) == ScheduleState(resolution, alpha, batch, 1e-3)
    assert celebahq512.images_per_stddev(batch) == batch


@pytest.mark.parametrize("name", ["celeba64", "celeba128", "lsun128", "celebahq256", "celebahq512"])
def test_recipes_follow_preset_v1_of_progressive_gan(name: str):
    config = recipe_config(name)
    assert config.train.images == 19_000_000 and config.growth.reset_adam and config.growth.blend_real
    assert config.model.variant == "pggan" and config.growth.stddev_group == 16
    last = stages(config)[-1]
    assert not last.fades and last.begin + last.images < 19_000_000


@pytest.mark.parametrize("name", ["celeba128-port", "lsun128-port"])
def test_port_recipes_follow_the_port(name: str):
    """Its train.py: batches of 16, 100,000 iterations at each resolution, α = min(1, 0.00002 · iteration)."""
    config = recipe_config(name)
    assert config.train.images == 600_000 * 16
    assert (config.optim.betas, config.optim.eps, config.train.ema_decay) == ((0.0, 0.99), 1e-8, 0.999)
    assert (config.loss.adversarial, config.loss.penalty, config.loss.drift) == ("wgan_gp", 10, 1e-3)
    assert not (config.growth.reset_adam or config.growth.blend_real or config.data.mirror)
    assert config.model.variant == "port" and config.images_per_stddev(16) == 16
    for iteration in range(0, 600_000, 12_345):
        step, iteration_of_step = divmod(iteration, 100_000)
        alpha = min(1.0, 0.00002 * iteration_of_step) if step else 1.0
        schedule = schedule_at(config, 16 * iteration)
        assert schedule == ScheduleState(4 * 2**step, schedule.alpha, 16, 1e-3)
        assert schedule.alpha == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("batch", "group", "expected"), [(16, 16, 16), (14, 16, 14), (6, 16, 6), (32, 16, 16), (12, 4, 4), (14, 4, 14)]
)
def test_minibatch_statistics_cover_a_group_or_the_whole_batch(batch: int, group: int, expected: int):
    pggan = config(stddev_group=group)
    assert pggan.images_per_stddev(batch) == expected
    assert replace(pggan, model=replace(pggan.model, variant="port")).images_per_stddev(batch) == batch


def test_stages_follow_one_another():
    assert stages(config(fade_images=30, stable_images=50)) == [
        Stage(4, 0, 50, fades=False),
        Stage(8, 50, 30, fades=True),
        Stage(8, 80, 50, fades=False),
        Stage(16, 130, 30, fades=True),
        Stage(16, 160, 50, fades=False),
    ]


def test_the_first_resolution_can_have_another_length():
    growing = config(fade_images=30, stable_images=50, first_images=90)
    assert [stage[1:] for stage in stages(growing)[:3]] == [(0, 90, False), (90, 30, True), (120, 50, False)]


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


@pytest.mark.parametrize(
    ("variant", "stddev_group", "batch", "remedy"),
    [
        ("pggan", 16, 16, ", or use --growth.stddev_group 4 with a multiple of 8"),
        ("pggan", 4, 12, ", or use --growth.stddev_group 4 with a multiple of 8"),
        ("port", 16, 16, ""),
        ("port", 4, 16, ""),
    ],
)
def test_minibatch_statistics_do_not_span_ranks(variant: Variant, stddev_group: int, batch: int, remedy: str):
    base = config(batch={4: batch, 8: batch, 16: batch}, stddev_group=stddev_group)
    base = replace(base, model=replace(base.model, variant=variant))
    group = base.images_per_stddev(batch)
    message = (
        f"growth.batch[4] leaves {batch // 2} images for each of 2 ranks, but the minibatch standard deviation covers"
        f" {group} images; set the batch of each rank with --train.batch_per_rank true{remedy}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_batches(base, 2)
    check_batches(base, 1)
    check_batches(replace(base, train=replace(base.train, batch_per_rank=True)), 2)
    check_batches(replace(in_groups_of_4(8, 4), train=TrainConfig(sampled_batch=None)), 2)


def test_micro_batches_of_whole_groups_are_accepted():
    for last_batch, micro_batch in ((12, 4), (12, 8), (14, 16)):
        assert in_groups_of_4(last_batch, micro_batch).train.micro_batch == micro_batch


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
            r"train.micro_batch is 4; it must be at least growth.batch\[4\], 16, because the minibatch standard"
            " deviation covers 16 images; for smaller ones use --growth.stddev_group 4 and batches that are multiples"
            " of 4",
        ),
        (
            lambda: in_groups_of_4(14, 4),
            r"train.micro_batch is 4; .* growth.batch\[16\], 14, .* covers 14 images",
        ),
        (
            lambda: in_groups_of_4(16, 6),
            r"train.micro_batch is 6; it must be at least growth.batch\[4\], 16, or a multiple of 4, ",
        ),
        (
            lambda: in_groups_of_4(16, 4, variant="port"),
            r"train.micro_batch is 4; it must be at least growth.batch\[4\], 16, .* covers 16 images\.$",
        ),
        (
            lambda: replace(config(batch={4: 16, 8: 1, 16: 4}), model=ModelConfig("progressive", 16, variant="port")),
            "growth.batch is .*at least 2 at each resolution for port",
        ),
        (lambda: ModelConfig(variant="port"), "model.variant is 'port'; it must be pggan for autogan"),
        (lambda: GrowthConfig(stddev_group=0), "growth.stddev_group is 0"),
        (lambda: GrowthConfig(first_images=0), "growth.first_images is 0"),
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
