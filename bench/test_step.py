"""Training iterations: ours compared with the baseline, the authors' iteration in plain PyTorch (baselines.py).

Both train from the same weights on the same images, which are on the device; the first losses are compared. A time is
the mean of the iterations that step the autoencoder and those that do not. To measure on a CPU:

    python -m pytest bench/test_step.py -q -s --benchmark-quiet --results=bench/results
"""

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
from harness import ON_GPU, Unavailable
from results import Document, Target

WIDTHS = ("latent_dim", "encoder_width", "decoder_width", "discriminator_width")
NARROW = {**dict.fromkeys(WIDTHS, 8), "base_channels": 256, "max_channels": 16}
TOLERANCE = 5e-2 if ON_GPU else 1e-4  # of the first loss; on a GPU ours computes in bfloat16


@dataclass(frozen=True)
class Row:
    """Iterations of a recipe at a resolution, with all its layers faded in and the fastest settings."""

    name: str
    recipe: str
    resolution: int
    batch: int
    narrow: bool = False
    targets: tuple[Target, ...] = ()

    def shrunk(self) -> "Row":
        resolution = min(32 if self.recipe == "cifar10" else 16, self.resolution)
        return replace(self, resolution=resolution, batch=4, narrow=True)

    @functools.cached_property
    def config(self) -> Config:
        config = recipe_config(self.recipe)
        model, train, growth = config.model, config.train, config.growth
        model = replace(model, resolution=self.resolution, **(NARROW if self.narrow else {}))
        train = replace(train, precision="bfloat16" if ON_GPU else "float32", batch=self.batch)
        if train.sampled_batch is not None:
            train = replace(train, sampled_batch=2 * self.batch)
        growth = replace(growth, batch={**growth.batch, self.resolution: self.batch})
        return replace(config, model=model, train=train, growth=growth)

    @property
    def period(self) -> int:
        """Iterations from one step of the autoencoder to the next."""
        return self.config.train.n_critic

    def description(self) -> Document:
        fields = {name: getattr(self, name) for name in ("name", "recipe", "resolution", "batch")}
        return {**fields, "precision": self.config.train.precision, "flops": flops(self)}


def faster(required: float) -> Target:
    return Target("times faster than the baseline", required, against="baseline")


def matrix_rate(required: float) -> Target:
    return Target("share of the matrix rate", required, "rate", "bfloat16")


# Rows with targets come first.
ROWS_ON_GPU = (
    Row("cifar10-64", "cifar10", 32, 64, targets=(faster(6),)),
    Row("cifar10-256", "cifar10", 32, 256, targets=(matrix_rate(0.4),)),
    Row("faces512", "celebahq512", 512, 6, targets=(faster(3), matrix_rate(0.3))),
    Row("faces64", "celebahq512", 64, 16),
    Row("faces128", "celebahq512", 128, 16),
    Row("faces256", "celebahq512", 256, 14),
)
ROWS_ON_CPU = (
    Row("cifar10-8", "cifar10", 32, 8, targets=(faster(1.35),)),
    Row("faces16", "celebahq512", 16, 4),
)


Iterate = Callable[[], dict[str, torch.Tensor]]  # makes an iteration and returns its losses on the device


def images(row: Row, device: torch.device | str = harness.DEVICE) -> Batch:
    shape = (row.batch, row.config.model.image_channels, row.resolution, row.resolution)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(values.to(device), torch.arange(row.batch, device=device))


def ours(row: Row, device: torch.device | str = harness.DEVICE) -> Iterate:
    return iterations(TrainStep(row.config, device), row)


def iterations(step: TrainStep, row: Row) -> Iterate:
    fade_in(step, row)
    batch = images(row, step.device)
    return lambda: step(batch)


def baseline(row: Row, device: torch.device | str = harness.DEVICE) -> Iterate:
    plain, batch = Baseline(row.config, device), images(row, device)
    fade_in(plain, row)
    return lambda: plain.iterate(batch.images, batch.ids)


def fade_in(step: TrainStep | Baseline, row: Row) -> None:
    """Advance to where all layers of the row's resolution are faded in."""
    step.images = next(x.begin for x in stages(row.config) if x.resolution == row.resolution and not x.fades)
    step.grow(step.schedule)


PEERS = {"ours": ours, "baseline": baseline}


def warm_up(row: Row, iterate: Iterate) -> None:
    """Iterate until everything is compiled and recorded; the next iteration steps the autoencoder."""
    for _ in range((WARM_UPS + 2 if ON_GPU else 1) * row.period - 1):
        iterate()


def flops(row: Row) -> dict[str, float]:
    """Return the FLOPs of an iteration, averaged over those that step the autoencoder and the others."""
    means = {}
    for peer, make in PEERS.items():
        iterate, counts = make(row, "meta"), []
        for _ in range(min(2, row.period)):
            with flop_counter() as counter:
                iterate()
            counts.append(counter.get_total_flops())
        # Only the first iteration of a period steps the autoencoder; the others cost the same.
        means[peer] = (counts[0] + (row.period - 1) * counts[-1]) / row.period
    return means


@functools.cache
def expected_loss(row: Row) -> float | None:
    """Loss of the baseline's first iteration; None for cifar10, whose baseline updates spectral norms more often."""
    return baseline(row)()["loss/discriminator"].item() if row.config.model.grows else None


def errors(row: Row, losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compare the loss of the first iteration with the baseline's.

    Raises:
        Unavailable: the loss differs by more than rounding errors, or is not finite.
    """
    loss, expected = losses["loss/discriminator"].item(), expected_loss(row)
    if not math.isfinite(loss):
        raise Unavailable(f"its loss is {loss}")
    if expected is None:
        return {}
    error = abs(loss - expected) / max(1.0, abs(expected))
    if not error <= TOLERANCE:  # `not` catches NaN
        raise Unavailable(f"its first loss is {loss:.5g}, and the baseline's {expected:.5g}")
    return {"loss_error": float(f"{error:.3g}")}


# --- the benchmark ---

pytestmark = harness.timed(0.3 if ON_GPU else 0.02)
ROWS = ROWS_ON_GPU if ON_GPU else ROWS_ON_CPU
BENCHMARK = harness.Benchmark("step", ROWS, PEERS, modes=("iteration",), on_cpu=True)


@harness.cases((row, peer, "iteration") for row in ROWS for peer in PEERS)
def test_step(row: Row, peer: str, mode: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, measure)


def measure(cell: Document, benchmark: Any, row: Row, peer: str, mode: str) -> None:
    expected_loss(row)  # runs the baseline once, so it must come before memory is counted
    harness.free_memory()
    period = time_iterations(cell, benchmark, row, PEERS[peer](row))
    cell["peak_bytes"], events = harness.peak_reserved(), harness.device_events(period)
    if events:
        # A lower bound: the profiler makes kernels slower, especially in CUDA graphs. All kernels use one stream.
        busy = sum(event.time_range.elapsed_us() for event in events) / row.period
        cell["launches"] = round(len(events) / row.period)
        cell["waiting_share"] = float(f"{max(0.0, 1 - busy / cell['wall']['median_us']):.3g}")


def time_iterations(cell: Document, benchmark: Any, row: Row, iterate: Iterate) -> Callable[[], None]:
    """Check and time iterations, and return a call that makes a whole period of them."""
    cell["errors"] = errors(row, iterate())
    warm_up(row, iterate)

    def period() -> None:
        for _ in range(row.period):
            iterate()

    cell["wall"] = harness.wall(benchmark, period, row.period)
    return period
