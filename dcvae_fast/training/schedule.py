"""How the networks grow: images seen → resolution, fade, batch, learning rate. Pure."""

from typing import NamedTuple

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError
from dcvae_fast.models.progressive import stddev_group


class ScheduleState(NamedTuple):
    """What holds for an iteration."""

    resolution: int
    alpha: float
    """share of the resolution's own layers; below 1 while they fade in, 1 for good afterwards"""
    batch: int
    """real images an iteration, on each rank"""
    lr: float


class Stage(NamedTuple):
    """A stretch of training at one resolution, its end included in the next one."""

    resolution: int
    begin: int
    """images shown when it begins"""
    images: int
    """that it takes; the last stage goes on for as long as training does"""
    fades: bool
    """whether the resolution's layers are faded in meanwhile"""


def stages(config: Config) -> list[Stage]:
    """Progressive GAN's: stabilise the first resolution, then fade in and stabilise each of the next.

    Networks of one resolution have one stage.
    """
    growth, last = config.growth, config.model.resolution
    if not config.model.grows:
        return [Stage(last, 0, config.train.images, fades=False)]
    found, begin, resolution = [], 0, growth.start
    while resolution <= last:
        for fades, images in ((True, growth.fade_images), (False, growth.stable_images)):
            if images and not (fades and resolution == growth.start):
                found.append(Stage(resolution, begin, images, fades))
                begin += images
        resolution *= 2
    return found


def schedule_at(config: Config, images: int, ranks: int = 1) -> ScheduleState:
    """What holds for the iteration that begins after `images` images.

    Raises:
        ConfigError: the ranks cannot share its batch.
    """
    stage = next(stage for stage in reversed(stages(config)) if stage.begin <= images)
    alpha = min(1.0, (images - stage.begin) / stage.images) if stage.fades else 1.0
    if not config.model.grows:
        return ScheduleState(
            stage.resolution, alpha, _share(config, "train.batch", config.train.batch, ranks), config.optim.lr
        )
    growth, resolution = config.growth, stage.resolution
    batch = _share(config, f"growth.batch[{resolution}]", growth.batch[resolution], ranks)
    return ScheduleState(resolution, alpha, batch, growth.lr.get(resolution, config.optim.lr))


def samples_per_rank(config: Config, ranks: int = 1) -> int | None:
    """Prior samples in an autoencoder step on each rank; None for as many as real images.

    Raises:
        ConfigError: the ranks cannot share them.
    """
    count = config.train.sampled_batch
    return None if count is None else _share(config, "train.sampled_batch", count, ranks)


def check_batches(config: Config, ranks: int) -> None:
    """
    Raises:
        ConfigError: the ranks cannot share a batch, or not so that statistics of a minibatch stay the same, or cannot
            cut their shares into micro-batches.
    """
    samples_per_rank(config, ranks)
    for stage in stages(config):
        batch, micro = schedule_at(config, stage.begin, ranks).batch, config.train.micro_batch
        if not config.model.grows:
            if batch < 2:
                raise ConfigError(f"train.batch leaves {batch} image for each of {ranks} ranks; it must leave 2.")
            continue
        setting = f"growth.batch[{stage.resolution}]"
        if not config.train.batch_per_rank and stddev_group(batch) != stddev_group(batch * ranks):
            raise ConfigError(
                f"{setting} leaves {batch} images for each of {ranks} ranks, too few for minibatch statistics of"
                f" {stddev_group(batch * ranks)} neighbours; choose a multiple of {4 * ranks}, or let it be each rank's"
                " own: --train.batch_per_rank true."
            )
        if micro is not None and batch > micro and not batch % 4 == micro % 4 == 0:
            raise ConfigError(
                f"train.micro_batch is {micro}, but {setting} leaves {batch} images for each rank; both must be"
                " multiples of 4."
            )


def _share(config: Config, setting: str, batch: int, ranks: int) -> int:
    """A rank's part of a batch."""
    if config.train.batch_per_rank:
        return batch
    if batch % ranks:
        raise ConfigError(
            f"{setting} is {batch}, which {ranks} ranks cannot share; choose a multiple of {ranks}, or let it be each"
            " rank's own: --train.batch_per_rank true."
        )
    return batch // ranks
