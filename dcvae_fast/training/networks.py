"""The networks of a run and their EMAs."""

from copy import deepcopy

import torch
from torch import nn

from dcvae_fast.config import Config
from dcvae_fast.contrast import InstanceContrast
from dcvae_fast.models import autogan
from dcvae_fast.models.build import build_autoencoder, build_discriminator
from dcvae_fast.models.progressive import FEATURE_MAPS
from dcvae_fast.training.seeding import derive_seed


class Networks(nn.Module):
    """Encoder E, decoder G, discriminator C and momentum discriminator C′, initialised from `train.seed` alone.

    Attributes:
        encoder, decoder, discriminator: E, G and C
        decoder_ema: EMA of G, used for samples and reconstructions
        contrast: C′ and its queues; None if the objective has no InfoNCE loss
        layers: layers of C whose features are compared at the current resolution
    """

    def __init__(self, config: Config):
        super().__init__()
        model, seed = config.model, config.train.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "networks"))
            self.encoder, self.decoder = build_autoencoder(model)
            self.discriminator = build_discriminator(model, config.growth.stddev_group)
            official = config.train.initialization == "official"
            if official:
                for network in (self.encoder, self.discriminator):
                    autogan.init_normalized_layers(network)
            self.contrast = None
            if config.loss.instance == "contrast":
                contrast = config.contrast
                patches = contrast.local_start_images is not None
                width = model.local_width(contrast.local_layers[0]) if patches else 0
                self.contrast = InstanceContrast(
                    self.discriminator, contrast, model.contrast_dim, width, derive_seed(seed, "queue")
                )
                if official:
                    autogan.init_vectors(self.contrast.momentum)
        self.decoder_ema = deepcopy(self.decoder).requires_grad_(False)
        self._config = config
        self.layers = config.contrast.layers

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by group. Each objective updates some of the groups."""
        critic = self.discriminator.critic
        groups = {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "trunk": critic.trunk,
            "score": critic.score,
            "heads": self.discriminator.heads,
        }
        return {name: list(network.parameters()) for name, network in groups.items()}

    def restart_contrast(self, resolution: int) -> None:
        """Select the layers that exist at this resolution, and empty the queues."""
        config = self._config.contrast
        self.layers, local_layers = config.layers, config.local_layers
        if self._config.model.grows:
            self.layers = tuple(layer for layer in self.layers if FEATURE_MAPS.get(layer, 0) <= resolution)
            # At its own resolution, each position of a feature map depends on a single pixel.
            local_layers = tuple(layer for layer in local_layers if FEATURE_MAPS.get(layer, 0) < resolution)
        if self.contrast is not None:
            self.contrast.restart(self.layers, local_layers)

    def compilable(self) -> list[nn.Module]:
        """Return the modules to compile."""
        modules = [self.encoder.trunk, self.decoder, self.discriminator.critic]
        return modules if self.contrast is None else [*modules, self.contrast.momentum.critic]
