"""Batches for training and decoded images for evaluation, from either kind of data set."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dcvae_pipelines.dali import DaliSource, OnCorrupt
from dcvae_pipelines.decoded import ImageSet
from dcvae_pipelines.encoded import EncodedSet
from dcvae_pipelines.image import crop, decode, to_tensor
from dcvae_pipelines.pixels import resize
from dcvae_pipelines.resident import ResidentSource
from dcvae_pipelines.source import DataError, Source

_log = logging.getLogger(__name__)


def make_source(
    images: ImageSet | EncodedSet,
    *,
    resolution: int,
    channels: int = 3,
    threads: int | None = None,
    prefetch: int = 2,
    on_corrupt: OnCorrupt = "stop",
    **common: Any,
) -> Source:
    """Create a source of training batches: `ResidentSource` for a decoded data set, else `DaliSource`.

    Args:
        images: the data set.
        resolution, channels, threads, prefetch, on_corrupt: see `DaliSource`; a decoded set must fit the first two.
        common: batch, seed, device, rank, ranks, mirror, drop_last, dtype and channels_last, see either source.

    Raises:
        DataError: the data set does not fit these settings.
    """
    if isinstance(images, EncodedSet):
        return DaliSource(
            images,
            resolution=resolution,
            channels=channels,
            threads=threads,
            prefetch=prefetch,
            on_corrupt=on_corrupt,
            **common,
        )
    if images.images.shape[1] != channels:
        raise DataError(f"{images.name} has images of {images.images.shape[1]} channels, not {channels}")
    source = ResidentSource(images.images, **common)
    source.set_resolution(resolution)
    return source


def decode_images(
    images: ImageSet | EncodedSet,
    count: int,
    *,
    resolution: int,
    channels: int = 3,
    on_corrupt: OnCorrupt = "stop",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImageSet:
    """Decode the first `count` images of a data set, or all if it has fewer, with Pillow into host memory.

    Args:
        images: the data set; a decoded one is only cut to `count`.
        count: number of images.
        resolution: height and width of the result in pixels.
        channels: 3 for RGB, 1 for grey.
        on_corrupt: for an image that cannot be decoded, "stop" raises DataError, "skip" leaves it out with a warning.
        progress: called after each image with the numbers of images done, including those left out, and in total.

    Raises:
        DataError: an image cannot be read or decoded and `on_corrupt` is "stop", or the decoded data set has another
            resolution or number of channels.
    """
    if isinstance(images, ImageSet):
        shape = (channels, resolution, resolution)
        if images.images.shape[1:] != shape:
            raise DataError(f"{images.name} has images of {list(images.images.shape[1:])}, not {list(shape)}")
        labels = None if images.labels is None else images.labels[:count]
        return ImageSet(images.name, images.images[:count], labels)

    def read(index: int) -> tuple[Tensor, int | None] | None:
        try:
            image = decode(images.read(index), images.image_name(index), channels)
            box = images.square(index, image.width, image.height, resolution)
        except DataError as error:
            if on_corrupt == "stop":
                raise
            _log.warning("left out: %s", error)
            return None
        return resize(to_tensor(crop(image, box))[None], resolution), images.label(index)

    total, decoded = min(count, len(images)), []
    pool = ThreadPoolExecutor()
    try:
        for done, image in enumerate(pool.map(read, range(total)), start=1):
            progress(done, total)
            if image is not None:
                decoded.append(image)
    finally:
        pool.shutdown(cancel_futures=True)
    if not decoded:
        raise DataError(f"{images.name}: none of the first {count:,} images can be decoded")
    classes = [label for _, label in decoded]
    labels = None if None in classes else torch.tensor(classes)
    return ImageSet(images.name, torch.cat([pixels for pixels, _ in decoded]).contiguous(), labels)
