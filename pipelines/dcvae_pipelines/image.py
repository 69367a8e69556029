"""Single image files: accepted formats, headers, decoding and cropping."""

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

# File extensions of images in folders and shards; upper and lower case are equivalent.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".jp2")
# Pillow's names of these formats. Others are not tried: a file named .jpg could hold PostScript and run Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000")
# Larger images are rejected as decompression bombs. Pillow warns above the same size: 256 MiB when decoded.
MAX_PIXELS = 89_478_485

_ORIENTATION = 0x0112  # in EXIF

Box = tuple[int, int, int]
"""Square part of an image: top, left and side in pixels."""


@dataclass(frozen=True)
class Header:
    """Properties of an image that can be read without decoding it.

    Attributes:
        format: Pillow's name of the format: JPEG, PNG…
        mode: Pillow's mode: RGB, L (grey), CMYK, I;16 (16-bit grey)…
        width: width of the upright image in pixels
        height: height of the upright image in pixels
        rotated: whether its EXIF orientation requires rotating or mirroring
        animated: whether it has several frames
        deep: whether it has more than 8 bits per channel
    """

    format: str
    mode: str
    width: int
    height: int
    rotated: bool = False
    animated: bool = False
    deep: bool = False


def read_header(encoded: bytes, name: str) -> Header:
    """Check an image file as far as possible without decoding it.

    Raises:
        DataError: it is not an image, has too many pixels, or is a truncated JPEG; the message begins with `name`.
    """
    with _open_image(encoded, name) as image:
        # Pillow has no mode for 16-bit colours; only the raw mode in `tile` shows them.
        deep = image.mode.startswith("I") or ";16" in str(image.tile)
        # For a PNG, getexif() decodes the pixels to search the chunks behind them.
        may_be_rotated = image.format != "PNG" or any(word in encoded for word in (b"eXIf", b"exif", b"adobe.xmp"))
        orientation = image.getexif().get(_ORIENTATION, 1) if may_be_rotated else 1
        is_turned = orientation in range(5, 9) and image.format != "TIFF"  # Pillow's TIFF sizes are upright
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
        # GPU decoders silently fill missing pixels with grey. Coded pixels never contain these markers.
        if header.format == "JPEG" and encoded.rfind(b"\xff\xd9") < encoded.rfind(b"\xff\xda"):
            raise ValueError("it is truncated")
    return header


def decode(encoded: bytes, name: str, channels: int) -> Any:
    """Decode an image, or the first frame of an animation, with Pillow: upright, 8 bits per channel, no transparency.

    Args:
        channels: 1 for grey, 3 for RGB.

    Returns:
        PIL.Image.Image of mode L or RGB.

    Raises:
        DataError: it is not an image, is damaged, or holds floats or too many pixels; the message begins with `name`.
    """
    check_channels(channels)
    pil_ops = import_optional("PIL.ImageOps", "Pillow")
    with _open_image(encoded, name) as image:
        pil_ops.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # otherwise Pillow warns that the conversion drops it
        if image.mode == "F":
            raise ValueError("its pixels are floats, which have no standard range")
        if image.mode.startswith("I"):  # variants of "I;16", and "I", which is Pillow's mode for 16-bit PGM
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5)
        return image.convert("L" if channels == 1 else "RGB")


def check_channels(channels: int) -> None:
    """Check a number of channels.

    Raises:
        DataError: it is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")


def to_tensor(image: Any) -> Tensor:
    """Convert a PIL.Image.Image of mode L or RGB to uint8 [C, H, W], channels last in memory."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1)


def centre_square(width: int, height: int) -> Box:
    """Return the largest centred square of an image."""
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side


def crop(image: Any, box: Box) -> Any:
    """Crop a PIL.Image.Image to a square."""
    top, left, side = box
    return image.crop((left, top, left + side, top + side))


def load_image(path: str | Path, channels: int, resolution: int) -> Tensor:
    """Read an image file (JPEG, PNG, WebP, TIFF, GIF, BMP, PPM, JPEG 2000) as a network input.

    It is turned upright (EXIF), cropped to its central square, and resized with antialiasing. Transparency is dropped,
    and 16-bit grey is scaled to 8 bits.

    Args:
        path: the image file; only the first frame of an animation is read.
        channels: 1 for grey, 3 for RGB.
        resolution: height and width of the result in pixels.

    Returns:
        float32 [C, H, W] in [-1, 1].

    Raises:
        DataError: the file is missing, is not an image, is damaged, or holds floats or too many pixels.
    """
    check_channels(channels)
    try:
        encoded = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image: {error.strerror}") from error
    image = decode(encoded, str(path), channels)
    square = to_tensor(crop(image, centre_square(image.width, image.height)))
    return normalize(resize(square[None], resolution))[0]


@contextmanager
def _open_image(encoded: bytes, name: str) -> Iterator[Any]:
    """Context manager: open an image without decoding it; any error in the block becomes a DataError about `name`."""
    pil = import_optional("PIL.Image", "Pillow")
    try:
        with pil.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"its {image.width} × {image.height} pixels could be a decompression bomb")
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files, including SyntaxError and struct.error
        reason = "unknown format" if isinstance(error, pil.UnidentifiedImageError) else error
        raise DataError(f"{name}: cannot be read as an image: {reason}") from error
