"""Distances between images and their reconstructions."""

import torch
from torch import Tensor

from dcvae_fast.models.dcvae import DCVAE


def images_at_once(resolution: int) -> int:
    """As many as need little memory: 256 at 32×32, 1 from 512×512 on."""
    return max(1, 256 * 32**2 // resolution**2)


@torch.no_grad()
def pixel_error(model: DCVAE, images: Tensor) -> float:
    """Mean squared error on [-1, 1] of the reconstructions from the posterior mean; images uint8 [N, C, H, W]."""
    total = torch.zeros((), dtype=torch.float64)
    for part in images.split(images_at_once(images.shape[-1])):
        real = part.to(model.device).float() / 127.5 - 1
        total += (model.reconstruct(real, sample_posterior=False) - real).square().double().sum().cpu()
    return total.item() / images.numel()


def mean_image_error(images: Tensor, mean_of: Tensor) -> float:
    """The same error of predicting the mean of `mean_of` for every image; both uint8 [N, C, H, W]."""
    mean = mean_of.double().mean(0)
    return (images.double() - mean).square().mean().item() / 127.5**2
