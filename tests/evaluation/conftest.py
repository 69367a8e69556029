"""A small model, a small data set, and small random networks in place of Inception, VGG16 and LPIPS."""

import pytest
import torch
from torch import Tensor, nn

from dcvae_fast import DCVAE
from dcvae_fast.config import ModelConfig
from dcvae_fast.evaluation import Splits
from dcvae_fast.evaluation.pretrained import Extractor
from dcvae_pipelines import ImageSet


@pytest.fixture
def model() -> DCVAE:
    torch.manual_seed(0)
    return DCVAE(ModelConfig(latent_dim=6, decoder_width=8, encoder_width=8)).eval()


@pytest.fixture
def data() -> Splits:
    """Colour images with labels, 60 to train with and 37 to test with."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (97, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(97) % 3
    return Splits(ImageSet("noise", images[:60], labels[:60]), ImageSet("noise", images[60:], labels[60:]))


@pytest.fixture
def vgg16() -> Extractor:
    torch.manual_seed(3)
    return Extractor("random, not VGG16", nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()))


class SquaredDistance(nn.Module):
    """Summed over an image's values on 0–255, and divided by 255²."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other) / 255).square().sum((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips() -> Extractor:
    return Extractor("a square, not LPIPS", SquaredDistance())
