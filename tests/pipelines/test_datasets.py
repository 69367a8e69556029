import gzip
import struct
import sys
import warnings
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

from dcvae_pipelines import DataError, load_dataset, load_image

DIGITS: Any = load_digits()


def idx(values: Tensor) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + bytes(values.flatten().tolist())


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


def test_digits_are_split_into_every_fifth_and_the_others():
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert train.name == "digits"
    assert train.images.shape == (1437, 1, 32, 32) and test.images.shape == (360, 1, 32, 32)
    for part in (train, test):
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert part.labels.unique().tolist() == list(range(10))
    labels = DIGITS.target
    assert test.labels.tolist() == labels[::5].tolist()
    assert train.labels[:8].tolist() == [*labels[1:5], *labels[6:10]]


def test_digits_are_upscaled_as_pillow_does():
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
    assert bytes(mnist.labels.tolist()) == labels and mnist.labels.dtype == torch.int64
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert not mnist.images[:, 0, border].any()


def test_mnist_is_read_plain_or_gzipped(tiny_mnist: Path):
    mnist = load_dataset("mnist", str(tiny_mnist))
    plain = (tiny_mnist / "MNIST/raw/train-images-idx3-ubyte").read_bytes()
    assert mnist.images[:, 0, 2:30, 2:30].contiguous().numpy().tobytes() == plain[16:]
    assert mnist.labels.tolist() == [3, 1, 4, 1, 5]


def test_missing_mnist_says_what_was_looked_for_and_what_to_do(tiny_mnist: Path):
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
    """The images [10000, 3, 32, 32] and labels of an official batch, cut from its atlas."""
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
    assert cifar10.labels.shape == (count,) and cifar10.labels.dtype == torch.int64
    images, labels = atlas(real_data, batch)
    assert torch.equal(cifar10.images[:10_000], images)
    assert cifar10.labels[:10_000].tolist() == labels
    assert cifar10.labels.bincount().tolist() == [count // 10] * 10


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


def test_missing_cifar10_says_what_was_looked_for_and_what_to_do(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", tmp_path)
    for part in (str(tmp_path / "cifar-10-batches-py"), "data_batch_1", "--data.root", "--data.download true"):
        assert part in str(caught.value)


# --- all data sets ---


def test_an_unknown_name_lists_the_known():
    with pytest.raises(DataError, match="unknown data set 'svhn'; known are digits, mnist and cifar10"):
        load_dataset("svhn")


def test_an_unknown_split_lists_the_known():
    with pytest.raises(DataError, match="digits: unknown split 'valid'; known are train and test"):
        load_dataset("digits", split="valid")


@pytest.mark.parametrize(("name", "layout"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")])
def test_without_a_root_the_setting_is_named(name: str, layout: str):
    with pytest.raises(DataError, match=f"{name}: data.root is not set; set --data.root to the folder .* {layout}"):
        load_dataset(name)


@pytest.mark.parametrize(("name", "loader"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_a_failed_download_is_one_error(name: str, loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(self, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(getattr(torchvision.datasets, loader), "download", offline)
    with pytest.raises(DataError, match=f"{name}: cannot be downloaded to .*: .*no route to host"):
        load_dataset(name, tmp_path, download=True)


def test_nothing_is_downloaded_unasked_or_in_vain(tiny_mnist: Path, monkeypatch: pytest.MonkeyPatch):
    def never(self, *args, **kwargs):
        raise AssertionError("a download was started")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", never)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", never)
    for name in ("mnist", "cifar10"):
        with pytest.raises(DataError):
            load_dataset(name, tiny_mnist / "empty")
    assert len(load_dataset("mnist", tiny_mnist, download=True).images) == 5


def test_a_download_is_then_read(tiny_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(root: Path, train: bool, download: bool):
        (tiny_mnist / "MNIST").rename(root / "MNIST")

    root = tmp_path / "elsewhere"
    root.mkdir()
    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    assert load_dataset("mnist", root, download=True).labels.tolist() == [3, 1, 4, 1, 5]


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r"torchvision is needed here .*: pip install torchvision"):
        load_dataset("cifar10", tmp_path)


# --- single images ---


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(array: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def to_8_bits(image: Tensor) -> Tensor:
    return (image + 1) * 127.5


def test_an_image_of_the_right_size_is_read_exactly(tmp_path: Path):
    array = pixels(0, 32, 32, 3)
    image = load_image(save(array, tmp_path / "a.png"), channels=3, resolution=32)
    assert image.dtype == torch.float32 and image.shape == (3, 32, 32)
    assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1)


def test_grey_becomes_rgb_and_rgb_becomes_grey(tmp_path: Path):
    grey = pixels(0, 16, 16)
    image = load_image(save(grey, tmp_path / "grey.png"), channels=3, resolution=16)
    assert torch.equal(to_8_bits(image).round(), torch.from_numpy(grey).float().expand(3, 16, 16))

    colour = pixels(1, 16, 16, 3)
    image = load_image(save(colour, tmp_path / "colour.png"), channels=1, resolution=16)
    luma = torch.from_numpy(colour).float() @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601
    assert image.shape == (1, 16, 16)
    assert (to_8_bits(image)[0] - luma).abs().max() < 1


@pytest.mark.parametrize(("height", "width"), [(16, 40), (40, 16), (17, 40)])
def test_the_centre_square_is_taken(tmp_path: Path, height: int, width: int):
    array, side = pixels(0, height, width), min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = load_image(save(array, tmp_path / "a.png"), channels=1, resolution=side)
    assert torch.equal(
        to_8_bits(image).round()[0], torch.from_numpy(array[top : top + side, left : left + side]).float()
    )


def test_shrinking_is_antialiased_as_pillow_does(tmp_path: Path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing, all black or all white
    image = load_image(save(stripes, tmp_path / "stripes.png"), channels=1, resolution=32)
    assert (to_8_bits(image) - 127.5).abs().max() < 8

    array = pixels(0, 100, 100, 3)
    image = load_image(save(array, tmp_path / "noise.png"), channels=3, resolution=32)
    expected = np.array(Image.fromarray(array).resize((32, 32), Image.Resampling.BICUBIC))
    assert (to_8_bits(image) - torch.from_numpy(expected).permute(2, 0, 1)).abs().max() <= 1.01


def test_enlarging_stays_in_range(tmp_path: Path):
    digit = np.where(pixels(0, 28, 28) > 127, 255, 0).astype(np.uint8)
    image = load_image(save(digit, tmp_path / "digit.png"), channels=1, resolution=32)
    assert image.shape == (1, 32, 32)
    assert image.min() == -1 and image.max() == 1  # clamped: bicubic interpolation of steps overshoots


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, extension: str):
    array = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = load_image(save(array, tmp_path / f"deep.{extension}"), channels=1, resolution=256)
    assert image[0, 0, 0] == -1 and image[0, -1, -1] == 1
    assert (to_8_bits(image)[0] - torch.from_numpy(array / 257)).abs().max() < 0.51
    assert load_image(tmp_path / f"deep.{extension}", channels=3, resolution=8).shape == (3, 8, 8)


def test_cmyk_palette_and_bilevel_images_are_converted(tmp_path: Path):
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # full cyan ink
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "cmyk.tif")
    cyan = load_image(tmp_path / "cmyk.tif", channels=3, resolution=8)
    assert torch.equal(cyan, torch.tensor([-1.0, 1.0, 1.0])[:, None, None].expand(3, 8, 8))
    assert load_image(tmp_path / "cmyk.tif", channels=1, resolution=8).shape == (1, 8, 8)

    red = Image.new("RGB", (8, 8), (255, 0, 0)).quantize()
    red.save(tmp_path / "palette.gif")
    assert load_image(tmp_path / "palette.gif", channels=3, resolution=8)[:, 0, 0].tolist() == [1, -1, -1]

    Image.new("1", (8, 8), 1).save(tmp_path / "bilevel.png")
    assert (load_image(tmp_path / "bilevel.png", channels=1, resolution=8) == 1).all()


def test_transparency_is_dropped_silently(tmp_path: Path):
    array = pixels(0, 8, 8, 4)
    palette = Image.fromarray(array[..., :3]).quantize()
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(save(array, tmp_path / "alpha.png"), channels=3, resolution=8)
        from_palette = load_image(tmp_path / "palette.png", channels=3, resolution=8)
    assert torch.equal(to_8_bits(image).round(), torch.from_numpy(array[..., :3]).permute(2, 0, 1).float())
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1).float()
    assert torch.equal(to_8_bits(from_palette).round(), expected)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotated_images_stand_upright(tmp_path: Path, orientation: int, turns: int):
    array = pixels(0, 16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(save(array, tmp_path / "turned.png", exif=exif), channels=1, resolution=16)
    upright = torch.from_numpy(array[:, 4:20].copy()).rot90(turns)
    assert torch.equal(to_8_bits(image).round()[0], upright.float())


def test_a_real_face_is_read(real_data: Path):
    path = sorted((real_data / "faces1024").glob("*.jpg"))[0]
    image = load_image(path, channels=3, resolution=64)
    with Image.open(path) as file:
        expected = np.array(file.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))
    assert (to_8_bits(image) - torch.from_numpy(expected).permute(2, 0, 1)).abs().max() <= 1.01


def test_unreadable_images_name_the_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.png: there is no such image file"):
        load_image(tmp_path / "absent.png", channels=3, resolution=32)

    whole = save(pixels(0, 64, 64, 3), tmp_path / "whole.png").read_bytes()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.png").write_bytes(whole[:40] + bytes(100) + whole[140:])
    save(np.zeros((8, 8), np.float32), tmp_path / "floats.tif")
    for file in ("text.png", "truncated.png", "broken.png", "floats.tif", ""):
        with pytest.raises(DataError, match=f"{tmp_path / file}: cannot be read as an image"):
            load_image(tmp_path / file, channels=3, resolution=32)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(pixels(0, 64, 64), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb\.png: cannot be read as an image: .*decompression bomb"):
        load_image(path, channels=1, resolution=32)


def test_other_channel_counts_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), not 4"):
        load_image(tmp_path / "any.png", channels=4, resolution=32)
