"""All randomness of an iteration."""

from typing import NamedTuple

import torch
from torch import Tensor

from dcvae_fast.config import Config
from dcvae_fast.distributed import Ranks
from dcvae_fast.training.schedule import samples_per_rank
from dcvae_fast.training.seeding import derive_seed


class StepVariant(NamedTuple):
    """The kinds of iterations: those of one kind launch the same work.

    Attributes:
        autoencoder: whether the autoencoder is stepped
        r1: whether the discriminator's gradient at real images is penalised
        local: whether local patches are contrasted
    """

    autoencoder: bool
    r1: bool
    local: bool


class Noise(NamedTuple):
    """What an iteration draws, this rank's share; None for what it does not need.

    Attributes:
        posterior: [B, Z], of the reconstruction
        prior: [B, Z], latents of the discriminator's samples
        interpolation: uniform [B, 2, 1, 1, 1], of WGAN-GP's gradient penalty
        generated: [B', Z], latents of the autoencoder's samples
        again: [B, Z], of the second reconstruction, after the autoencoder has been stepped
        location: uniform [1], of local patches
    """

    posterior: Tensor
    prior: Tensor | None = None
    interpolation: Tensor | None = None
    generated: Tensor | None = None
    again: Tensor | None = None
    location: Tensor | None = None


class NoiseSource:
    """Draws noise from (seed, images shown), so that a resumed run draws what an uninterrupted one would.

    Each rank draws for all and takes its share: together they draw what one rank would for all their images.
    """

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        self._config, self._device, self._ranks = config, device, ranks
        # The meta device, on which a plan is made, has no generator and draws nothing.
        self._generator = torch.Generator("cpu" if device.type == "meta" else device)

    def draw(self, n: int, variant: StepVariant, shown: int) -> Noise:
        """Draw the noise of an iteration on n images per rank, after `shown` images."""
        loss = self._config.loss
        self._generator.manual_seed(derive_seed(self._config.train.seed, shown))
        samples = loss.has_gan and variant.autoencoder
        # The order of the draws is part of what a run computes.
        return Noise(
            posterior=self._normal(n),
            prior=self._normal(n) if loss.has_gan else None,
            interpolation=self._interpolation(n) if loss.has_gan and loss.adversarial == "wgan_gp" else None,
            generated=self._normal(samples_per_rank(self._config, self._ranks.world_size) or n) if samples else None,
            again=self._normal(n) if samples and loss.order == "sequential" else None,
            location=torch.rand(1, device=self._device, generator=self._generator) if variant.local else None,
        )

    def _normal(self, n: int) -> Tensor:
        shape = (n * self._ranks.world_size, self._config.model.latent_dim)
        return self._ranks.shard(torch.randn(shape, device=self._device, generator=self._generator))

    def _interpolation(self, n: int) -> Tensor:
        shape = (2, n * self._ranks.world_size, 1, 1, 1)
        return self._ranks.shard(torch.rand(shape, device=self._device, generator=self._generator).transpose(0, 1))
