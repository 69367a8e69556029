"""Helpers that encode images, and write folders, shards and LMDBs."""

import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(content := io.BytesIO(), format, **options)
    return content.getvalue()


def turned(orientation: int) -> Image.Exif:
    """EXIF data with this orientation; 6 is a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_of_16_bit_colours(array: np.ndarray) -> bytes:
    """Encode [H, W, 3], which Pillow can read and cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    height, width, _ = array.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def make_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def make_lmdb(path: Path, contents: dict[str, bytes]) -> None:
    import lmdb  # imported here, because machines for GPU tests can lack it

    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in contents.items():
            transaction.put(key.encode(), value)


def write_noise(folder: Path, count: int, *shape: int, ending: str = "png") -> Path:
    """Write files 00.png, 01.png… of noise with this shape, [H, W] or [H, W, 3], into a new folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.{ending}")
    return folder
