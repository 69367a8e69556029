"""Shared fixtures. Without a GPU, `gpu` tests are skipped and Triton kernels run in its interpreter."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are first imported


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder `../shared/data` next to the checkout; without it, the test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real images, ../shared/data next to the checkout, is missing")
    return folder


@pytest.fixture(scope="session")
def torchvision_root(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MNIST and CIFAR-10 in torchvision's layout; 235 MB, removed after the session."""
    root = tmp_path_factory.mktemp("torchvision")
    subprocess.run([sys.executable, real_data / "unpack.py", root], check=True, capture_output=True)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the end of a run: train the linear probe for 20 steps, and write no grids."""
    from dcvae_fast.evaluation import probe
    from dcvae_fast.training import loop

    monkeypatch.setattr(probe, "STEPS", 20)
    monkeypatch.setattr(loop, "write_grids", lambda step, log, images: None)


class Rows(nn.Module):
    """Replacement for Inception: the mean of each of four bands of rows."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)  # its device is that of the network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (images.float().mean(1).unflatten(1, (4, -1)).mean((2, 3)),)

    @staticmethod
    def convert_features_tuple_to_dict(features: tuple[Tensor]) -> dict[str, Tensor]:
        return {"rows": features[0]}

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "rows"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcvae_fast.evaluation import fidelity
    from dcvae_fast.evaluation.pretrained import Extractor

    monkeypatch.setattr(fidelity, "load_features", lambda weights: Extractor("rows, not Inception", Rows()))
