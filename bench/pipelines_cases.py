"""What the data benchmark poses: images and the size they are shown at, what a batch must hold, what it is for."""

import functools
import importlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import harness
from dcvae_pipelines import Batch, EncodedSet, ImageSet, decode_images, load_dataset
from dcvae_pipelines.pixels import normalize
from harness import Absent, Unavailable
from records import ROOT

# Threads of ours that decode, and processes of the others.
CORES = len(os.sched_getaffinity(0))
# The folder of real images; without it they are looked for in the checkout and beside it.
FOLDER_VARIABLE = "DCVAE_IMAGES"
# Of one image, mean absolute difference in levels of 255. Decoders differ by rounding, NVIDIA's a little more.
TOLERANCE = 1.5
# An iteration's arithmetic, in forward passes of one network.
FORWARD_PASSES = 41
ITERATIONS = 20  # a multiple of n_critic, so that each such run does the same
# Of the square matrices that are multiplied where an iteration is simulated.
SIZE = 4096


@dataclass(frozen=True)
class Row:
    """Shuffled, mirrored batches of a data set at a resolution.

    images: folder of the data set.
    forward_gflop: of a network at this resolution for one image, with up- and downsampling fused into the convolutions,
        which makes iterations as short as they can become. None at 32×32, where the networks are there to be run.
    batches: between two looks at the clock: more than any implementation makes ahead.
    seconds: that are measured at least, if three such rounds take less.
    """

    name: str
    images: str
    resolution: int
    batch: int
    forward_gflop: float | None
    batches: int = max(24, 2 * CORES)
    seconds: float = 1.0 if harness.ON_GPU else 3.0

    def shrunk(self) -> "Row":
        """For a rehearsal."""
        return replace(self, batch=2, batches=2, seconds=0.0)

    def flops(self) -> float | None:
        """Of an iteration that is simulated."""
        return self.forward_gflop and self.forward_gflop * 1e9 * FORWARD_PASSES * self.batch

    def description(self) -> dict[str, Any]:
        flops = self.flops()
        return {
            "name": self.name,
            "images": self.images,
            "resolution": self.resolution,
            "batch": self.batch,
            "cores": CORES,
            "iteration": f"simulated: {flops / 1e12:.3g} TFLOP of bfloat16 matrix products" if flops else "TrainStep",
        }


# Batches and arithmetic are those of the networks that grow, where the images are larger than 32×32.
ROWS = (
    Row("faces512", "faces1024", 512, 6, 45.8),
    Row("faces256", "faces1024", 256, 14, 36.7),
    Row("bedroom128", "bedroom256", 128, 16, 27.5),
    Row("cifar10", "cifar10", 32, 64, None),
)


def imported(module: str, package: str) -> ModuleType:
    """
    Raises:
        Absent: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise Absent(f"{package} is not installed") from None


def folder_of(images: str) -> Path:
    """
    Raises:
        Absent: it is not there.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    folders = [Path(named)] if named else [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]
    for folder in folders:
        if (folder / images).is_dir():
            return folder / images
    raise Absent("real images absent")


def torchvision_root() -> Path:
    """The folder that holds CIFAR-10 as torchvision expects it: the images' own, or one made of them.

    Raises:
        Absent: the images are not there, or what unpacks them.
    """
    folder = folder_of("cifar10")
    if (folder / "cifar-10-batches-py").is_dir():
        return folder
    for module, package in (("numpy", "numpy"), ("PIL", "Pillow")):
        imported(module, package)
    return Path(_unpacked(folder.parent / "unpack.py").name)


@functools.cache
def _unpacked(script: Path) -> tempfile.TemporaryDirectory[str]:
    """Removed when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    subprocess.run([sys.executable, script, folder.name], check=True, capture_output=True)
    return folder


@functools.cache
def load(images: str) -> ImageSet | EncodedSet:
    """The training split.

    Raises:
        Absent: the images are not there, or what reads them.
    """
    if images != "cifar10":
        return load_dataset("folder", folder_of(images))
    root = torchvision_root()
    imported("torchvision", "torchvision")
    return load_dataset("cifar10", root)


def errors(row: Row, images: ImageSet | EncodedSet, batch: Batch) -> dict[str, float]:
    """How far a batch is from the same images decoded by Pillow, mirrored or not: the worst image's mean difference.

    Raises:
        Unavailable: more than rounding explains, or it is no batch as networks take it.
    """
    found, shape = batch.images, (row.batch, 3, row.resolution, row.resolution)
    if (found.shape, found.dtype, found.device.type) != (shape, torch.float32, harness.DEVICE.type):
        raise Unavailable(f"its batches are {found.dtype} {list(found.shape)} on {found.device.type}")
    exact = expected(images, batch.ids.cpu(), row.resolution)
    both = [(found.cpu() - x).abs().mean((1, 2, 3)) for x in (exact, exact.flip(3))]
    worst = torch.minimum(*both).max().item() * 127.5  # NaN if one is
    if not worst <= TOLERANCE:
        raise Unavailable(f"an image is wrong by {worst:.3g} of 255 levels on average")
    return {"image_error": float(f"{worst:.3g}")}


def expected(images: ImageSet | EncodedSet, ids: Tensor, resolution: int) -> Tensor:
    """Images of a data set, decoded by Pillow, not mirrored: float32 [B, 3, R, R] in [-1, 1]."""
    if isinstance(images, ImageSet):
        chosen = replace(images, images=images.images[ids], labels=None)
    else:
        chosen = replace(images, indices=images.indices[ids])
    return normalize(decode_images(chosen, len(ids), resolution=resolution).images)


@functools.cache
def iteration(row: Row) -> Callable[[Batch], Any]:
    """What training does with a batch: DC-VAE's step at 32×32, else matrix products of as many FLOPs. For a GPU."""
    flops = row.flops()
    if flops is None:
        from dcvae_fast.config import Config
        from dcvae_fast.training.step import TrainStep

        return TrainStep(Config(), harness.DEVICE)
    a, b = (torch.randn(SIZE, SIZE, device=harness.DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def simulated(batch: Batch) -> None:
        for _ in range(math.ceil(flops / (2 * SIZE**3))):
            torch.mm(a, b, out=out)

    return simulated


def waiting_share(step: Callable[[Batch], Any], batches: Iterator[Batch], ahead: int) -> float:
    """The share of a training iteration's time that its data costs: 1 − T₀/T, where T₀ is the time of iterations that
    have their batch on the device already, and T that of iterations that ask for the next.

    So nothing counts that happens while the device has work left. What the device does for the data counts.

    Args:
        ahead: batches that may lie ready, which are taken away before T begins.
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
