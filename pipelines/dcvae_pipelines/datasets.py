"""The data sets by name: locations of their files, and splits."""

import hashlib
import heapq
import json
import re
from functools import cache
from pathlib import Path
from posixpath import basename, splitext
from typing import Literal, overload

import torch
from torch import Tensor

from dcvae_pipelines import decoded
from dcvae_pipelines.decoded import ImageSet, download_with, root_and_remedy
from dcvae_pipelines.encoded import EncodedSet, Files, Lmdb, Shards, Store, find_images
from dcvae_pipelines.image import Box
from dcvae_pipelines.optional import import_optional
from dcvae_pipelines.source import DataError

NAMES = ("digits", "mnist", "cifar10", "stl10", "celeba", "celebahq", "lsun_bedroom", "folder", "shards")


@overload
def load_dataset(
    name: Literal["digits", "mnist", "cifar10", "stl10"],
    root: str | Path | None = None,
    split: str = "train",
    download: bool = False,
) -> ImageSet: ...
@overload
def load_dataset(
    name: Literal["celeba", "celebahq", "lsun_bedroom", "folder", "shards"],
    root: str | Path | None = None,
    split: str = "train",
    download: bool = False,
) -> EncodedSet: ...
@overload
def load_dataset(
    name: str, root: str | Path | None = None, split: str = "train", download: bool = False
) -> ImageSet | EncodedSet: ...
def load_dataset(
    name: str, root: str | Path | None = None, split: str = "train", download: bool = False
) -> ImageSet | EncodedSet:
    """Find, check and split a data set.

    Decoded when loaded, to 32×32 pixels:

    | name      | images                                             | train   | test   | below ROOT            |
    |-----------|----------------------------------------------------|---------|--------|-----------------------|
    | `digits`  | grey, 8×8 upscaled smoothly                        | 1,437   | 360    | (with scikit-learn)   |
    | `mnist`   | grey, 28×28 in a border of zeros                   | 60,000  | 10,000 | MNIST/raw             |
    | `cifar10` | RGB                                                | 50,000  | 10,000 | cifar-10-batches-py   |
    | `stl10`   | RGB, 96×96 downscaled; 100,000 are unlabelled      | 105,000 | 8,000  | stl10_binary          |

    Decoded during training, at any resolution:

    | name           | images below ROOT                                   | split                                     |
    |----------------|-----------------------------------------------------|-------------------------------------------|
    | `celeba`       | celeba/img_align_celeba, cropped to 128×128 faces   | celeba/list_eval_partition.txt            |
    | `celebahq`     | anywhere, named by number; any subset               | 29,000 and 1,000, by a hash of the number |
    | `lsun_bedroom` | bedroom_{train,val}_lmdb, or folders                | 50,000 of bedroom_train by a hash of the  |
    |                | bedroom_{train,val}, or anywhere                    | key, 1 in 60 of a subset; `valid` is      |
    |                |                                                     | bedroom_val; a single folder as `folder`  |
    | `folder`       | in folders train and test, or anywhere, or an LMDB  | if anywhere: 1 in 20, at most 1,000, are  |
    |                |                                                     | held out by a hash of their names         |
    | `shards`       | *.tar of WebDataset, as `dcvae prepare` makes them  | train*.tar and test*.tar, or as `folder`  |

    Args:
        name: a name from the tables.
        root: the folder ROOT, in torchvision's layout if torchvision has the data set; `digits` needs none.
        split: "train" or "test"; "valid" for `celeba` and `lsun_bedroom`, where it equals "test" for a single folder.
        download: whether to download missing files to `root`, for data sets that torchvision can download.

    Raises:
        DataError: unknown name or split; files missing or corrupt; a failed download; a package not installed.
    """
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")
    splits = ("train", "valid", "test") if name in ("celeba", "lsun_bedroom") else ("train", "test")
    if split not in splits:
        raise DataError(f"{name}: unknown split {split!r}; known are {', '.join(splits)}")
    match name:
        case "digits":
            return ImageSet(name, *decoded.digits(split))
        case "mnist":
            return ImageSet(name, *decoded.mnist(root, split, download))
        case "cifar10":
            return ImageSet(name, *decoded.cifar10(root, split, download))
        case "stl10":
            return ImageSet(name, *decoded.stl10(root, split, download))
        case "celeba":
            return _celeba(root, split, download)
    folder = _folder(name, root)
    match name:
        case "celebahq":
            return _celebahq(folder, split)
        case "lsun_bedroom":
            return _lsun_bedroom(folder, split)
        case "folder" if (folder / "data.mdb").is_file():
            return _split_by_key(name, Lmdb(folder), split)
        case "folder":
            return _images(folder, split)
        case _:
            return _shards(folder, split)


def _folder(name: str, root: str | Path | None) -> Path:
    if root is None:
        raise DataError(f"{name}: data.root is not set; set --data.root to the folder that holds the images")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"{name}: looked for images in {folder}, which is not a folder; correct --data.root")
    return folder


def _celeba(root: str | Path | None, split: str, download: bool) -> EncodedSet:
    root, remedy = root_and_remedy("celeba", root, "celeba/img_align_celeba")
    if download:
        published = import_optional("torchvision.datasets", "torchvision").CelebA
        download_with("celeba", published, root, split="all")
    folder, partition = root / "celeba" / "img_align_celeba", root / "celeba" / "list_eval_partition.txt"
    for path in (folder, partition):
        if not path.exists():
            hint = " (unpack img_align_celeba.zip there)" if path.with_suffix(".zip").exists() else ""
            raise DataError(f"celeba: looked for {path} and did not find it{hint}; {remedy}")
    try:
        rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
        split_of = {file: ("train", "valid", "test")[int(part)] for file, part in rows}
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"celeba: {partition} is not the published list ({error}); {remedy}") from error
    names = sorted(file for file, part in split_of.items() if part == split)
    existing = set(find_images(folder))
    if missing := [file for file in names if file not in existing]:
        raise DataError(
            f"celeba: {len(missing):,} of the {len(names):,} {split} images that {partition} lists are missing in"
            f" {folder}, for example {missing[0]}; {remedy}"
        )
    return EncodedSet("celeba", Files(folder, names), torch.arange(len(names)), box=_celeba_face)


def _celeba_face(width: int, height: int) -> Box:
    """Return the 128×128 square around the face of an aligned image: Progressive GAN's crop."""
    if (width, height) != (178, 218):
        raise DataError(f"celeba: aligned images have 178 × 218 pixels; this one has {width} × {height}")
    row, column, side = 121, 89, 128  # row and column of the centre
    return row - side // 2, column - side // 2, side


def _celebahq(folder: Path, split: str) -> EncodedSet:
    names = _image_names("celebahq", folder)
    held_out = _celebahq_held_out()
    numbers = [re.search(r"(\d+)\.\w+$", name) for name in names]
    is_held_out = torch.tensor([number is not None and int(number[1]) in held_out for number in numbers])
    if not is_held_out.any():  # a subset that contains none of the held-out images
        is_held_out = _hold_out("celebahq", names)
    return EncodedSet("celebahq", Files(folder, names), _indices(is_held_out, split))


@cache
def _celebahq_held_out() -> frozenset[int]:
    """Choose 1,000 of the 30,000 images by a hash of their numbers; the paper's choice is not published."""
    return frozenset(sorted(range(30_000), key=lambda n: hashlib.sha256(f"celebahq {n}".encode()).digest())[:1000])


def _lsun_bedroom(root: Path, split: str) -> EncodedSet:
    """Load LSUN bedroom with `test` from the published training split, whose 300 validation images are `valid`.

    FID needs more reconstructions of different images than there are published validation images.
    """
    part = "val" if split == "valid" else "train"
    if any((root / f"bedroom_{suffix}_lmdb").exists() for suffix in ("train", "val")):
        folder = root / f"bedroom_{part}_lmdb"
        if not (folder / "data.mdb").is_file():
            raise DataError(
                f"lsun_bedroom: looked for {folder / 'data.mdb'} and did not find it; unpack bedroom_{part}_lmdb.zip"
                f" of LSUN in {root}"
            )
        store: Store = Lmdb(folder)
    elif any((root / f"bedroom_{suffix}").is_dir() for suffix in ("train", "val")):
        folder = root / f"bedroom_{part}"
        if not folder.is_dir():
            raise DataError(f"lsun_bedroom: looked for images in {folder}, which is not a folder; export LSUN's there")
        store = Files(folder, _image_names("lsun_bedroom", folder))
    else:
        return _split_by_key("lsun_bedroom", Files(root, _image_names("lsun_bedroom", root)), split)
    if split == "valid":
        return EncodedSet("lsun_bedroom", store, torch.arange(len(store)))
    # Keys of the LMDB, which are also the file names after an export: both have the same held-out images.
    keys = [splitext(basename(store.key(i)))[0] for i in range(len(store))]
    is_held_out = _hold_out("lsun_bedroom", keys, _lsun_held_out(len(keys)))
    return EncodedSet("lsun_bedroom", store, _indices(is_held_out, split))


def _lsun_held_out(total: int) -> int:
    """Return how many of LSUN's training images are held out: 50,000, or 1 in 60 of a subset, at least 1."""
    return max(1, min(50_000, total // 60))


def _images(root: Path, split: str) -> EncodedSet:
    """Load images from the folders train and test if both exist, else split all images below `root`."""
    if all((root / part).is_dir() for part in ("train", "test")):
        names = _image_names("folder", root / split)
        return EncodedSet("folder", Files(root / split, names), torch.arange(len(names)))
    return _split_by_key("folder", Files(root, _image_names("folder", root)), split)


def _image_names(name: str, folder: Path) -> list[str]:
    if names := find_images(folder):
        return names
    raise DataError(f"{name}: looked for images (JPEG, PNG, WebP…) in {folder} and below, and found none")


def _shards(root: Path, split: str) -> EncodedSet:
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise DataError(f"shards: looked for {root}/*.tar and found none; `dcvae prepare` packs images into shards")
    _check_manifest(root)
    by_split = {prefix: [path for path in paths if path.name.startswith(prefix)] for prefix in ("train", "test")}
    if not all(by_split.values()):
        return _split_by_key("shards", Shards(paths), split)
    store = Shards(by_split[split])
    if len(store) == 0:
        raise DataError(f"shards: {root}/*.tar contain no images")
    return EncodedSet("shards", store, torch.arange(len(store)))


def _check_manifest(root: Path) -> None:
    """Check that shards written by `dcvae prepare` are complete.

    Raises:
        DataError: `dcvae prepare` has not finished, or a shard is missing or has another size.
    """
    try:
        manifest = json.loads((root / "manifest.json").read_bytes())
        complete, shards = manifest["complete"], manifest.get("shards", [])
    except (OSError, ValueError, TypeError, KeyError):
        return  # not written by `dcvae prepare`
    if not complete:
        raise DataError(f"shards: {root} is not complete; run the same `dcvae prepare` again to finish it")
    for shard in shards:
        path = root / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            problem = "has another size" if path.is_file() else "is missing"
            raise DataError(f"shards: {path} {problem}; run the same `dcvae prepare` again to restore it")


def _split_by_key(name: str, store: Store, split: str) -> EncodedSet:
    """Split a store by a hash of its keys."""
    return EncodedSet(name, store, _indices(_hold_out(name, [store.key(i) for i in range(len(store))]), split))


def _hold_out(name: str, names: list[str], count: int | None = None) -> Tensor:
    """Hold out the `count` images whose names have the smallest hashes; None for 1 in 20, at least 1 and at most 1,000.

    Returns:
        bool [N], true for images that are held out.
    """
    if len(names) < 2:
        raise DataError(f"{name}: there is only one image; at least two are needed, because one is held out")
    if count is None:
        count = min(1000, max(1, len(names) // 20))
    hashes = [hashlib.sha256(key.encode(errors="surrogateescape")).digest() for key in names]
    is_held_out = torch.zeros(len(names), dtype=torch.bool)
    is_held_out[heapq.nsmallest(count, range(len(names)), key=hashes.__getitem__)] = True
    return is_held_out


def _indices(is_held_out: Tensor, split: str) -> Tensor:
    return (~is_held_out if split == "train" else is_held_out).nonzero()[:, 0]
