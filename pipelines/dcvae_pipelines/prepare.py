"""`dcvae prepare`: every image of a data set is checked, made fit for training, and packed into tar shards.

DST/train-000000.tar    WebDataset: KEY.jpeg (.png, .webp…) and KEY.cls with its class, where that is known
DST/train-000000.idx    where the members lie, as DALI's `wds2idx` writes it
DST/train-000000.json   what became of each source image; written last: where it is, the shard is whole
DST/manifest.json       the settings; once "complete", also all shards' hashes and the images of each kind
"""

import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dcvae_pipelines.atomic import atomic_write, find_unfinished, replacing
from dcvae_pipelines.datasets import load_dataset
from dcvae_pipelines.decoded import ImageSet
from dcvae_pipelines.encoded import EncodedSet, Files
from dcvae_pipelines.optional import import_optional
from dcvae_pipelines.prepare_image import FORMATS, KINDS, Job, Packed, check, member_key, short_name
from dcvae_pipelines.source import DataError

SPLITS: tuple[str, ...] = ("train", "test")

_MANIFEST, _LOCK = "manifest.json", ".lock"
_VERSION = 1  # of what the target holds


@dataclass(frozen=True)
class Found:
    """The images of one kind.

    Attributes:
        names: their paths below the source, or their keys
        converted: number of them that were packed, but not byte for byte
        skipped: number of them that were left out
    """

    names: list[str]
    converted: int
    skipped: int


@dataclass(frozen=True)
class Summary:
    """The result of `prepare`; the manifest holds it too.

    Attributes:
        packed: number of images in the shards, by split
        kept: number of images packed byte for byte
        converted: number of images packed otherwise
        skipped: number of images left out
        kinds: by all of `KINDS`; an image may be of several
        shards: name, images, bytes and sha256 of each
    """

    packed: dict[str, int]
    kept: int
    converted: int
    skipped: int
    kinds: dict[str, Found]
    shards: list[dict[str, Any]]


@dataclass(frozen=True)
class _Shard:
    """A shard that is to be made.

    Attributes:
        stem: name without ending
        images: the split
        span: indices of the shard's images in the split
        fingerprint: see `_fingerprint`
    """

    stem: str
    images: ImageSet | EncodedSet
    span: range
    fingerprint: str


def prepare(
    source: str | Path | None,
    target: str | Path,
    *,
    name: str = "folder",
    resolution: int | None = None,
    format: str = "jpeg",
    skip: Collection[str] = ("corrupt", "tiny"),
    per_shard: int = 1000,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Checks all images of a data set's splits "train" and "test", by decoding them, and packs them into shards.

    Without a resolution, images are kept byte for byte, but what is greyscale, CMYK, rotated, 16-bit or shown only in
    part (CelebA's faces) becomes upright 8-bit RGB, as PNG. With one, the square that training shows is cropped and
    resized just as training does it: where the format is lossless, training sees the same RGB pixels as before. What is
    decoded at once (MNIST…) is of none of the kinds, and packed as PNG, grey where it is grey. CelebA's "valid" is left
    out.

    Can be interrupted at any point and called again: shards that are whole stay, and the same images give the same
    bytes. The source is only read.

    Args:
        source: ROOT of `load_dataset`.
        target: the folder for the shards: absent, empty, or of an earlier call with the same settings.
        name: of the data set, see `load_dataset`.
        resolution: height and width of the packed images in pixels; None leaves each its own.
        format: of images that are resized: "jpeg" (quality 95, 4:4:4), or losslessly "png" or "webp".
        skip: kinds of images, of `KINDS`, that are left out; others are converted. "tiny" is what would be enlarged,
            or measures less than 32 pixels.
        per_shard: source images a shard.
        workers: images worked on at the same time; None for the cores of this process.
        progress: called with the numbers of images done and of all.

    Raises:
        DataError: a setting out of range; the target overlaps the source, or holds something else, or shards of other
            images or settings; the source cannot be loaded; a corrupt image, and such are not skipped; none is left.
        OSError: the target cannot be written, for lack of space say.
    """
    for setting, value in (("resolution", resolution), ("per_shard", per_shard), ("workers", workers)):
        if value is not None and value < 1:
            raise DataError(f"{setting} must be at least 1, not {value}")
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if unknown := set(skip) - set(KINDS):
        raise DataError(f"skip: there is no kind {min(unknown)!r}; the kinds are {', '.join(KINDS)}")
    source = None if source is None else Path(source).expanduser().resolve()
    target = Path(target).expanduser().resolve()
    if source and (target.is_relative_to(source) or source.is_relative_to(target)):
        raise DataError(f"{target}: overlaps {source}, where nothing is ever written; choose a folder elsewhere")
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is no folder; choose one for the shards")
    for module, package in (("PIL.Image", "Pillow"), ("numpy", "numpy")):
        import_optional(module, package)  # or, later on, every image would seem to be corrupt

    job = Job(
        name=name,
        source=None if source is None else str(source),
        resolution=resolution,
        format=format if resolution else "png",
        skip=[kind for kind in KINDS if kind in skip],
        per_shard=per_shard,
    )
    splits = {split: load_dataset(name, source, split) for split in SPLITS}
    shards = [
        _Shard(f"{split}-{number:06d}", images, span, _fingerprint(job, images, span))
        for split, images in splits.items()
        for number, start in enumerate(range(0, len(images), per_shard))
        for span in [range(start, min(start + per_shard, len(images)))]
    ]
    target.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        images = {split: len(images) for split, images in splits.items()}
        _claim(target, {"version": _VERSION} | asdict(job) | {"images": images})
        try:
            _pack(job, target, shards, workers or len(os.sched_getaffinity(0)), progress)
            return _conclude(target, shards)
        except DataError:
            if not any(target.glob("*-*.json")):  # nothing is bound to these settings yet
                (target / _MANIFEST).unlink()
            raise
        finally:
            for file in find_unfinished(target):  # of an earlier call that was killed
                file.unlink()


def _fingerprint(job: Job, images: ImageSet | EncodedSet, span: range) -> str:
    """Return a hash that tells changed source images without reading files.

    It covers the pixels and labels of decoded images, else names, and the sizes and times of files.
    """
    digest = hashlib.sha256()
    if isinstance(images, ImageSet):
        for values in (images.images, images.labels):
            digest.update(b"" if values is None else values[span.start : span.stop].numpy().tobytes())
        return digest.hexdigest()
    for index in span:
        path = images.image_name(index)
        there = isinstance(images.store, Files) and os.path.exists(path)
        status = (os.stat(path).st_size, os.stat(path).st_mtime_ns) if there else None
        digest.update(f"{short_name(job, images, index)}\0{status}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _claim(target: Path, settings: dict[str, Any]) -> None:
    """Write the manifest, or compare it with the one of an earlier call.

    Raises:
        DataError: the folder holds other files, or shards made with other settings.
    """
    there = _read_json(target / _MANIFEST)
    if there is None:
        if others := set(target.iterdir()) - {target / _LOCK, *find_unfinished(target)}:
            name = min(others).name
            raise DataError(f"{target}: holds {name}, and no intact {_MANIFEST} of ours; choose an empty folder")
        _write_json(target / _MANIFEST, settings | {"complete": False})
    elif different := [key for key, value in settings.items() if there.get(key) != value]:
        came = f"{different[0]} {json.dumps(there.get(different[0]))}, not {json.dumps(settings[different[0]])}"
        raise DataError(f"{target}: holds shards made with {came}; choose another folder")


def _pack(job: Job, target: Path, shards: list[_Shard], workers: int, progress: Callable[[int, int], None]) -> None:
    """Make the shards that are not whole yet."""
    pending = [shard for shard in shards if not _is_whole(target, shard)]
    total = sum(len(shard.span) for shard in shards)
    done = total - sum(len(shard.span) for shard in pending)
    calls = ((job, shard.images, index) for shard in pending for index in shard.span)
    pool = ThreadPoolExecutor(workers)  # Pillow, torch and hashlib let other threads run meanwhile

    def packed() -> Iterator[Packed]:
        """Yield images in order; only a few are worked on ahead, so that memory is bounded."""
        running: deque[Future[Packed]] = deque(pool.submit(check, *call) for call in islice(calls, 4 * workers))
        for number in range(done + 1, total + 1):
            image = running.popleft().result()
            running.extend(pool.submit(check, *call) for call in islice(calls, 1))
            progress(number, total)
            yield image

    images = packed()
    try:
        for shard in pending:
            _write_shard(target, shard, islice(images, len(shard.span)))
    finally:
        pool.shutdown(cancel_futures=True)


def _is_whole(target: Path, shard: _Shard) -> bool:
    """Return whether the shard was made already.

    Raises:
        DataError: it was made of other images.
    """
    record = _read_json(target / f"{shard.stem}.json")
    if record is None:
        return False
    if record["fingerprint"] != shard.fingerprint:
        raise DataError(f"{target}: the images that {shard.stem} was made of have changed since; choose another folder")
    if record["packed"] == 0:
        return True
    archive, index = target / f"{shard.stem}.tar", target / f"{shard.stem}.idx"
    if not (archive.is_file() and index.is_file()):
        return False
    return archive.stat().st_size == record["bytes"] and archive.stat().st_mtime <= index.stat().st_mtime


def _write_shard(target: Path, shard: _Shard, images: Iterable[Packed]) -> None:
    """Write the archive, then its index, which has to be the newer one, then its record.

    A shard without images has only a record.
    """
    path, lines, records = target / f"{shard.stem}.tar", [], []
    with (
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for index, image in zip(shard.span, images, strict=True):
            members, key = [], member_key(index, image.record["name"])
            for ending, content in image.files:
                member = tarfile.TarInfo(f"{key}.{ending}")  # of no time and nobody: always the same bytes
                member.size = len(content)
                members.append(f"{ending} {file.tell() + tarfile.BLOCKSIZE} {member.size} {member.name}")
                archive.addfile(member, io.BytesIO(content))
            if members:
                lines.append(" ".join(members))
            records.append(image.record | {"member": f"{key}.{image.files[0][0]}" if members else None})
    record: dict[str, Any] = {"fingerprint": shard.fingerprint, "packed": len(lines)}
    if lines:
        with open(path, "rb") as file:
            record |= {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        atomic_write(path.with_suffix(".idx"), "\n".join([f"v1.2 {len(lines)}", *lines, ""]))
    else:
        path.unlink()
    _write_json(path.with_suffix(".json"), record | {"images": records})


def _conclude(target: Path, shards: list[_Shard]) -> Summary:
    """Add up the shards' records, and complete the manifest.

    Raises:
        DataError: no image is left.
    """
    packed, actions, archives = dict.fromkeys(SPLITS, 0), {"kept": 0, "converted": 0, "skipped": 0}, []
    of_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for shard in shards:
        record = json.loads((target / f"{shard.stem}.json").read_bytes())
        packed[shard.stem.split("-")[0]] += record["packed"]
        if record["packed"]:
            sizes = {"images": record["packed"], "bytes": record["bytes"], "sha256": record["sha256"]}
            archives.append({"name": f"{shard.stem}.tar"} | sizes)
        for image in record["images"]:
            actions[image["action"]] += 1
            for kind in image["kinds"]:
                of_kind[kind].append((image["name"], image["action"]))
    kinds = {}
    for kind, images in of_kind.items():
        converted, skipped = (sum(action == each for _, action in images) for each in ("converted", "skipped"))
        kinds[kind] = Found([name for name, _ in images], converted, skipped)
    if not archives:
        reasons = ", ".join(f"{found.skipped:,} are {kind}" for kind, found in kinds.items() if found.skipped)
        raise DataError(f"{target}: no image is left to be packed; {reasons}")
    summary, manifest = Summary(packed, **actions, kinds=kinds, shards=archives), _read_json(target / _MANIFEST) or {}
    complete = manifest | {"complete": True} | asdict(summary)
    if complete != manifest:
        _write_json(target / _MANIFEST, complete)
    return summary


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Its file is removed afterwards; one left by a killed process locks nothing.

    Raises:
        DataError: another process holds it.
    """
    path = folder / _LOCK
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"{folder}: another process is writing shards there; wait until it has finished") from error
    with lock:
        try:
            yield
        finally:
            path.unlink()  # while it is locked: afterwards it may be another process's


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is absent or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
