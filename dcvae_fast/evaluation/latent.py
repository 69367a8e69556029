"""Interpolation in latent space."""

import torch
from torch import Tensor

from dcvae_fast.models.dcvae import DCVAE


@torch.no_grad()
def interpolate(model: DCVAE, start: Tensor, end: Tensor, steps: int = 8) -> Tensor:
    """Interpolate between pairs of images, evenly on the line between their posterior means (Figures 6 and 11).

    Args:
        model: the autoencoder.
        start, end: images [B, C, H, W] in [-1, 1].
        steps: number of decoded images, including both reconstructions.

    Returns:
        [B, steps + 2, C, H, W]: the start image itself, `steps` decoded images, the end image itself.
    """
    first, last = model.encode(start).mean, model.encode(end).mean
    weights = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype)[None, :, None]
    latents = torch.lerp(first[:, None], last[:, None], weights)
    between = model.decode(latents.flatten(0, 1)).unflatten(0, (len(start), steps))
    return torch.cat([start[:, None], between, end[:, None]], dim=1)
