import gzip
import struct
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from dcvae_pipelines import DataError, ImageSet, load_dataset

DIGITS: Any = load_digits()


def idx(values: Tensor) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + bytes(values.flatten().tolist())


def labels_of(data: ImageSet) -> Tensor:
    assert data.labels is not None
    return data.labels


@pytest.fixture
def tiny_mnist(tmp_path: Path) -> Path:
    """A root whose MNIST has five training images, plain images and gzipped labels, and no test images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 28, 28), generator=generator, dtype=torch.uint8)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(images))
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.tensor([3, 1, 4, 1, 5]))))
    return tmp_path


# --- digits ---


def test_every_fifth_digit_is_a_test_image():
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert train.name == "digits"
    assert train.images.shape == (1437, 1, 32, 32) and test.images.shape == (360, 1, 32, 32)
    for part in (train, test):
        assert part.images.dtype == torch.uint8 and labels_of(part).dtype == torch.int64
        assert labels_of(part).unique().tolist() == list(range(10))
    labels = DIGITS.target
    assert labels_of(test).tolist() == labels[::5].tolist()
    assert labels_of(train)[:8].tolist() == [*labels[1:5], *labels[6:10]]


def test_digits_are_upscaled_like_pillow():
    images = load_dataset("digits", split="test").images
    assert images.min() == 0 and images.max() == 255
    for image, digit in zip(images[:50, 0], DIGITS.images[::5], strict=False):
        expected = Image.fromarray((digit * 255 / 16).astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
        assert (image - torch.from_numpy(np.array(expected)).clamp(0, 255)).abs().max() < 0.51


# --- MNIST ---


@pytest.mark.parametrize(("split", "stem", "count"), [("train", "train", 60_000), ("test", "t10k", 10_000)])
def test_mnist_holds_the_published_bytes(torchvision_root: Path, real_data: Path, split: str, stem: str, count: int):
    mnist = load_dataset("mnist", torchvision_root, split)
    pixels = gzip.decompress((real_data / "mnist" / f"{stem}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((real_data / "mnist" / f"{stem}-labels-idx1-ubyte.gz").read_bytes())[8:]
    assert mnist.images.shape == (count, 1, 32, 32) and mnist.images.dtype == torch.uint8
    assert mnist.images[:, 0, 2:30, 2:30].contiguous().numpy().tobytes() == pixels
    assert bytes(labels_of(mnist).tolist()) == labels and labels_of(mnist).dtype == torch.int64
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert not mnist.images[:, 0, border].any()


def test_mnist_is_read_plain_or_gzipped(tiny_mnist: Path):
    mnist = load_dataset("mnist", str(tiny_mnist))
    plain = (tiny_mnist / "MNIST/raw/train-images-idx3-ubyte").read_bytes()
    assert mnist.images[:, 0, 2:30, 2:30].contiguous().numpy().tobytes() == plain[16:]
    assert labels_of(mnist).tolist() == [3, 1, 4, 1, 5]


def test_missing_mnist_names_the_file_and_the_options(tiny_mnist: Path):
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", tiny_mnist, "test")
    for part in (str(tiny_mnist / "MNIST/raw/t10k-images-idx3-ubyte"), ".gz", "--data.root", "--data.download true"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1]),
        ("train-images-idx3-ubyte", lambda content: content + b"\0"),
        ("train-images-idx3-ubyte", lambda content: b"\0\0\x0d" + content[3:]),
        ("train-images-idx3-ubyte", lambda content: content[:7]),
        ("train-images-idx3-ubyte", lambda content: b""),
        ("train-images-idx3-ubyte", lambda content: content[:4] + bytes(12)),
        ("train-labels-idx1-ubyte.gz", lambda content: content[:-9]),
        ("train-labels-idx1-ubyte.gz", lambda content: content[:-8] + bytes(8)),
        ("train-labels-idx1-ubyte.gz", lambda content: b"<html>not found</html>"),
        ("train-labels-idx1-ubyte.gz", lambda content: content[:10] + b"\xff" + content[11:]),
    ],
)
def test_corrupt_mnist_names_the_file(tiny_mnist: Path, file: str, damage):
    path = tiny_mnist / "MNIST" / "raw" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", tiny_mnist)
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)


def test_mnist_images_and_labels_must_agree(tiny_mnist: Path):
    (tiny_mnist / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(idx(torch.tensor([3, 1, 4, 1])))
    with pytest.raises(DataError, match=r"images \[5, 28, 28\] and 4 labels"):
        load_dataset("mnist", tiny_mnist)


# --- CIFAR-10 ---


def atlas(real_data: Path, batch: str) -> tuple[Tensor, list[int]]:
    """Return the images [10000, 3, 32, 32] and labels of an official batch, cut from its atlas."""
    with Image.open(real_data / "cifar10" / f"{batch}.webp") as file:
        pixels = np.asarray(file.convert("RGB"))
    tiles = pixels.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    rows = (real_data / "cifar10" / f"{batch}.tsv").read_text().splitlines()
    return torch.from_numpy(tiles), [int(row.split("\t")[0]) for row in rows]


@pytest.mark.parametrize(
    ("split", "batch", "count"), [("train", "data_batch_1", 50_000), ("test", "test_batch", 10_000)]
)
def test_cifar10_holds_the_published_images(
    torchvision_root: Path, real_data: Path, split: str, batch: str, count: int
):
    cifar10 = load_dataset("cifar10", torchvision_root, split)
    assert cifar10.images.shape == (count, 3, 32, 32) and cifar10.images.dtype == torch.uint8
    assert labels_of(cifar10).shape == (count,) and labels_of(cifar10).dtype == torch.int64
    images, labels = atlas(real_data, batch)
    assert torch.equal(cifar10.images[:10_000], images)
    assert labels_of(cifar10)[:10_000].tolist() == labels
    assert labels_of(cifar10).bincount().tolist() == [count // 10] * 10


def test_corrupt_or_missing_cifar10_files_are_named(torchvision_root: Path, tmp_path: Path):
    published, folder = torchvision_root / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in published.iterdir():
        if file.name != "data_batch_2":
            (folder / file.name).symlink_to(file)
    (folder / "data_batch_4").unlink()
    (folder / "data_batch_4").write_bytes((published / "data_batch_4").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"\(md5\): data_batch_2, data_batch_4; set --data.root") as caught:
        load_dataset("cifar10", tmp_path)
    assert str(folder) in str(caught.value)


def test_a_pickle_that_is_not_the_published_one_is_never_opened(tmp_path: Path):
    folder, trap = tmp_path / "cifar-10-batches-py", tmp_path / "trap"
    folder.mkdir()
    for file in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / file).write_bytes(b"cpathlib\nPath.touch\n(cpathlib\nPath\n(V" + str(trap).encode() + b"\ntRtR.")
    with pytest.raises(DataError, match="not as published"):
        load_dataset("cifar10", tmp_path)
    assert not trap.exists()


def test_missing_cifar10_names_the_file_and_the_options(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", tmp_path)
    for part in (str(tmp_path / "cifar-10-batches-py"), "data_batch_1", "--data.root", "--data.download true"):
        assert part in str(caught.value)


# --- all data sets ---


def test_an_unknown_name_lists_the_known_names():
    with pytest.raises(DataError, match="unknown data set 'svhn'; known are digits, mnist, cifar10, stl10"):
        load_dataset("svhn")


def test_an_unknown_split_lists_the_known_splits():
    with pytest.raises(DataError, match="digits: unknown split 'valid'; known are train, test"):
        load_dataset("digits", split="valid")


@pytest.mark.parametrize(("name", "layout"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")])
def test_a_missing_root_names_the_setting(name: str, layout: str):
    with pytest.raises(DataError, match=f"{name}: data.root is not set; set --data.root to the folder .* {layout}"):
        load_dataset(name)


@pytest.mark.parametrize(("name", "loader"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_a_failed_download_raises_one_error(name: str, loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(self, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(getattr(torchvision.datasets, loader), "download", offline)
    with pytest.raises(DataError, match=f"{name}: cannot be downloaded to .*: .*no route to host"):
        load_dataset(name, tmp_path, download=True)


def test_only_missing_files_are_downloaded_and_only_on_request(tiny_mnist: Path, monkeypatch: pytest.MonkeyPatch):
    def never(self, *args, **kwargs):
        raise AssertionError("a download was started")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", never)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", never)
    for name in ("mnist", "cifar10"):
        with pytest.raises(DataError):
            load_dataset(name, tiny_mnist / "empty")
    assert len(load_dataset("mnist", tiny_mnist, download=True).images) == 5


def test_stl10_is_downloaded_by_reading_its_smallest_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(torchvision.datasets, "STL10", lambda root, **options: calls.append(options))
    with pytest.raises(DataError, match=r"stl10: .* is missing"):
        load_dataset("stl10", tmp_path, download=True)
    assert calls == [{"split": "test", "download": True}]


def test_a_downloaded_data_set_is_read(tiny_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(root: Path, train: bool, download: bool):
        (tiny_mnist / "MNIST").rename(root / "MNIST")

    root = tmp_path / "elsewhere"
    root.mkdir()
    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    assert labels_of(load_dataset("mnist", root, download=True)).tolist() == [3, 1, 4, 1, 5]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r"torchvision is needed here .*: pip install torchvision"):
        load_dataset("cifar10", tmp_path)
