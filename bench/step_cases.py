"""What the benchmark of training iterations poses: networks, resolution and batch; and what must come out."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import harness
from baselines import Baseline
from dcvae_fast.config import Config
from dcvae_fast.recipes import recipe_config
from dcvae_fast.training.graphs import WARM_UPS
from dcvae_fast.training.plan import flop_counter
from dcvae_fast.training.schedule import stages
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch
from harness import Absent, Unavailable

NARROW = {
    "latent_dim": 8,
    "encoder_width": 8,
    "decoder_width": 8,
    "discriminator_width": 8,
    "base_channels": 256,
    "max_channels": 16,
}
PEERS = ("ours", "baseline")
# Of the first iteration's loss. Ours computes in bfloat16 on a GPU, in other orders everywhere.
TOLERANCE = 5e-2 if harness.ON_GPU else 1e-4


@dataclass(frozen=True)
class Row:
    """Iterations of a recipe at a resolution, all its layers faded in, on images that lie on the device."""

    name: str
    recipe: str
    resolution: int
    batch: int
    narrow: bool = False

    def shrunk(self) -> "Row":
        """For a rehearsal."""
        return replace(
            self, resolution=min(32 if self.recipe == "cifar10" else 16, self.resolution), batch=4, narrow=True
        )

    @functools.cached_property
    def config(self) -> Config:
        """With the settings that train fastest."""
        config = recipe_config(self.recipe)
        model, train, growth = config.model, config.train, config.growth
        model = replace(model, resolution=self.resolution, **(NARROW if self.narrow else {}))
        train = replace(train, precision="bfloat16" if harness.ON_GPU else "float32", batch=self.batch)
        if train.sampled_batch is not None:
            train = replace(train, sampled_batch=2 * self.batch)
        growth = replace(growth, batch={**growth.batch, self.resolution: self.batch})
        return replace(config, model=model, train=train, growth=growth)

    @property
    def period(self) -> int:
        """Iterations from one step of the autoencoder to the next."""
        return self.config.train.n_critic

    def description(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "recipe": self.recipe,
            "resolution": self.resolution,
            "batch": self.batch,
            "precision": self.config.train.precision,
            "flops": flops(self),
        }


# Those that there are targets for come first.
ROWS_ON_GPU = (
    Row("cifar10-64", "cifar10", 32, 64),
    Row("cifar10-256", "cifar10", 32, 256),
    Row("faces512", "celebahq512", 512, 6),
    Row("faces64", "celebahq512", 64, 16),
    Row("faces128", "celebahq512", 128, 16),
    Row("faces256", "celebahq512", 256, 14),
)
ROWS_ON_CPU = (
    Row("cifar10-8", "cifar10", 32, 8),
    Row("faces16", "celebahq512", 16, 4),
)


def begin(row: Row) -> int:
    """Images shown before the row's iterations: all layers of the resolution are faded in."""
    return next(x.begin for x in stages(row.config) if x.resolution == row.resolution and not x.fades)


def images(row: Row, device: torch.device | str = harness.DEVICE) -> Batch:
    shape = (row.batch, row.config.model.image_channels, row.resolution, row.resolution)
    if torch.device(device).type == "meta":
        return Batch(torch.empty(shape, device="meta"), torch.empty(row.batch, dtype=torch.int64, device="meta"))
    generator = torch.Generator().manual_seed(0)
    return Batch((torch.rand(shape, generator=generator) * 2 - 1).to(device), torch.arange(row.batch, device=device))


# What makes an iteration, and returns its losses on the device.
Iterate = Callable[[], dict[str, torch.Tensor]]


def ours(row: Row, device: torch.device | str = harness.DEVICE) -> Iterate:
    return iterations(TrainStep(row.config, device), row)


def iterations(step: TrainStep, row: Row) -> Iterate:
    """From where all layers of the row's resolution are faded in."""
    batch = images(row, step.device)
    step.images = begin(row)
    step.grow(step.schedule)
    return lambda: step(batch)


class Contiguous(TrainStep):
    """With channels first, as torch has them if nobody says otherwise."""

    memory_format = torch.contiguous_format


# What makes iterations fast besides doing less: settings, and whether channels are last.
NOTHING: dict[str, Any] = {"precision": "float32", "compile": False, "graphs": False, "channels_last": False}
SWITCHES: dict[str, dict[str, Any]] = {
    "none": NOTHING,
    "channels last": {**NOTHING, "channels_last": True},
    "bfloat16": {**NOTHING, "precision": "bfloat16"},
    "compile": {**NOTHING, "compile": True},
    "graphs": {**NOTHING, "graphs": True},
    "ours": {"precision": "bfloat16", "compile": True, "graphs": True, "channels_last": True},
}


def switched(row: Row, name: str) -> Iterate:
    """Ours with some of the switches.

    Raises:
        Absent: a switch is for GPUs.
    """
    settings = dict(SWITCHES[name])
    if settings["graphs"] and not harness.ON_GPU:
        raise Absent("there are no CUDA graphs on a CPU")
    make = TrainStep if settings.pop("channels_last") else Contiguous
    return iterations(make(replace(row.config, train=replace(row.config.train, **settings)), harness.DEVICE), row)


def baseline(row: Row, device: torch.device | str = harness.DEVICE) -> Iterate:
    plain, batch = Baseline(row.config, device), images(row, device)
    plain.images = begin(row)
    plain.grow(plain.schedule)
    return lambda: plain.iterate(batch.images, batch.ids)


def warm_up(row: Row, iterate: Iterate) -> None:
    """After a first iteration, until all is compiled and every kind of them is recorded as a graph, where they are. The
    next one steps the autoencoder again."""
    for _ in range((WARM_UPS + 2 if harness.ON_GPU else 1) * row.period - 1):
        iterate()


MAKERS = {"ours": ours, "baseline": baseline}


def flops(row: Row) -> dict[str, float]:
    """Floating-point operations of an iteration, on average over those that step the autoencoder and the others."""
    found: dict[str, float] = {}
    for peer, make in MAKERS.items():
        iterate, counts = make(row, "meta"), []
        for _ in range(min(2, row.period)):
            with flop_counter() as counter:
                iterate()
            counts.append(counter.get_total_flops())
        # Only the first iteration of a period steps the autoencoder; the others cost the same.
        found[peer] = (counts[0] + (row.period - 1) * counts[-1]) / row.period
    return found


@functools.cache
def expected_loss(row: Row) -> float | None:
    """Loss of the baseline's first iteration; None for cifar10, whose baseline updates spectral norms more often."""
    return baseline(row)()["loss/discriminator"].item() if row.config.model.grows else None


def errors(row: Row, found: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compare the loss of the first iteration with the baseline's.

    Raises:
        Unavailable: the loss differs by more than rounding errors, or is not finite.
    """
    loss, expected = found["loss/discriminator"].item(), expected_loss(row)
    if not math.isfinite(loss):
        raise Unavailable(f"its loss is {loss}")
    if expected is None:
        return {}
    error = abs(loss - expected) / max(1.0, abs(expected))
    if not error <= TOLERANCE:  # `not` catches NaN
        raise Unavailable(f"its first loss is {loss:.5g}, and the baseline's {expected:.5g}")
    return {"loss_error": float(f"{error:.3g}")}
