"""`dcvae prepare`: check all images of a data set, convert those unfit for training, and pack them into tar shards.

DST/train-000000.tar    WebDataset: KEY.jpeg (.png, .webp…), and KEY.cls with the class if known
DST/train-000000.idx    offsets of the members, in the format of DALI's `wds2idx`
DST/train-000000.json   outcome for each source image; written last, so the shard is complete if it exists
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
_VERSION = 1  # of the format of the target


@dataclass(frozen=True)
class KindSummary:
    """Images of one kind.

    Attributes:
        names: their paths relative to the source, or their keys
        converted: number of them packed after conversion
        skipped: number of them left out
    """

    names: list[str]
    converted: int
    skipped: int


@dataclass(frozen=True)
class Summary:
    """Result of `prepare`, also stored in the manifest.

    Attributes:
        packed: number of images in the shards, by split
        kept: number of images packed byte for byte
        converted: number of images packed after conversion
        skipped: number of images left out
        kinds: images of each of `KINDS`; an image can be of several
        shards: name, images, bytes and sha256 of each
    """

    packed: dict[str, int]
    kept: int
    converted: int
    skipped: int
    kinds: dict[str, KindSummary]
    shards: list[dict[str, Any]]


@dataclass(frozen=True)
class _Shard:
    """Shard to write.

    Attributes:
        stem: file name without extension
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
    """Check all images of a data set's splits "train" and "test" by decoding them, and pack them into shards.

    Without a resolution, images are kept byte for byte, except that greyscale, CMYK, rotated and 16-bit images, and
    those of which only a part is shown (CelebA), become upright 8-bit RGB in PNG. With a resolution, images are cropped
    to a square and resized as in training; with a lossless format, training sees the same RGB pixels as before. Data
    sets that are decoded when loaded (MNIST…) are of none of the kinds, and packed as PNG; grey images stay grey.
    The split "valid" of CelebA and LSUN bedroom is left out.

    The call can be interrupted at any point and repeated: complete shards are kept, and the same images give the same
    bytes. The source is only read.

    Args:
        source: ROOT of `load_dataset`.
        target: the folder for the shards: new, empty, or of an earlier call with the same settings.
        name: name of the data set, see `load_dataset`.
        resolution: height and width of the packed images in pixels; None keeps their sizes.
        format: format of resized images: "jpeg" (quality 95, 4:4:4), or losslessly "png" or "webp".
        skip: kinds of images, from `KINDS`, to leave out; others are converted. "tiny" images would be enlarged or,
            without a resolution, show a square of less than 32 pixels.
        per_shard: source images per shard.
        workers: images processed in parallel; None: one per core of this process.
        progress: called with the numbers of images done and in total.

    Raises:
        DataError: a setting out of range; the target overlaps the source, or holds other files, or shards of other
            images or settings; the source cannot be loaded; an image is corrupt and these are not skipped; no image is
            left.
        OSError: the target cannot be written, for example because the disk is full.
    """
    for setting, value in (("resolution", resolution), ("per_shard", per_shard), ("workers", workers)):
        if value is not None and value < 1:
            raise DataError(f"{setting} must be at least 1, not {value}")
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if unknown := set(skip) - set(KINDS):
        raise DataError(f"skip: unknown kind {min(unknown)!r}; the kinds are {', '.join(KINDS)}")
    source = None if source is None else Path(source).expanduser().resolve()
    target = Path(target).expanduser().resolve()
    if source and (target.is_relative_to(source) or source.is_relative_to(target)):
        raise DataError(f"{target}: overlaps the source {source}, which is only read; choose another folder")
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is not a folder; choose a folder for the shards")
    for module, package in (("PIL.Image", "Pillow"), ("numpy", "numpy")):
        import_optional(module, package)  # otherwise every image would count as corrupt

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
            if not any(target.glob("*-*.json")):  # no shard was made with these settings yet
                (target / _MANIFEST).unlink()
            raise
        finally:
            for file in find_unfinished(target):  # left by a killed call
                file.unlink()


def _fingerprint(job: Job, images: ImageSet | EncodedSet, span: range) -> str:
    """Return a hash that reveals changes of the source images without reading files.

    It covers the pixels and labels of decoded images; otherwise names, and the sizes and times of files.
    """
    digest = hashlib.sha256()
    if isinstance(images, ImageSet):
        for values in (images.images, images.labels):
            digest.update(b"" if values is None else values[span.start : span.stop].numpy().tobytes())
        return digest.hexdigest()
    for index in span:
        path = images.image_name(index)
        is_file = isinstance(images.store, Files) and os.path.exists(path)
        status = (os.stat(path).st_size, os.stat(path).st_mtime_ns) if is_file else None
        digest.update(f"{short_name(job, images, index)}\0{status}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _claim(target: Path, settings: dict[str, Any]) -> None:
    """Write the manifest, or compare the settings with the manifest of an earlier call.

    Raises:
        DataError: the folder holds other files, or shards made with other settings.
    """
    manifest = _read_json(target / _MANIFEST)
    if manifest is None:
        if other_files := set(target.iterdir()) - {target / _LOCK, *find_unfinished(target)}:
            name = min(other_files).name
            raise DataError(f"{target}: holds {name}, but no intact {_MANIFEST}; choose an empty folder")
        _write_json(target / _MANIFEST, settings | {"complete": False})
    elif different := [key for key, value in settings.items() if manifest.get(key) != value]:
        mismatch = f"{different[0]} {json.dumps(manifest.get(different[0]))}, not {json.dumps(settings[different[0]])}"
        raise DataError(f"{target}: holds shards made with {mismatch}; choose another folder")


def _pack(job: Job, target: Path, shards: list[_Shard], workers: int, progress: Callable[[int, int], None]) -> None:
    """Write the shards that are not complete yet."""
    pending = [shard for shard in shards if not _is_complete(target, shard)]
    total = sum(len(shard.span) for shard in shards)
    done = total - sum(len(shard.span) for shard in pending)
    calls = ((job, shard.images, index) for shard in pending for index in shard.span)
    pool = ThreadPoolExecutor(workers)  # not processes: Pillow, torch and hashlib release the GIL

    def packed() -> Iterator[Packed]:
        """Yield images in order; only a few are processed ahead, to bound memory."""
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


def _is_complete(target: Path, shard: _Shard) -> bool:
    """Return whether the shard is complete.

    Raises:
        DataError: it was made from other images.
    """
    record = _read_json(target / f"{shard.stem}.json")
    if record is None:
        return False
    if record["fingerprint"] != shard.fingerprint:
        raise DataError(f"{target}: the images in {shard.stem} have changed since it was made; choose another folder")
    if record["packed"] == 0:
        return True
    archive, index = target / f"{shard.stem}.tar", target / f"{shard.stem}.idx"
    if not (archive.is_file() and index.is_file()):
        return False
    return archive.stat().st_size == record["bytes"] and archive.stat().st_mtime <= index.stat().st_mtime


def _write_shard(target: Path, shard: _Shard, images: Iterable[Packed]) -> None:
    """Write the archive, then its index, which must not be older, then its record.

    A shard without images has only a record.
    """
    path, lines, records = target / f"{shard.stem}.tar", [], []
    with (
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for index, image in zip(shard.span, images, strict=True):
            members, key = [], member_key(index, image.record["name"])
            for extension, content in image.files:
                member = tarfile.TarInfo(f"{key}.{extension}")  # without time or owner: reproducible bytes
                member.size = len(content)
                members.append(f"{extension} {file.tell() + tarfile.BLOCKSIZE} {member.size} {member.name}")
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
    by_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for shard in shards:
        record = json.loads((target / f"{shard.stem}.json").read_bytes())
        packed[shard.stem.split("-")[0]] += record["packed"]
        if record["packed"]:
            sizes = {"images": record["packed"], "bytes": record["bytes"], "sha256": record["sha256"]}
            archives.append({"name": f"{shard.stem}.tar"} | sizes)
        for image in record["images"]:
            actions[image["action"]] += 1
            for kind in image["kinds"]:
                by_kind[kind].append((image["name"], image["action"]))
    kinds = {}
    for kind, images in by_kind.items():
        converted, skipped = (sum(action == outcome for _, action in images) for outcome in ("converted", "skipped"))
        kinds[kind] = KindSummary([name for name, _ in images], converted, skipped)
    if not archives:
        reasons = ", ".join(f"{of_kind.skipped:,} are {kind}" for kind, of_kind in kinds.items() if of_kind.skipped)
        raise DataError(f"{target}: no image is left to pack; {reasons}")
    summary, manifest = Summary(packed, **actions, kinds=kinds, shards=archives), _read_json(target / _MANIFEST) or {}
    complete = manifest | {"complete": True} | asdict(summary)
    if complete != manifest:
        _write_json(target / _MANIFEST, complete)
    return summary


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context manager that holds the lock of a folder. A lock file left by a killed process has no effect.

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
            path.unlink()  # while locked: afterwards it could be another process's


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is absent or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
