"""The images that are measured: of a data set, of the prior, of the posterior. Never all in memory at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dcvae_fast.config import ModelConfig
from dcvae_fast.models.dcvae import DCVAE
from dcvae_pipelines import DataError, EncodedSet, ImageSet, decode_images
from dcvae_pipelines.pixels import normalize, resize

# Decoded at a time.
PART_BYTES, PART_IMAGES = 2**26, 4096

# Rows of noise drawn at once.
BLOCK = 1024


@dataclass(frozen=True)
class Splits:
    """A data set: what the model was trained on, and what was held out.

    Attributes:
        train, test: decoded, or still as files
        on_corrupt: stop at an image that cannot be decoded, or skip it with a warning
    """

    train: ImageSet | EncodedSet
    test: ImageSet | EncodedSet
    on_corrupt: Literal["stop", "skip"] = "stop"


class Noise:
    """Rows of standard normal noise from a seed: the same ones on every device, and however many are taken at once."""

    def __init__(self, size: int, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, size)

    def take(self, count: int) -> Tensor:
        """The next rows, float32 [count, size] on the CPU."""
        while len(self._left) < count:
            fresh = torch.randn(BLOCK, self._left.shape[1], generator=self._generator)
            self._left = torch.cat([self._left, fresh])
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def evenly_spaced(total: int, count: int) -> Tensor:
    """int64 [min(count, total)]: as many indices below `total`, spread evenly over them."""
    count = min(count, total)
    return torch.arange(count) * total // max(1, count)


def parts(
    images: ImageSet | EncodedSet, indices: Tensor, model: ModelConfig, on_corrupt: Literal["stop", "skip"] = "stop"
) -> Iterator[ImageSet]:
    """Those images of a data set, decoded a part at a time, as a model of this configuration sees them.

    Raises:
        DataError: one of them cannot be decoded and is not to be skipped, or has too few pixels or other channels.
    """
    channels, resolution = model.image_channels, model.resolution
    for chosen in indices.split(max(1, min(PART_IMAGES, PART_BYTES // (channels * resolution**2)))):
        if isinstance(images, EncodedSet):
            some = replace(images, indices=images.indices[chosen])
            yield decode_images(some, len(some), resolution=resolution, channels=channels, on_corrupt=on_corrupt)
            continue
        shape = images.images.shape[1:]
        if shape[0] != channels or shape[1] != shape[2] or shape[1] < resolution:
            raise DataError(
                f"{images.name} has images of {list(shape)}, but the model's are [{channels}, {resolution},"
                f" {resolution}]; name its own data set with --data.name"
            )
        labels = None if images.labels is None else images.labels[chosen]
        yield ImageSet(images.name, resize(images.images[chosen], resolution), labels)


@torch.no_grad()
def samples(model: DCVAE, count: int, batch: int, seed: int, clamp: float | None) -> Iterator[Tensor]:
    """What the decoder makes of draws from the prior N(0, I), clamped to [-clamp, clamp]; [≤ batch, C, R, R]."""
    noise = Noise(model.config.latent_dim, seed)
    for start in range(0, count, batch):
        latents = noise.take(min(batch, count - start)).to(model.device)
        yield model.decode(latents if clamp is None else latents.clamp(-clamp, clamp))


@torch.no_grad()
def reconstructions(
    model: DCVAE, images: Iterable[ImageSet], batch: int, seed: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Real images beside what the decoder makes of their posterior's mean, or, with a seed, of draws from it; both
    [≤ batch, C, R, R], the real ones in [-1, 1]."""
    noise = None if seed is None else Noise(model.config.latent_dim, seed)
    for part in images:
        for pixels in part.images.split(batch):
            real = normalize(pixels.to(model.device))
            posterior = model.encode(real)
            latents = posterior.mean if noise is None else posterior.at(noise.take(len(real)).to(model.device))
            yield real, model.decode(latents)
