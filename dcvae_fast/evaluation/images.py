"""Images to evaluate, as streams: real images, samples from the prior, reconstructions from the posterior."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dcvae_fast.config import DataConfig, ModelConfig
from dcvae_fast.models.dcvae import DCVAE
from dcvae_pipelines import DataError, EncodedSet, ImageSet, decode_images, load_dataset
from dcvae_pipelines.pixels import normalize, resize

# Limits of the images decoded together.
PART_BYTES, PART_IMAGES = 2**26, 4096

# Rows of noise drawn in one call; the generator's values depend on it.
BLOCK = 1024


@dataclass(frozen=True)
class Splits:
    """Training and test split of a data set.

    Attributes:
        train: images that the model was trained on, decoded or as files
        test: images that were held out, decoded or as files
        on_corrupt: whether to stop at an image that cannot be decoded, or to skip it with a warning
        published: test images as published, for protocol `once`; None if they are `test`
    """

    train: ImageSet | EncodedSet
    test: ImageSet | EncodedSet
    on_corrupt: Literal["stop", "skip"] = "stop"
    published: ImageSet | EncodedSet | None = None


def published_images(data: DataConfig) -> ImageSet | EncodedSet | None:
    """Load LSUN bedroom's published validation images; return None for other data sets, which publish `test`, and for
    bedrooms in a single folder.

    Raises:
        DataError: the images are missing or damaged.
    """
    if data.name != "lsun_bedroom" or data.root is None or not any(Path(data.root).expanduser().glob("bedroom_*")):
        return None
    return load_dataset(data.name, data.root, "valid")


class Noise:
    """Rows of standard normal noise from a seed, independent of the device and of the sizes of the batches taken."""

    def __init__(self, size: int, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._remaining = torch.empty(0, size)

    def take(self, count: int) -> Tensor:
        """Return the next rows, float32 [count, size] on the CPU."""
        while len(self._remaining) < count:
            block = torch.randn(BLOCK, self._remaining.shape[1], generator=self._generator)
            self._remaining = torch.cat([self._remaining, block])
        rows, self._remaining = self._remaining[:count], self._remaining[count:]
        return rows


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return int64 [min(count, total)]: indices from 0 to `total` − 1, evenly spaced."""
    count = min(count, total)
    return torch.arange(count) * total // max(1, count)


def repeated(total: int, count: int) -> Tensor:
    """Return int64 [count]: whole passes over the indices from 0 to `total` − 1, then evenly spaced ones."""
    passes, remainder = divmod(count, total)
    return torch.cat([torch.arange(total).repeat(passes), evenly_spaced(total, remainder)])


def parts(
    images: ImageSet | EncodedSet, indices: Tensor, model: ModelConfig, on_corrupt: Literal["stop", "skip"] = "stop"
) -> Iterator[ImageSet]:
    """Yield the images at these indices in parts, decoded in the resolution and channels of a model.

    Raises:
        DataError: an image cannot be decoded and `on_corrupt` is "stop", or has too few pixels or other channels.
    """
    channels, resolution = model.image_channels, model.resolution
    for part in indices.split(max(1, min(PART_IMAGES, PART_BYTES // (channels * resolution**2)))):
        if isinstance(images, EncodedSet):
            subset = replace(images, indices=images.indices[part])
            yield decode_images(subset, len(subset), resolution=resolution, channels=channels, on_corrupt=on_corrupt)
            continue
        shape = images.images.shape[1:]
        if shape[0] != channels or shape[1] != shape[2] or shape[1] < resolution:
            raise DataError(
                f"{images.name} has images of {list(shape)}, but the model's are [{channels}, {resolution},"
                f" {resolution}]; choose its data set with --data.name"
            )
        labels = None if images.labels is None else images.labels[part]
        yield ImageSet(images.name, resize(images.images[part], resolution), labels)


@torch.no_grad()
def samples(model: DCVAE, count: int, batch: int, seed: int, clamp: float | None) -> Iterator[Tensor]:
    """Yield images decoded from the prior N(0, I), with latents clamped to [-clamp, clamp].

    They are float32 [≤ batch, C, R, R] also if the model has another dtype.
    """
    noise = Noise(model.config.latent_dim, seed)
    for start in range(0, count, batch):
        latents = noise.take(min(batch, count - start)).to(model.device)
        yield model.decode(latents if clamp is None else latents.clamp(-clamp, clamp)).float()


@torch.no_grad()
def reconstructions(
    model: DCVAE, images: Iterable[ImageSet], batch: int, seed: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield real images in [-1, 1] and their reconstructions, both float32 [≤ batch, C, R, R].

    Reconstructions are decoded from the posterior mean or, with a seed, from a draw from the posterior.
    """
    noise = None if seed is None else Noise(model.config.latent_dim, seed)
    for part in images:
        for pixels in part.images.split(batch):
            real = normalize(pixels.to(model.device))
            posterior = model.encode(real)
            latents = posterior.mean if noise is None else posterior.at(noise.take(len(real)).to(model.device))
            yield real, model.decode(latents).float()
