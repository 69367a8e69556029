"""All random numbers of an iteration."""

from typing import NamedTuple

import torch
from torch import Tensor

from dcvae_fast.config import Config
from dcvae_fast.distributed import Ranks
from dcvae_fast.training.schedule import samples_per_rank
from dcvae_fast.training.seeding import derive_seed


class StepVariant(NamedTuple):
    """Kind of iteration. Iterations of the same kind launch the same kernels.

    Attributes:
        autoencoder: whether encoder and decoder are updated
        r1: whether the R1 penalty is added
        local: whether local patches are contrasted
    """

    autoencoder: bool
    r1: bool
    local: bool


class Noise(NamedTuple):
    """This rank's share of the random numbers of an iteration; None for those it does not need.

    Attributes:
        posterior: [B, Z], for sampling the posterior
        prior: [B, Z], latents of prior samples in the discriminator objective
        interpolation: uniform [B, 2, 1, 1, 1], for WGAN-GP's gradient penalty
        generated: [B', Z], latents of prior samples in the adversarial objective
        adversarial_posterior: [B, Z], for sampling the posterior in the adversarial objective, if it does not share the
            reconstruction of the discriminator objective
        second_posterior: [B, Z], for sampling the posterior again after encoder and decoder have been updated
        location: uniform [1], location of local patches
    """

    posterior: Tensor
    prior: Tensor | None = None
    interpolation: Tensor | None = None
    generated: Tensor | None = None
    adversarial_posterior: Tensor | None = None
    second_posterior: Tensor | None = None
    location: Tensor | None = None


class NoiseSource:
    """Draws noise seeded by (seed, images shown), so that a resumed run draws the same noise as an uninterrupted one.

    Each rank draws the noise of all ranks and keeps its share, so the noise does not depend on the number of ranks.
    """

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        self._config, self._device, self._ranks = config, device, ranks
        # The meta device, used by `plan`, has no generator and draws nothing.
        self._generator = torch.Generator("cpu" if device.type == "meta" else device)

    def draw(self, n: int, variant: StepVariant, shown: int) -> Noise:
        """Draw the noise of the iteration that begins after `shown` images, with n images per rank."""
        loss = self._config.loss
        self._generator.manual_seed(derive_seed(self._config.train.seed, shown))
        samples = loss.has_gan and variant.autoencoder
        # The order of the draws determines the results of a run.
        return Noise(
            posterior=self._normal(n),
            prior=self._normal(n) if loss.has_gan else None,
            interpolation=self._interpolation(n) if loss.has_gan and loss.adversarial == "wgan_gp" else None,
            generated=self._normal(samples_per_rank(self._config, self._ranks.world_size) or n) if samples else None,
            adversarial_posterior=self._normal(n) if samples and loss.passes == "separate" else None,
            second_posterior=self._normal(n) if samples and loss.order == "sequential" else None,
            location=torch.rand(1, device=self._device, generator=self._generator) if variant.local else None,
        )

    def _normal(self, n: int) -> Tensor:
        shape = (n * self._ranks.world_size, self._config.model.latent_dim)
        return self._ranks.shard(torch.randn(shape, device=self._device, generator=self._generator))

    def _interpolation(self, n: int) -> Tensor:
        shape = (2, n * self._ranks.world_size, 1, 1, 1)
        return self._ranks.shard(torch.rand(shape, device=self._device, generator=self._generator).transpose(0, 1))
