"""Growth schedule as pure functions: images shown → resolution, fade-in, batch and learning rate."""

from typing import NamedTuple

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError


class ScheduleState(NamedTuple):
    """Schedule of one iteration.

    Attributes:
        resolution: height and width of the images
        alpha: weight of this resolution's layers, below 1 while they fade in
        batch: real images per iteration on each rank
        lr: learning rate
    """

    resolution: int
    alpha: float
    batch: int
    lr: float


class Stage(NamedTuple):
    """A stage of training at one resolution, while its layers fade in or afterwards.

    Attributes:
        resolution: height and width of the images
        begin: images shown when the stage begins
        images: length of the stage in images; the last stage continues until training ends
        fades: whether the layers of this resolution fade in
    """

    resolution: int
    begin: int
    images: int
    fades: bool


def stages(config: Config) -> list[Stage]:
    """Return the stages of Progressive GAN: train the first resolution, then fade in and train each following one.

    Networks that do not grow have one stage.
    """
    growth, last = config.growth, config.model.resolution
    if not config.model.grows:
        return [Stage(last, 0, config.train.images, fades=False)]
    result, begin, resolution = [], 0, growth.start
    while resolution <= last:
        is_first = resolution == growth.start
        stable_images = growth.first_images if is_first and growth.first_images else growth.stable_images
        for fades, images in ((True, growth.fade_images), (False, stable_images)):
            if images and not (fades and is_first):
                result.append(Stage(resolution, begin, images, fades))
                begin += images
        resolution *= 2
    return result


def schedule_at(config: Config, images: int, world_size: int = 1) -> ScheduleState:
    """Return the schedule of the iteration that begins after `images` images.

    Raises:
        ConfigError: the batch cannot be divided among the ranks.
    """
    stage = next(stage for stage in reversed(stages(config)) if stage.begin <= images)
    alpha = min(1.0, (images - stage.begin) / stage.images) if stage.fades else 1.0
    if not config.model.grows:
        batch = _batch_per_rank(config, "train.batch", config.train.batch, world_size)
        return ScheduleState(stage.resolution, alpha, batch, config.optim.lr)
    growth, resolution = config.growth, stage.resolution
    batch = _batch_per_rank(config, f"growth.batch[{resolution}]", growth.batch[resolution], world_size)
    return ScheduleState(resolution, alpha, batch, growth.lr.get(resolution, config.optim.lr))


def samples_per_rank(config: Config, world_size: int = 1) -> int | None:
    """Return the number of prior samples per rank when the autoencoder is updated; None for the batch size.

    Raises:
        ConfigError: the samples cannot be divided among the ranks.
    """
    count = config.train.sampled_batch
    return None if count is None else _batch_per_rank(config, "train.sampled_batch", count, world_size)


def check_batches(config: Config, world_size: int) -> None:
    """Check that all batches can be divided among the ranks without changing minibatch statistics.

    Raises:
        ConfigError: a batch cannot be divided.
    """
    samples_per_rank(config, world_size)
    model = config.model
    for stage in stages(config):
        batch = schedule_at(config, stage.begin, world_size).batch
        if not model.grows:
            if batch < 2:
                raise ConfigError(
                    f"train.batch leaves {batch} image for each of {world_size} ranks; each needs at least 2."
                )
            continue
        group = config.images_per_stddev(batch * world_size)
        if not config.train.batch_per_rank and config.images_per_stddev(batch) != group:
            smaller = f", or use --growth.stddev_group 4 with a multiple of {4 * world_size}"
            raise ConfigError(
                f"growth.batch[{stage.resolution}] leaves {batch} images for each of {world_size} ranks, but the"
                f" minibatch standard deviation covers {group} images; set the batch of each rank with"
                f" --train.batch_per_rank true{'' if model.variant == 'port' else smaller}."
            )


def _batch_per_rank(config: Config, setting: str, batch: int, world_size: int) -> int:
    if config.train.batch_per_rank:
        return batch
    if batch % world_size:
        raise ConfigError(
            f"{setting} is {batch}, which cannot be divided among {world_size} ranks; choose a multiple of"
            f" {world_size}, or set the batch of each rank with --train.batch_per_rank true."
        )
    return batch // world_size
