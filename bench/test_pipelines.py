"""Images per second of our sources, compared with torch's DataLoader.

A batch is shuffled, mirrored, float32 in [-1, 1] and on the device. The first batch of every implementation is compared
with the same images decoded by Pillow. A measurement takes more batches than any implementation makes ahead. Files come
from the page cache, not from a disk.

All use the same cores: ours as many threads, the others as many processes. In the measuring process torch computes with
one thread, as it does in the DataLoader's processes: on a CPU its threads, which spin while they wait, would take the
cores from decoding. On a GPU the share of a training iteration spent waiting for data is measured as well; on a CPU
training and decoding would compete for the cores. To measure on a CPU:

    python -m pytest bench/test_pipelines.py -q -s --benchmark-quiet --results=bench/results

Real images are read from $DCVAE_IMAGES, shared/data or ../shared/data: folders faces1024, bedroom256 and cifar10.
"""

import atexit
import functools
import gc
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

import harness
import results
from dcvae_pipelines import Batch, EncodedSet, ImageSet, decode_images, load_dataset, make_source
from dcvae_pipelines.pixels import normalize
from harness import DEVICE, ON_GPU, Absent, Unavailable, imported
from results import Document, Target

Images = ImageSet | EncodedSet
CORES = len(os.sched_getaffinity(0))
FOLDER_VARIABLE = "DCVAE_IMAGES"
TOLERANCE = 1.5  # mean absolute difference of an image in levels of 255; NVIDIA's decoder rounds differently
# An iteration at 128×128 and above is simulated: matrix products of this size, with as many FLOPs as it has forward
# passes of a network.
FORWARD_PASSES, SIZE = 41, 4096
ITERATIONS = 20  # a multiple of n_critic, so that every such run does the same
# How many times faster than with the DataLoader encoded images must arrive, by ON_GPU and number of cores.
ENCODED_FASTER = {(True, 16): 5, (False, 2): 1.5}


# --- problems ---


@dataclass(frozen=True)
class Row:
    """Shuffled, mirrored batches of a data set at a resolution.

    Attributes:
        images: folder of the data set
        forward_gflop: GFLOP of a network's forward pass for one image, with resampling fused into the convolutions;
            None at 32×32, where the real iteration is run
        batches: number of batches in one measurement, more than any implementation makes ahead
    """

    name: str
    images: str
    resolution: int
    batch: int
    forward_gflop: float | None
    batches: int = max(24, 3 * CORES)

    def shrunk(self) -> "Row":
        return replace(self, batch=2, batches=2)

    @property
    def flops(self) -> float | None:
        """FLOPs of a simulated iteration."""
        return self.forward_gflop and self.forward_gflop * 1e9 * FORWARD_PASSES * self.batch

    @property
    def targets(self) -> list[Target]:
        what, targets = "times faster than the DataLoader", []
        if self.images == "cifar10":
            targets.append(Target(what, 20, against="dataloader"))
        elif required := ENCODED_FASTER.get((ON_GPU, CORES)):
            targets.append(Target(f"{what}, on {CORES} cores", required, against="dataloader"))
        if ON_GPU:
            simulated = ", simulated" if self.flops else ""
            what = f"share of an iteration that is not waiting for data{simulated}"
            targets.append(Target(what, 0.98, "busy"))
        return targets

    def description(self) -> Document:
        fields = {name: getattr(self, name) for name in ("name", "images", "resolution", "batch")}
        simulated = f"simulated: {(self.flops or 0) / 1e12:.3g} TFLOP of bfloat16 matrix products"
        return {**fields, "cores": CORES, "iteration": simulated if self.flops else "TrainStep"}


# Above 32×32 batches and FLOPs are those of the networks that grow.
ROWS = (
    Row("faces512", "faces1024", 512, 6, 45.8),
    Row("faces256", "faces1024", 256, 14, 36.7),
    Row("bedroom128", "bedroom256", 128, 16, 27.5),
    Row("cifar10", "cifar10", 32, 64, None),
)


def folder_of(images: str) -> Path:
    """
    Raises:
        Absent: the folder does not exist.
    """
    shared = [root / "shared" / "data" for root in (results.ROOT, results.ROOT.parent)]
    given = os.environ.get(FOLDER_VARIABLE)
    for folder in [Path(given)] if given else shared:
        if (folder / images).is_dir():
            return folder / images
    raise Absent("real images absent")


@functools.cache
def torchvision_root() -> Path:
    """Return the folder that holds CIFAR-10 in torchvision's layout, unpacked for this process if necessary.

    Raises:
        Absent: the images, or the packages that unpack them, are missing.
    """
    folder = folder_of("cifar10")
    if (folder / "cifar-10-batches-py").is_dir():
        return folder
    for module, package in (("numpy", "numpy"), ("PIL", "Pillow")):
        imported(module, package)
    unpacked = tempfile.mkdtemp(prefix="bench-")
    atexit.register(shutil.rmtree, unpacked)
    subprocess.run([sys.executable, folder.parent / "unpack.py", unpacked], check=True, capture_output=True)
    return Path(unpacked)


@functools.cache
def load(images: str) -> Images:
    """Return the training split.

    Raises:
        Absent: the images, or the packages that read them, are missing.
    """
    if images != "cifar10":
        return load_dataset("folder", folder_of(images))
    root = torchvision_root()
    imported("torchvision", "torchvision")
    return load_dataset("cifar10", root)


def errors(row: Row, images: Images, batch: Batch) -> dict[str, float]:
    """Return the mean difference of the worst image from Pillow's decoding of it, mirrored or not, in levels of 255.

    Raises:
        Unavailable: the difference is larger than rounding explains, or shape, dtype or device are wrong.
    """
    x, shape = batch.images, (row.batch, 3, row.resolution, row.resolution)
    if (x.shape, x.dtype, x.device.type) != (shape, torch.float32, DEVICE.type):
        raise Unavailable(f"its batches are {x.dtype} {list(x.shape)} on {x.device.type}")
    exact = expected(images, batch.ids.cpu(), row.resolution)
    differences = [(x.cpu() - y).abs().mean((1, 2, 3)) for y in (exact, exact.flip(3))]
    worst = torch.minimum(*differences).max().item() * 127.5  # NaN if one is
    if not worst <= TOLERANCE:
        raise Unavailable(f"an image is wrong by {worst:.3g} of 255 levels on average")
    return {"image_error": float(f"{worst:.3g}")}


def expected(images: Images, ids: Tensor, resolution: int) -> Tensor:
    """Return images decoded by Pillow, not mirrored: float32 [B, 3, R, R] in [-1, 1]."""
    if isinstance(images, ImageSet):
        chosen = replace(images, images=images.images[ids], labels=None)
    else:
        chosen = replace(images, indices=images.indices[ids])
    return normalize(decode_images(chosen, len(ids), resolution=resolution).images)


@functools.cache
def iteration(row: Row) -> Callable[[Batch], Any]:
    """Return a training iteration on the GPU: TrainStep at 32×32, otherwise matrix products of as many FLOPs."""
    flops = row.flops
    if flops is None:
        from dcvae_fast.config import Config
        from dcvae_fast.training.step import TrainStep

        return TrainStep(Config(), DEVICE)
    a, b = (torch.randn(SIZE, SIZE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def simulated(batch: Batch) -> None:
        for _ in range(math.ceil(flops / (2 * SIZE**3))):
            torch.mm(a, b, out=out)

    return simulated


def waiting_share(step: Callable[[Batch], Any], batches: Iterator[Batch], ahead: int) -> float:
    """Return 1 − T₀/T, where T is the time of iterations that fetch their batch, and T₀ that of the others.

    Loading that overlaps with the device's work does not count. Work of the device for the data does.

    Args:
        ahead: number of batches that may be ready, which are dropped before T is measured
    """
    fixed = next(batches)
    _seconds(step, lambda: fixed)  # compiles
    before = _seconds(step, lambda: fixed)
    for _ in range(ahead):
        next(batches)
    with_data = _seconds(step, lambda: next(batches))
    after = _seconds(step, lambda: fixed)
    return max(0.0, 1 - (before + after) / 2 / with_data)


def _seconds(step: Callable[[Batch], Any], draw: Callable[[], Batch]) -> float:
    begin = harness.timer()
    for _ in range(ITERATIONS):
        step(draw())
    return harness.timer() - begin


# --- implementations: each yields shuffled, mirrored batches without end ---
# Images are converted to RGB and resized by the antialiased bicubic filter. The others follow their documentation, with
# a process per core. They run one endless epoch: on small data sets processes would idle at the end of each epoch.


def ours(row: Row, images: Images) -> Iterator[Batch]:
    if isinstance(images, EncodedSet):
        imported("nvidia.dali", "nvidia-dali")
    source = make_source(
        images, resolution=row.resolution, batch=row.batch, seed=0, device=DEVICE, mirror=True, threads=CORES
    )
    return iter(source)


def dataloader(row: Row, images: Images) -> Iterator[Batch]:
    """Pillow and torchvision's transforms."""
    transforms = imported("torchvision.transforms", "torchvision")
    steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    if isinstance(images, ImageSet):
        datasets = imported("torchvision.datasets", "torchvision")
        cifar10 = datasets.CIFAR10(torchvision_root(), transform=transforms.Compose(steps))
        return _batches(row, Numbered(lambda index: cifar10[index][0], len(cifar10)))
    pillow, paths = imported("PIL.Image", "Pillow"), _paths(images)
    resize = transforms.Resize(row.resolution, transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, *steps])

    def opened(index: int) -> Tensor:
        with pillow.open(paths[index]) as image:
            return transform(image.convert("RGB"))

    return _batches(row, Numbered(opened, len(paths)))


def torchvision_io(row: Row, images: Images) -> Iterator[Batch]:
    """torchvision's decoder, and its transforms of tensors."""
    io, v2 = imported("torchvision.io", "torchvision"), imported("torchvision.transforms.v2", "torchvision")
    paths, resize = _paths(images), v2.Resize(row.resolution, v2.InterpolationMode.BICUBIC)
    transform = v2.Compose([resize, v2.RandomHorizontalFlip(), _normalized(v2)])
    dataset = Numbered(lambda index: transform(io.decode_image(paths[index], io.ImageReadMode.RGB)), len(paths))
    return _batches(row, dataset)


def torchvision_gpu(row: Row, images: Images) -> Iterator[Batch]:
    """Files read by processes, and decoded on the GPU by torchvision, batch by batch."""
    if not (ON_GPU or harness.REHEARSING):
        raise Unavailable("it decodes on a GPU")
    io, v2 = imported("torchvision.io", "torchvision"), imported("torchvision.transforms.v2", "torchvision")
    resize, normalized = v2.Resize(row.resolution, v2.InterpolationMode.BICUBIC), _normalized(v2)
    paths = _paths(images)

    def collate(samples: list[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor]:
        encoded, ids = zip(*samples, strict=True)
        return list(encoded), torch.tensor(ids)

    # A copy, because memory mapped from a file cannot be sent between processes.
    files = Numbered(lambda index: io.read_file(paths[index]).clone(), len(paths))
    for encoded, ids in _loader(row, files, collate):
        decoded = io.decode_jpeg(encoded, io.ImageReadMode.RGB, device=DEVICE)
        small = resize(torch.stack(decoded))  # all have one size
        mirrored = torch.rand(row.batch, 1, 1, 1, device=DEVICE) < 0.5
        yield Batch(normalized(torch.where(mirrored, small.flip(3), small)), ids.to(DEVICE, non_blocking=True))


PEERS: dict[str, Callable[[Row, Images], Iterator[Batch]]] = {
    "ours": ours,
    "dataloader": dataloader,
    "torchvision.io": torchvision_io,
    "torchvision gpu": torchvision_gpu,
}


@dataclass(frozen=True)
class Numbered(Dataset):
    """Items (image(i), i) for i below `count`."""

    image: Callable[[int], Tensor]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image(index), index


def _batches(row: Row, dataset: Numbered) -> Iterator[Batch]:
    for images, ids in _loader(row, dataset, default_collate):
        yield Batch(images.to(DEVICE, non_blocking=True), ids.to(DEVICE, non_blocking=True))


def _loader(row: Row, dataset: Numbered, collate: Callable[[list[Any]], Any]) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=row.batch,
        sampler=RandomSampler(dataset, num_samples=10**12),
        num_workers=CORES,
        collate_fn=collate,
        pin_memory=ON_GPU,
        timeout=60,  # without it, a batch that a process fails to send is awaited forever
        persistent_workers=True,
        multiprocessing_context="fork",  # the data sets are closures, which cannot be pickled
    )


def _normalized(v2: Any) -> Any:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def _paths(images: Images) -> list[str]:
    """
    Raises:
        Unavailable: the images are not stored as files.
    """
    if isinstance(images, ImageSet):
        raise Unavailable("these images are not files")
    return [images.image_name(index) for index in range(len(images))]


# --- the benchmark ---

pytestmark = harness.timed(1.0 if ON_GPU else 3.0)
PACKAGES = ("nvidia-dali-cuda130", "torchvision", "Pillow")
BENCHMARK = harness.Benchmark("pipelines", ROWS, PEERS, PACKAGES, ("batches",), on_cpu=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()  # ends threads and processes, which would take time from the next measurement


@harness.cases((row, peer, "batches") for peer in PEERS for row in ROWS)
def test_pipelines(row: Row, peer: str, mode: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, measure)


def measure(cell: Document, benchmark: Any, row: Row, peer: str, mode: str) -> None:
    """Fill a cell; the times are those of a batch of images."""
    images = load(row.images)
    with closing(PEERS[peer](row, images)) as batches:  # type: ignore[type-var]
        cell["errors"] = errors(row, images, next(batches))

        def several() -> None:
            for _ in range(row.batches):
                next(batches)

        cell["wall"] = harness.wall(benchmark, several, row.batches)
        share = waiting_share(iteration(row), batches, ahead=row.batches) if ON_GPU else None
        cell["waiting_share"] = None if share is None else round(share, 4)
