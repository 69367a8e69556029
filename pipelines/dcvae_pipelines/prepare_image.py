"""One image of `prepare`: its kinds, and the files to pack."""

import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dcvae_pipelines.decoded import ImageSet
from dcvae_pipelines.encoded import EncodedSet
from dcvae_pipelines.image import Header, centre_square, crop, decode, read_header, to_tensor
from dcvae_pipelines.optional import import_optional
from dcvae_pipelines.pixels import resize
from dcvae_pipelines.source import DataError

KINDS = ("corrupt", "tiny", "greyscale", "cmyk", "rotated", "16-bit")
FORMATS = {"jpeg": {"quality": 95, "subsampling": 0}, "png": {}, "webp": {"lossless": True}}  # with Pillow's options
_TINY = 32  # pixels; smaller squares are tiny if no resolution is given


@dataclass(frozen=True)
class Job:
    """Settings that determine how images are packed."""

    name: str
    source: str | None
    resolution: int | None
    format: str
    skip: list[str]
    per_shard: int


@dataclass(frozen=True)
class Packed:
    """Checked source image.

    Attributes:
        record: its entry in the shard's record
        files: extension and content of its members of the shard; empty if it is skipped
    """

    record: dict[str, Any]
    files: list[tuple[str, bytes]]


def check(job: Job, images: ImageSet | EncodedSet, index: int) -> Packed:
    """Check an image, and encode it for its shard if needed.

    Raises:
        DataError: it is corrupt, and corrupt images are not skipped.
    """
    if isinstance(images, ImageSet):
        return _check_decoded(job, images, index)
    record: dict[str, Any] = {"name": short_name(job, images, index), "sha256": None, "width": None, "height": None}
    try:
        encoded, full_name = images.read(index), images.image_name(index)
        record["sha256"] = hashlib.sha256(encoded).hexdigest()
        header = read_header(encoded, full_name)
        record |= {"width": header.width, "height": header.height}
        image = decode(encoded, full_name, channels=3)
        box = images.square(index, image.width, image.height)
        label = images.label(index)
    except DataError as error:
        if "corrupt" not in job.skip:
            raise
        return Packed(record | {"kinds": ["corrupt"], "action": "skipped", "reason": str(error)}, [])
    record["kinds"] = kinds = _kinds(header, is_tiny=box[2] < (job.resolution or _TINY))
    if skipped := [kind for kind in kinds if kind in job.skip]:
        return Packed(record | {"action": "skipped", "reason": ", ".join(skipped)}, [])

    reasons = [kind for kind in kinds if kind != "tiny"]
    extension = {"MPO": "jpeg", "JPEG2000": "jp2"}.get(header.format, header.format.lower())
    if job.resolution or images.box is not centre_square:
        image = crop(image, box)
        reasons.append("resized" if job.resolution else "cropped")
    if job.resolution:
        image = _to_image(resize(to_tensor(image)[None], job.resolution)[0])
    files = [_encode(image, job.format) if reasons else (extension, encoded)]
    if label is not None:
        files.append(("cls", str(label).encode()))
    action = "converted" if reasons else "kept"
    return Packed(record | {"action": action, "reason": ", ".join(reasons)}, files)


def _check_decoded(job: Job, images: ImageSet, index: int) -> Packed:
    pixels = images.images[index]
    sha256 = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    record = {"name": str(index), "sha256": sha256, "width": pixels.shape[2], "height": pixels.shape[1], "kinds": []}
    if job.resolution:
        pixels = resize(pixels[None], job.resolution)[0]
    files = [_encode(_to_image(pixels), "png")]
    if images.labels is not None and images.labels[index] >= 0:
        files.append(("cls", str(int(images.labels[index])).encode()))
    return Packed(record | {"action": "converted", "reason": "resized" if job.resolution else "decoded"}, files)


def _kinds(header: Header, is_tiny: bool) -> list[str]:
    is_grey = header.mode in ("1", "L", "LA") or header.mode.startswith("I")
    flags = (False, is_tiny, is_grey, header.mode == "CMYK", header.rotated, header.deep)
    return [kind for kind, is_kind in zip(KINDS, flags, strict=True) if is_kind]


def _encode(image: Any, format: str) -> tuple[str, bytes]:
    """Encode a PIL.Image.Image of mode L or RGB; return the extension and content of the file."""
    image.info = {}  # otherwise the old colour profile would be written too
    image.save(content := io.BytesIO(), format, **FORMATS[format])
    return format, content.getvalue()


def _to_image(pixels: Tensor) -> Any:
    """Convert uint8 [C, H, W] to a PIL.Image.Image of mode L or RGB."""
    channels, height, width = pixels.shape
    pil = import_optional("PIL.Image", "Pillow")
    return pil.frombytes("L" if channels == 1 else "RGB", (width, height), pixels.permute(1, 2, 0).numpy().tobytes())


def short_name(job: Job, images: EncodedSet, index: int) -> str:
    return images.image_name(index).removeprefix(f"{job.source}/").removeprefix(f"{job.source}: ")


def member_key(index: int, name: str) -> str:
    """Return a unique key: the index, and the image's name reduced to characters safe in tar and WebDataset."""
    stem = re.split("/|: ", name)[-1].partition(".")[0]
    return f"{index:08d}-" + re.sub("[^A-Za-z0-9_-]+", "_", stem)[:60]
