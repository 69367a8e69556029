"""The networks that a configuration describes."""

from typing import NamedTuple

from torch import Tensor, nn

from dcvae_fast.config import ModelConfig
from dcvae_fast.models import autogan, progressive
from dcvae_fast.models.progressive import Phase, Widths, set_phase


class Autoencoder(NamedTuple):
    encoder: autogan.Encoder | progressive.Encoder
    decoder: autogan.Decoder | progressive.Generator


def build_autoencoder(config: ModelConfig) -> Autoencoder:
    """Encoder and decoder; of those that grow, at the resolution and fade of the configuration."""
    latent, channels = config.latent_dim, config.image_channels
    if not config.grows:
        return Autoencoder(
            autogan.Encoder(latent, config.encoder_width, channels),
            autogan.Decoder(latent, config.decoder_width, channels),
        )
    widths = Widths(config.base_channels, config.max_channels)
    built = Autoencoder(
        progressive.Encoder(config.resolution, latent, widths, channels),
        progressive.Generator(config.resolution, latent, widths, channels),
    )
    for network in built:
        set_phase(network, Phase(config.resolution, config.alpha))
    return built


def build_discriminator(config: ModelConfig) -> autogan.Discriminator | progressive.Discriminator:
    if not config.grows:
        return autogan.Discriminator(config.discriminator_width, config.image_channels, config.contrast_dim)
    widths = Widths(config.base_channels, config.max_channels)
    return progressive.Discriminator(config.resolution, widths, config.image_channels, config.contrast_dim)


def learning_rate_scales(network: nn.Module) -> dict[Tensor, float]:
    """For each weight with equalised learning rate its c; see `EqualizedConv2d`."""
    layers = (progressive.EqualizedConv2d, progressive.EqualizedLinear)
    return {layer.weight: layer.scale for layer in network.modules() if isinstance(layer, layers)}
