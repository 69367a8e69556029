"""Data sets small enough to decode into memory: their files, in torchvision's layout, and their splits."""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcvae_pipelines.optional import import_optional
from dcvae_pipelines.pixels import resize
from dcvae_pipelines.source import DataError

STL10_COUNTS = {"train": 5000, "unlabeled": 100_000, "test": 8000}


@dataclass(frozen=True)
class ImageSet:
    """Decoded split of a data set, in host memory.

    Attributes:
        name: the data set's name
        images: uint8 [N, C, H, W]
        labels: int64 [N], -1 for an image without a label; None for a data set without labels
    """

    name: str
    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 1,797 digits; every fifth is a test image."""
    dataset = import_optional("sklearn.datasets", "scikit-learn").load_digits()
    is_test = torch.arange(len(dataset.target)) % 5 == 0
    in_split = is_test if split == "test" else ~is_test
    greys = torch.from_numpy(dataset.images).float()[in_split, None] * (255 / 16)
    images = F.interpolate(greys, size=(32, 32), mode="bicubic", antialias=True)  # antialias: Pillow's bicubic kernel
    return images.clamp(0, 255).round().to(torch.uint8), torch.from_numpy(dataset.target).long()[in_split]


def mnist(root: str | Path | None, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """Read MNIST's 28×28 images, padded with zeros to 32×32.

    Each of the split's two files can be plain or gzipped; the other split's can be missing. torchvision's data set
    requires all four files, plain, and does not name a damaged one.
    """
    root, remedy = root_and_remedy("mnist", root, "MNIST/raw")
    stem = "train" if split == "train" else "t10k"
    paths = [root / "MNIST" / "raw" / f"{stem}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if download and not all(map(_plain_or_gzipped, paths)):
        reader = import_optional("torchvision.datasets", "torchvision").MNIST
        download_with("mnist", reader, root, train=split == "train")
    images, labels = (_read_idx(path, dimensions, remedy) for path, dimensions in zip(paths, (3, 1), strict=True))
    if images.shape != (len(labels), 28, 28):
        contents = f"images {list(images.shape)} and {len(labels)} labels"
        raise DataError(f"mnist: {paths[0]} and {paths[1].name} hold {contents}, not N images of 28×28 and N labels")
    return F.pad(images, (2, 2, 2, 2))[:, None], labels.long()


def _plain_or_gzipped(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _read_idx(path: Path, dimensions: int, remedy: str) -> Tensor:
    """Read an idx file: bytes 0, 0, 8 (uint8) and number of dimensions; the shape as big-endian uint32; the values."""
    file = _plain_or_gzipped(path)
    if file is None:
        raise DataError(f"mnist: looked for {path} (or {path.name}.gz) and found neither; {remedy}")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = struct.unpack_from(f">{dimensions}I", content, offset=4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"mnist: {file} cannot be read ({error}); delete it, then {remedy}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or not start < len(content) == start + math.prod(shape):
        raise DataError(
            f"mnist: {file} is empty, truncated or not an idx{dimensions} file of bytes; delete it, then {remedy}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def cifar10(root: str | Path | None, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """Load CIFAR-10 with torchvision."""
    reader = import_optional("torchvision.datasets", "torchvision").CIFAR10
    root, remedy = root_and_remedy("cifar10", root, reader.base_folder)
    if download:
        download_with("cifar10", reader, root, train=split == "train")
    try:
        # The files are pickles. torchvision compares the md5 of all files before it opens the first, so that only the
        # published bytes are ever unpickled.
        dataset = reader(root, train=split == "train")
    except (OSError, RuntimeError) as error:
        folder = root / reader.base_folder
        md5s = dict(reader.train_list + reader.test_list) | {reader.meta["filename"]: reader.meta["md5"]}
        files = ", ".join(file for file, md5 in md5s.items() if not _has_md5(folder / file, md5))
        raise DataError(f"cifar10: missing in {folder} or not as published (md5): {files}; {remedy}") from error
    images_NHWC = torch.from_numpy(dataset.data)
    return images_NHWC.permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def _has_md5(file: Path, md5: str) -> bool:
    try:
        return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() == md5
    except OSError:
        return False


def stl10(root: str | Path | None, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """Read STL-10; the training split is the 5,000 labelled images, then the 100,000 unlabelled.

    The files are memory-mapped. torchvision's data set computes the md5 of all five files (3.1 GB) each time, requires
    the other split's files too, and reads the training images into 6 GB of memory.
    """
    root, remedy = root_and_remedy("stl10", root, "stl10_binary")
    if download:
        reader = import_optional("torchvision.datasets", "torchvision").STL10
        download_with("stl10", reader, root, split="test")  # fetches all splits; "test" is the smallest to load
    folder, parts = root / "stl10_binary", ("train", "unlabeled") if split == "train" else ("test",)
    images, labels = [], []
    for part in parts:
        count = STL10_COUNTS[part]
        images.append(_read_stl10(folder / f"{part}_X.bin", (count, 3, 96, 96), remedy))
        if part == "unlabeled":
            labels.append(torch.full((count,), -1))
        else:
            labels.append(_read_stl10(folder / f"{part}_y.bin", (count,), remedy).long() - 1)  # published as 1 to 10
    # The files store images by columns. Resized in slices, because the temporary copies are large.
    small = [resize(slice_.transpose(2, 3).contiguous(), 32) for part in images for slice_ in part.split(1000)]
    return torch.cat(small), torch.cat(labels)


def _read_stl10(file: Path, shape: tuple[int, ...], remedy: str) -> Tensor:
    """Check the size of a file, and memory-map it as uint8 of this shape."""
    size = file.stat().st_size if file.is_file() else None
    if size != math.prod(shape):
        problem = "is missing" if size is None else f"has {size:,} bytes instead of {math.prod(shape):,}"
        raise DataError(f"stl10: {file} {problem}; {remedy}")
    return torch.from_file(str(file), size=size, dtype=torch.uint8).view(shape)


def root_and_remedy(name: str, root: str | Path | None, layout: str) -> tuple[Path, str]:
    """Return the folder of a data set, and advice for error messages if it does not contain `layout`.

    Raises:
        DataError: the folder is not set.
    """
    remedy = f"set --data.root to the folder that holds {layout}, or add --data.download true to download it"
    if root is None:
        raise DataError(f"{name}: data.root is not set; {remedy}")
    return Path(root).expanduser(), remedy


def download_with(name: str, dataset: Callable[..., Any], root: Path, **split: Any) -> None:
    """Download a data set with torchvision, unless it exists.

    Raises:
        DataError: the download failed.
    """
    try:
        dataset(root, **split, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())  # torchvision's message has a line for each mirror
        raise DataError(f"{name}: cannot be downloaded to {root}: {reason}") from error
