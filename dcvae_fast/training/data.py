"""Open the data set of a run according to its configuration."""

import logging
import os
from functools import partial

import torch

from dcvae_fast.config import Config
from dcvae_fast.distributed import SINGLE, Ranks
from dcvae_fast.errors import ConfigError
from dcvae_fast.progress import progress_bars
from dcvae_fast.training.schedule import schedule_at
from dcvae_pipelines import DataError, EncodedSet, ImageSet, Source, decode_images, load_dataset, make_source

logger = logging.getLogger(__name__)


def open_data(config: Config, split: str) -> ImageSet | EncodedSet:
    """Return a split of the configured data set.

    Raises:
        DataError: the data set is missing or damaged.
        ConfigError: its images do not fit the networks.
    """
    data, model = config.data, config.model
    images = load_dataset(data.name, data.root, split, data.download)
    if isinstance(images, ImageSet):
        channels, size = images.images.shape[1], images.images.shape[2]
        if channels != model.image_channels:
            raise ConfigError(f"model.image_channels is {model.image_channels}, but {data.name} has {channels}.")
        if size != model.resolution:
            raise ConfigError(f"{data.name} has images of {size}×{size}, but model.resolution is {model.resolution}.")
    return images


def first_images(config: Config, images: ImageSet | EncodedSet, count: int) -> ImageSet:
    """Decode the first `count` images, or all if there are fewer, at the final resolution.

    Raises:
        DataError: one of the images is damaged and `data.on_corrupt` is stop.
    """
    model, on_corrupt = config.model, config.data.on_corrupt
    return decode_images(
        images, count, resolution=model.resolution, channels=model.image_channels, on_corrupt=on_corrupt
    )


def training_images(config: Config) -> ImageSet | EncodedSet:
    """Return the training split, decoded if `data.resident` is set.

    Raises:
        DataError: the split is missing or damaged, or an image of a resident split cannot be decoded.
        ConfigError: its images do not fit the networks.
    """
    images, model = open_data(config, "train"), config.model
    if not config.data.resident or isinstance(images, ImageSet):
        return images
    logger.info(f"Decoding {len(images):,} images, which stay in memory")
    with progress_bars() as report:
        return decode_images(
            images,
            len(images),
            resolution=model.resolution,
            channels=model.image_channels,
            progress=partial(report, "images decoded"),
        )


def open_source(
    config: Config,
    images: ImageSet | EncodedSet,
    device: torch.device,
    ranks: Ranks = SINGLE,
    seed: int | None = None,
) -> Source:
    """Return this rank's share of the training batches, at the first resolution.

    Args:
        seed: determines the order of the images; None for `train.seed`.

    Raises:
        DataError: there are fewer images than ranks, or than a setting needs.
    """
    data, model, train, start = config.data, config.model, config.train, schedule_at(config, 0, ranks.world_size)
    if ranks.world_size > len(images):
        raise DataError(f"{images.name} has {len(images)} images, fewer than the {ranks.world_size} ranks.")
    source = make_source(
        images,
        resolution=model.resolution,
        channels=model.image_channels,
        batch=start.batch,
        seed=train.seed if seed is None else seed,
        device=device,
        rank=ranks.rank,
        ranks=ranks.world_size,
        mirror=data.mirror,
        drop_last=data.drop_last,
        threads=data.threads or max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size),
        prefetch=data.prefetch,
        on_corrupt=data.on_corrupt,
    )
    source.set_resolution(start.resolution)
    return source
