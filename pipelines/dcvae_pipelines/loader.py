"""From a data set to what training and evaluation take, whichever kind of data set it is."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dcvae_pipelines.dali import DaliSource, OnCorrupt
from dcvae_pipelines.decoded import ImageSet
from dcvae_pipelines.encoded import EncodedSet
from dcvae_pipelines.image import decode, to_tensor
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
    """A source of batches for training: `ResidentSource` for what is decoded, else `DaliSource`.

    Args:
        images: the data set.
        resolution, channels, threads, prefetch, on_corrupt: of `DaliSource`; what is decoded has to fit the first two.
        common: batch, seed, device, rank, ranks, mirror, drop_last, dtype and channels_last, of both.

    Raises:
        DataError: the data set cannot be shown so.
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
    """The first `count` images of a data set, or all if there are fewer, decoded by Pillow into host memory.

    Args:
        progress: called with the numbers of images done and of all, unless they are decoded already.

    Raises:
        DataError: one of them cannot be read or decoded and is not to be skipped, or the data set has another
            resolution or other channels.
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
            top, left, side = images.square(index, image.width, image.height, resolution)
        except DataError as problem:
            if on_corrupt == "stop":
                raise
            _log.warning("left out: %s", problem)
            return None
        square = to_tensor(image.crop((left, top, left + side, top + side)))
        return resize(square[None], resolution), images.label(index)

    decoded, total = [], min(count, len(images))
    with ThreadPoolExecutor() as pool:
        for done, image in enumerate(pool.map(read, range(total)), start=1):
            decoded += [] if image is None else [image]
            progress(done, total)
    if not decoded:
        raise DataError(f"{images.name}: none of the first {count:,} images can be decoded")
    labels = [label for _, label in decoded]
    known = None if None in labels else torch.tensor(labels)
    return ImageSet(images.name, torch.cat([pixels for pixels, _ in decoded]).contiguous(), known)
