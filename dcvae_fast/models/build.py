"""Construction of the networks from a configuration."""

from typing import NamedTuple

from torch import Tensor, nn

from dcvae_fast.config import ModelConfig
from dcvae_fast.models import autogan, progressive
from dcvae_fast.models.progressive import Phase, set_phase


class Autoencoder(NamedTuple):
    encoder: autogan.Encoder | progressive.Encoder
    decoder: autogan.Decoder | progressive.Generator


def build_autoencoder(config: ModelConfig) -> Autoencoder:
    """Return encoder and decoder; progressive networks are set to the configured resolution and fade."""
    latent, channels = config.latent_dim, config.image_channels
    if not config.grows:
        return Autoencoder(
            autogan.Encoder(latent, config.encoder_width, channels),
            autogan.Decoder(latent, config.decoder_width, channels),
        )
    autoencoder = Autoencoder(
        progressive.Encoder(config.resolution, latent, config.widths, channels, config.variant),
        progressive.Generator(config.resolution, latent, config.widths, channels, config.variant),
    )
    for network in autoencoder:
        set_phase(network, Phase(config.resolution, config.alpha))
    return autoencoder


def build_discriminator(
    config: ModelConfig, stddev_group: int = 16
) -> autogan.Discriminator | progressive.Discriminator:
    if not config.grows:
        return autogan.Discriminator(config.discriminator_width, config.image_channels, config.contrast_dim)
    return progressive.Discriminator(
        config.resolution,
        config.widths,
        config.image_channels,
        config.contrast_dim,
        config.variant,
        stddev_group,
    )


def learning_rate_scales(network: nn.Module) -> dict[Tensor, float]:
    """Return the scale c of each weight with equalised learning rate; see `EqualizedConv2d`."""
    layers = (progressive.EqualizedConv2d, progressive.EqualizedLinear)
    return {layer.weight: layer.scale for layer in network.modules() if isinstance(layer, layers)}
