"""From a data set to what training and evaluation take, whichever kind of data set it is."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dcvae_pipelines.dali import DaliSource, OnCorrupt
from dcvae_pipelines.decoded import ImageSet
from dcvae_pipelines.encoded import EncodedSet
from dcvae_pipelines.image import decode, to_tensor
from dcvae_pipelines.pixels import resize
from dcvae_pipelines.resident import ResidentSource
from dcvae_pipelines.source import DataError, Source


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


def decode_images(images: ImageSet | EncodedSet, count: int, *, resolution: int, channels: int = 3) -> ImageSet:
    """The first `count` images of a data set, or all if there are fewer, decoded by Pillow into host memory.

    Raises:
        DataError: one of them cannot be read or decoded, or the data set has another resolution or other channels.
    """
    if isinstance(images, ImageSet):
        shape = (channels, resolution, resolution)
        if images.images.shape[1:] != shape:
            raise DataError(f"{images.name} has images of {list(images.images.shape[1:])}, not {list(shape)}")
        labels = None if images.labels is None else images.labels[:count]
        return ImageSet(images.name, images.images[:count], labels)

    def read(index: int) -> torch.Tensor:
        image = decode(images.read(index), images.image_name(index), channels)
        top, left, side = images.square(index, image.width, image.height)
        return resize(to_tensor(image.crop((left, top, left + side, top + side)))[None], resolution)

    chosen = range(min(count, len(images)))
    with ThreadPoolExecutor() as pool:
        pixels = torch.cat(list(pool.map(read, chosen)))
    labels = [images.label(index) for index in chosen]
    return ImageSet(images.name, pixels.contiguous(), None if None in labels else torch.tensor(labels))
