"""How the networks grow: images seen → resolution, fade, batch, learning rate. Pure."""

from typing import NamedTuple

from dcvae_fast.config import Config


class Point(NamedTuple):
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


def point(config: Config, images: int) -> Point:
    """What holds for the iteration that begins after `images` images."""
    stage = next(stage for stage in reversed(stages(config)) if stage.begin <= images)
    alpha = min(1.0, (images - stage.begin) / stage.images) if stage.fades else 1.0
    if not config.model.grows:
        return Point(stage.resolution, alpha, config.train.batch, config.optim.lr)
    growth = config.growth
    return Point(
        stage.resolution, alpha, growth.batch[stage.resolution], growth.lr.get(stage.resolution, config.optim.lr)
    )
