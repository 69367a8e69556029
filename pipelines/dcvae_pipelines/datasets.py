"""The data sets: where their files lie, how they are split; and single image files."""

import gzip
import hashlib
import importlib
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcvae_pipelines.source import DataError


@dataclass(frozen=True)
class ImageSet:
    """A split of a data set, decoded, in host memory."""

    name: str
    images: Tensor
    """uint8 [N, C, H, W]"""
    labels: Tensor
    """int64 [N]"""


def load_dataset(name: str, root: str | Path | None = None, split: str = "train", download: bool = False) -> ImageSet:
    """Loads a split of a data set, at 32×32 pixels.

    | name      | images                                          | train  | test   | files                    |
    |-----------|-------------------------------------------------|--------|--------|--------------------------|
    | `digits`  | grey, 8×8 upscaled smoothly (scikit-learn)      | 1,437  | 360    | come with scikit-learn   |
    | `mnist`   | grey, 28×28 in a border of zeros                | 60,000 | 10,000 | ROOT/MNIST/raw           |
    | `cifar10` | RGB                                             | 50,000 | 10,000 | ROOT/cifar-10-batches-py |

    Args:
        name: one of the table.
        root: the folder ROOT of the table, laid out as torchvision does; `digits` needs none.
        split: "train" or "test".
        download: whether files that are missing under `root` may be downloaded.

    Raises:
        DataError: unknown name or split; files missing or corrupt; a download that failed; a package not installed.
    """
    if split not in ("train", "test"):
        raise DataError(f"{name}: unknown split {split!r}; known are train and test")
    match name:
        case "digits":
            images, labels = _digits(split)
        case "mnist":
            images, labels = _mnist(root, split, download)
        case "cifar10":
            images, labels = _cifar10(root, split, download)
        case _:
            raise DataError(f"unknown data set {name!r}; known are digits, mnist and cifar10")
    return ImageSet(name, images, labels)


def load_image(path: str | Path, channels: int, resolution: int) -> Tensor:
    """Reads an image file of any kind that Pillow knows, as a network sees it.

    Turned upright (EXIF), cropped to the square in its centre, transparency dropped, 16-bit greys scaled to 8 bits,
    resized with antialiasing.

    Args:
        path: the image file; of an animation, the first frame.
        channels: 1 for grey, 3 for RGB.
        resolution: height and width of the result in pixels.

    Returns:
        float32 [C, H, W] in [-1, 1].

    Raises:
        DataError: the file is missing, is no image, is damaged, holds floats or far too many pixels.
    """
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")
    pil, pil_ops = _import("PIL.Image", "Pillow"), _import("PIL.ImageOps", "Pillow")
    try:
        with pil.open(path) as file:
            image = pil_ops.exif_transpose(file)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image.info.pop("transparency", None)  # or Pillow warns that converting drops it
        if image.mode == "F":
            raise ValueError("its pixels are floats, which have no agreed range")
        if image.mode.startswith("I"):  # "I;16" and its kin, and the "I" that Pillow makes of a 16-bit PGM
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5)
        image = image.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such image file") from error
    except Exception as error:  # on damaged files Pillow's decoders raise anything, SyntaxError and struct.error too
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    pixels_HWC = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, channels)
    pixels_1CHW = pixels_HWC.permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels_1CHW, size=(resolution, resolution), mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 255) / 127.5 - 1  # bicubic overshoots at edges


def _digits(split: str) -> tuple[Tensor, Tensor]:
    digits = _import("sklearn.datasets", "scikit-learn").load_digits()
    held_out = torch.arange(len(digits.target)) % 5 == 0
    chosen = held_out if split == "test" else ~held_out
    greys = torch.from_numpy(digits.images).float()[chosen, None] * (255 / 16)
    images = F.interpolate(greys, size=(32, 32), mode="bicubic", antialias=True)  # antialias: Pillow's bicubic kernel
    return images.clamp(0, 255).round().to(torch.uint8), torch.from_numpy(digits.target).long()[chosen]


def _mnist(root: str | Path | None, split: str, download: bool) -> tuple[Tensor, Tensor]:
    root, remedy = _root_and_remedy("mnist", root, "MNIST/raw")
    stem = "train" if split == "train" else "t10k"
    paths = [root / "MNIST" / "raw" / f"{stem}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if download and not all(map(_plain_or_gzipped, paths)):
        _download("mnist", _import("torchvision.datasets", "torchvision").MNIST, root, split)
    images, labels = (_read_idx(path, dimensions, remedy) for path, dimensions in zip(paths, (3, 1), strict=True))
    if images.shape != (len(labels), 28, 28):
        came = f"images {list(images.shape)} and {len(labels)} labels"
        raise DataError(f"mnist: {paths[0]} and {paths[1].name} hold {came}, not N images of 28×28 and N labels")
    return F.pad(images, (2, 2, 2, 2))[:, None], labels.long()


def _plain_or_gzipped(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _read_idx(path: Path, dimensions: int, remedy: str) -> Tensor:
    """An idx file of bytes: 0, 0, 8 (uint8), the number of dimensions; the dimensions as big-endian uint32; values."""
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
            f"mnist: {file} is empty, truncated or no idx{dimensions} file of bytes; delete it, then {remedy}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def _cifar10(root: str | Path | None, split: str, download: bool) -> tuple[Tensor, Tensor]:
    cifar10 = _import("torchvision.datasets", "torchvision").CIFAR10
    root, remedy = _root_and_remedy("cifar10", root, cifar10.base_folder)
    if download:
        _download("cifar10", cifar10, root, split)
    try:
        # The files are pickles. torchvision compares each with its published md5 before it opens the first,
        # so only the published bytes are ever unpickled.
        opened = cifar10(root, train=split == "train")
    except (OSError, RuntimeError) as error:
        folder = root / cifar10.base_folder
        md5s = dict(cifar10.train_list + cifar10.test_list) | {cifar10.meta["filename"]: cifar10.meta["md5"]}
        wrong = ", ".join(file for file, md5 in md5s.items() if not _has_md5(folder / file, md5))
        raise DataError(f"cifar10: missing in {folder}, or not as published (md5): {wrong}; {remedy}") from error
    images_NHWC = torch.from_numpy(opened.data)
    return images_NHWC.permute(0, 3, 1, 2).contiguous(), torch.tensor(opened.targets)


def _has_md5(file: Path, md5: str) -> bool:
    try:
        return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() == md5
    except OSError:
        return False


def _root_and_remedy(name: str, root: str | Path | None, layout: str) -> tuple[Path, str]:
    remedy = f"set --data.root to the folder that holds {layout}, or add --data.download true to have it downloaded"
    if root is None:
        raise DataError(f"{name}: data.root is not set; {remedy}")
    return Path(root).expanduser(), remedy


def _download(name: str, dataset: Callable[..., Any], root: Path, split: str) -> None:
    try:
        dataset(root, train=split == "train", download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())  # torchvision's runs over several lines, one for each mirror
        raise DataError(f"{name}: cannot be downloaded to {root}: {reason}") from error


def _import(module: str, package: str) -> ModuleType:
    """Imports late: neither this package nor the ops beside it should load, or need, what a run does not use."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{package} is needed here and cannot be imported ({error}): pip install {package}") from error
