"""For all tests: what a GPU is needed for skips itself without one, and Triton interprets; the real images, if any."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dcvae_fast.evaluation.pretrained import Extractor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when kernels are first imported


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder `shared/data` beside the checkout; the test skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images, ../shared/data beside the checkout, are absent")
    return folder


@pytest.fixture(scope="session")
def torchvision_root(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that holds MNIST and CIFAR-10 as torchvision lays them out; 235 MB, removed after the session."""
    root = tmp_path_factory.mktemp("torchvision")
    subprocess.run([sys.executable, real_data / "unpack.py", root], check=True, capture_output=True)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the end of a run: train the linear probe for 20 steps only, and write no grids."""
    from dcvae_fast.evaluation import probe
    from dcvae_fast.training import loop

    monkeypatch.setattr(probe, "STEPS", 20)
    monkeypatch.setattr(loop, "write_grids", lambda step, log, images: None)


@pytest.fixture(scope="session")
def features() -> "Extractor":
    """A random network of the kind that torch-fidelity takes, registered there as what it is."""
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor

    from dcvae_fast.evaluation.fidelity import registered_features

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
            given = {"pool": pooled, "logits": self.head(pooled)}
            return tuple(given[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pool", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pool"

    name = "random, not Inception"
    register_feature_extractor(name, RandomFeatures)
    return registered_features(name)


@pytest.fixture
def no_inception(monkeypatch: pytest.MonkeyPatch, features: "Extractor") -> None:
    """Let the random network stand in for Inception, whose weights are not needed then."""
    from dcvae_fast.evaluation import fidelity

    monkeypatch.setattr(fidelity, "load_features", lambda weights: features)
