"""Encoded images on disk: in folders, tar shards (WebDataset) or an LMDB (LSUN)."""

import functools
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from torch import Tensor

from dcvae_pipelines.image import EXTENSIONS, Box, centre_square
from dcvae_pipelines.optional import import_optional
from dcvae_pipelines.source import DataError


class Store(Protocol):
    """Encoded images by index. Threads can read concurrently."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the image's name for error messages: a path, or a path and a key."""
        ...

    def key(self, index: int) -> str:
        """Return a name that is unique in the store and does not depend on the store's location."""
        ...

    def read(self, index: int) -> bytes:
        """Return the content of the image file.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        ...

    def label(self, index: int) -> int | None:
        """Return the image's class, or None if the store does not know it."""
        ...


@dataclass(frozen=True)
class EncodedSet:
    """Split of a data set, not decoded yet.

    Attributes:
        name: the data set's name
        store: the images of this split and others
        indices: int64 [N], indices of this split's images in the store
        box: function of the width and height of an upright image that returns the square to show
    """

    name: str
    store: Store
    indices: Tensor
    box: Callable[[int, int], Box] = centre_square

    def __len__(self) -> int:
        return len(self.indices)

    def image_name(self, index: int) -> str:
        return self.store.name(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        return self.store.read(int(self.indices[index]))

    def label(self, index: int) -> int | None:
        return self.store.label(int(self.indices[index]))

    def square(self, index: int, width: int, height: int, min_side: int = 1) -> Box:
        """Return the square of an upright image of this width and height that is shown.

        Raises:
            DataError: images of this data set must have another size, or the side is below `min_side`.
        """
        try:
            box = self.box(width, height)
        except DataError as error:
            raise DataError(f"{self.image_name(index)}: {error}") from error
        if box[2] < min_side:
            raise DataError(
                f"{self.image_name(index)}: its square of {box[2]} × {box[2]} pixels is too small for resolution"
                f" {min_side}; choose a lower model.resolution, or skip such images with data.on_corrupt skip or"
                " `dcvae prepare`"
            )
        return box


class Files:
    """Image files, by path relative to a folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def key(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{self.name(index)}: cannot be read: {error.strerror}") from error

    def label(self, index: int) -> int | None:
        return None


def find_images(folder: Path) -> list[str]:
    """Return the paths of all image files below a folder, relative to it, sorted.

    Image files have one of `EXTENSIONS`. Hidden files (".name") are ignored, and links to folders are not followed.

    Raises:
        DataError: the folder cannot be read, or an image in it is a broken link or a link out of the folder.
    """
    real_folder, names, pending = folder.resolve(), [], [str(folder)]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS) and _is_image_within(entry, real_folder):
                names.append(os.path.relpath(entry.path, folder))
    return sorted(names)


def _is_image_within(entry: os.DirEntry[str], folder: Path) -> bool:
    """Return whether an entry is a file; reading a pipe or device could block.

    Raises:
        DataError: the entry is a broken link or a link out of the folder.
    """
    if entry.is_symlink():
        try:
            target = Path(entry.path).resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise DataError(f"{entry.path}: is a broken link; remove it") from error
        if not target.is_relative_to(folder):
            raise DataError(f"{entry.path}: is a link out of {folder}, which is not followed; copy the image instead")
    return entry.is_file()


class Shards:
    """Images in tar archives in WebDataset's layout, with random access.

    The index of an archive, NAME.idx as written by DALI's `wds2idx` and `dcvae prepare`, is used unless it is older
    than the archive. Otherwise the archive is scanned once.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """
        Args:
            paths: the archives, uncompressed.

        Raises:
            DataError: a path is not a tar archive, is compressed or cut short, has a member that would be unpacked
                outside its folder, or has an index that does not match.
        """
        self.paths = list(paths)
        self._samples: list[tuple[int, Member, Member | None]] = []  # index of the archive, image, label
        for shard, path in enumerate(self.paths):
            for image, label in _labelled_images(path):
                self._samples.append((shard, image, label))

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return f"{self.paths[self._samples[index][0]]}: {self.key(index)}"

    def key(self, index: int) -> str:
        """Return the member's name in its archive."""
        return self._samples[index][1][2]

    def read(self, index: int) -> bytes:
        shard, image, _ = self._samples[index]
        return _read_at(self.paths[shard], image)

    def label(self, index: int) -> int | None:
        """Return the class in the member KEY.cls, or None if it does not exist."""
        shard, _, label = self._samples[index]
        if label is None:
            return None
        text = _read_at(self.paths[shard], label).strip()
        if not text.isdigit():
            raise DataError(f"{self.paths[shard]}: its member {label[2]} holds {text[:20]!r}, not a class number")
        return int(text)


Member = tuple[int, int, str]
"""Offset and size in bytes, name."""


def _labelled_images(path: Path) -> Iterator[tuple[Member, Member | None]]:
    """Yield the archive's images, each with its label or None.

    Consecutive members with the same name up to the first dot belong to one sample.
    """
    index = path.with_suffix(".idx")
    try:
        is_current = index.is_file() and index.stat().st_mtime >= path.stat().st_mtime
        members = _read_index(index, path.stat().st_size) if is_current else _scan(path)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read as an uncompressed tar archive: {error}") from error
    for _, sample in groupby(members, key=lambda member: _split(member[2])[0]):
        by_extension = {_split(member[2])[1]: member for member in sample}
        image = next((by_extension[ending[1:]] for ending in EXTENSIONS if ending[1:] in by_extension), None)
        if image is not None and not PurePosixPath(image[2]).name.startswith("."):
            yield image, by_extension.get("cls")


def _scan(path: Path) -> list[Member]:
    with tarfile.open(path, "r:") as archive:
        members = []
        for member in archive:
            is_outside = _lies_outside(member.name)
            if is_outside or not (member.isfile() or member.isdir()):
                kind = "lies outside the archive" if is_outside else "is a link or a device"
                raise DataError(f"{path}: its member {member.name} {kind}, which is not allowed")
            if member.isfile():
                members.append((member.offset_data, member.size, member.name))
        # tarfile takes a damaged header for the end of the archive, which must be a block of zeros or absent.
        with open(path, "rb") as file:
            file.seek(archive.offset)
            is_damaged = any(file.read(tarfile.BLOCKSIZE))
    if is_damaged or (members and members[-1][0] + members[-1][1] > path.stat().st_size):
        raise DataError(f"{path}: is damaged or cut short after its member {members[-1][2]}")
    return members


def _read_index(index: Path, archive_size: int) -> list[Member]:
    """Read an index: a line "v1.2 N", then a line per sample with extension, offset, size and name of each file."""
    members = []
    try:
        head, *lines = index.read_text(encoding="utf-8").splitlines() or [""]
        if head != f"v1.2 {len(lines)}":
            raise ValueError("its first line does not match")
        for line in lines:
            words = line.split(" ")
            for _, offset, size, name in zip(*(words[i::4] for i in range(4)), strict=True):
                if _lies_outside(name):
                    raise ValueError(f"{name} lies outside the archive")
                members.append((int(offset), int(size), name))
                if not 0 <= int(offset) <= int(offset) + int(size) <= archive_size:
                    raise ValueError(f"{name} lies beyond the archive's end")
    except ValueError as error:
        raise DataError(f"{index}: is not an index of the archive next to it ({error}); delete it") from error
    return members


def _lies_outside(name: str) -> bool:
    """Return whether a member of this name would be unpacked outside the archive's folder."""
    return name.startswith("/") or ".." in PurePosixPath(name).parts


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and its extension."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _read_at(path: Path, member: Member) -> bytes:
    offset, size, name = member
    try:
        with open(path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"{path}: {name}: cannot be read: {error.strerror}") from error
    if len(content) < size:
        raise DataError(f"{path}: {name}: cannot be read: the archive was cut short")
    return content


class Lmdb:
    """LMDB whose values are image files, the format of LSUN."""

    def __init__(self, path: Path) -> None:
        """Open an LMDB.

        Raises:
            DataError: `path` is not an LMDB, or is damaged, or the package lmdb is not installed.
        """
        lmdb = import_optional("lmdb", "lmdb")
        self.path, self._error = path, lmdb.Error
        try:
            self._environment = _open_lmdb(path.resolve())
            with self._environment.begin() as transaction, transaction.cursor() as cursor:
                self._keys = list(cursor.iternext(keys=True, values=False))
        except lmdb.Error as error:
            raise DataError(f"{path}: cannot be read as an LMDB: {error}") from error

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        return f"{self.path}: {self.key(index)}"

    def key(self, index: int) -> str:
        return self._keys[index].decode(errors="backslashreplace")

    def read(self, index: int) -> bytes:
        try:
            with self._environment.begin() as transaction:
                value = transaction.get(self._keys[index])
        except self._error as error:
            raise DataError(f"{self.name(index)}: cannot be read: {error}") from error
        if value is None:
            raise DataError(f"{self.name(index)}: has been removed")
        return value

    def label(self, index: int) -> int | None:
        return None


@functools.cache  # a process can open each LMDB only once
def _open_lmdb(path: Path) -> Any:
    lmdb = import_optional("lmdb", "lmdb")
    return lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
