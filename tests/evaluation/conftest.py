"""A small model, a small data set, and small random networks in place of Inception, VGG16 and LPIPS."""

import pytest
import torch
from torch import Tensor, nn

from dcvae_fast import DCVAE
from dcvae_fast.config import ModelConfig
from dcvae_fast.evaluation import Splits
from dcvae_fast.evaluation.fidelity import registered_features
from dcvae_fast.evaluation.pretrained import Extractor
from dcvae_pipelines import ImageSet

RANDOM = "random, not Inception"


@pytest.fixture
def model() -> DCVAE:
    torch.manual_seed(0)
    return DCVAE(ModelConfig(latent_dim=6, decoder_width=8, encoder_width=8)).eval()


@pytest.fixture
def data() -> Splits:
    """Colour images with labels: 60 training and 37 test images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (97, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(97) % 3
    return Splits(ImageSet("noise", images[:60], labels[:60]), ImageSet("noise", images[60:], labels[60:]))


@pytest.fixture(scope="session")
def features() -> Extractor:
    """A random feature extractor, registered in torch-fidelity under a name that says so."""
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor

    class RandomFeatures(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **settings: object):
            super().__init__(name, features_list)
            with torch.random.fork_rng():
                torch.manual_seed(2)
                self.layers = nn.Sequential(nn.Conv2d(3, 12, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
                self.head = nn.Linear(12, 5)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            pooled = self.layers(images.float() / 32 - 4).flatten(1)
            outputs = {"pool": pooled, "logits": self.head(pooled)}
            return tuple(outputs[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pool", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pool"

    register_feature_extractor(RANDOM, RandomFeatures)
    return registered_features(RANDOM)


@pytest.fixture
def vgg16() -> Extractor:
    torch.manual_seed(3)
    return Extractor("random, not VGG16", nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()))


class SquaredDistance(nn.Module):
    """Sum of squared differences per image, with values 0–255 divided by 255."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ((a - b) / 255).square().sum((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips() -> Extractor:
    return Extractor("squared distance, not LPIPS", SquaredDistance())
