"""Single image files: which may be decoded, which part of them is shown."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcvae_pipelines.optional import import_optional
from dcvae_pipelines.pixels import normalize, resize
from dcvae_pipelines.source import DataError

# Endings of what counts as an image in a folder or a shard, in any case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".jp2")
# Pillow's names of them. No others are tried: a file may call itself .jpg and be for some interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000")
# More is refused as a decompression bomb. Pillow warns from here on: 256 MiB once decoded.
MAX_PIXELS = 89_478_485

_ORIENTATION = 0x0112  # in EXIF

Box = tuple[int, int, int]
"""A square of an image: its top, left and side in pixels."""


@dataclass(frozen=True)
class Header:
    """The properties of an image that its file states.

    Attributes:
        format: Pillow's name: JPEG, PNG…
        mode: Pillow's mode: RGB, L (grey), CMYK, I;16 (16-bit grey)…
        width: in pixels, once upright
        height: in pixels, once upright
        rotated: whether it must be turned or mirrored to stand upright, by EXIF
        animated: whether it has several frames
        deep: whether it has more than 8 bits a channel
    """

    format: str
    mode: str
    width: int
    height: int
    rotated: bool = False
    animated: bool = False
    deep: bool = False


def read_header(encoded: bytes, name: str) -> Header:
    """Checks an image file as far as that is possible without decoding it.

    Raises:
        DataError: it is no image, has too many pixels, or is a JPEG without its end; the message begins with `name`.
    """
    with _opened(encoded, name) as image:
        # 16-bit colours have no mode of their own in Pillow, but their raw form tells them.
        deep = image.mode.startswith("I") or ";16" in str(image.tile)
        # Pillow looks for a PNG's orientation behind its pixels, and decodes them to get there.
        may_be_rotated = image.format != "PNG" or any(word in encoded for word in (b"eXIf", b"exif", b"adobe.xmp"))
        orientation = image.getexif().get(_ORIENTATION, 1) if may_be_rotated else 1
        is_turned = orientation in range(5, 9) and image.format != "TIFF"  # of which Pillow says the upright size
        width, height = image.size[::-1] if is_turned else image.size
        header = Header(
            image.format,
            image.mode,
            width,
            height,
            rotated=orientation in range(2, 9),
            animated=getattr(image, "is_animated", False),
            deep=deep,
        )
        # GPU decoders fill up what is missing with grey and say nothing. Coded pixels never contain a marker.
        if header.format == "JPEG" and encoded.rfind(b"\xff\xd9") < encoded.rfind(b"\xff\xda"):
            raise ValueError("it is truncated")
    return header


def decode(encoded: bytes, name: str, channels: int) -> Any:
    """Decodes with Pillow: upright, 8 bits, transparency dropped, of an animation the first frame.

    Args:
        channels: 1 for grey, 3 for RGB.

    Returns:
        PIL.Image.Image of mode L or RGB.

    Raises:
        DataError: it is no image, is damaged, holds floats or too many pixels; the message begins with `name`.
    """
    check_channels(channels)
    pil_ops = import_optional("PIL.ImageOps", "Pillow")
    with _opened(encoded, name) as image:
        pil_ops.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # or Pillow warns that converting drops it
        if image.mode == "F":
            raise ValueError("its pixels are floats, which have no agreed range")
        if image.mode.startswith("I"):  # "I;16" and its kin, and the "I" that Pillow makes of a 16-bit PGM
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5)
        return image.convert("L" if channels == 1 else "RGB")


def check_channels(channels: int) -> None:
    """
    Raises:
        DataError: neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")


def to_tensor(image: Any) -> Tensor:
    """A PIL.Image.Image of mode L or RGB → uint8 [C, H, W], channels last in memory."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1)


def centre_square(width: int, height: int) -> Box:
    """Return the largest square in the centre of an image."""
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side


def crop(image: Any, box: Box) -> Any:
    """Return this square of a PIL.Image.Image."""
    top, left, side = box
    return image.crop((left, top, left + side, top + side))


def load_image(path: str | Path, channels: int, resolution: int) -> Tensor:
    """Reads an image file (JPEG, PNG, WebP, TIFF, GIF, BMP, PPM, JPEG 2000), as a network sees it.

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
    check_channels(channels)
    try:
        encoded = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such image file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image: {error.strerror}") from error
    image = decode(encoded, str(path), channels)
    square = to_tensor(crop(image, centre_square(image.width, image.height)))
    return normalize(resize(square[None], resolution))[0]


@contextmanager
def _opened(encoded: bytes, name: str) -> Iterator[Any]:
    """Opened by Pillow, which decodes nothing yet. Whatever goes wrong inside is said of the image `name`."""
    pil = import_optional("PIL.Image", "Pillow")
    try:
        with pil.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"its {image.width} × {image.height} pixels could be a decompression bomb")
            yield image
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise anything, SyntaxError and struct.error too
        reason = "no known format" if isinstance(error, pil.UnidentifiedImageError) else error
        raise DataError(f"{name}: cannot be read as an image: {reason}") from error
