"""Expected cost of a run, measured by running iterations on the meta device, which computes shapes but no values."""

import math
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from dcvae_fast.config import Config
from dcvae_fast.models.progressive import Phase, set_phase
from dcvae_fast.training.schedule import Stage, schedule_at, stages
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch, EncodedSet, ImageSet


class StageRange(NamedTuple):
    """A stage in whole iterations, as far as training reaches it.

    Attributes:
        stage: the stage
        first: images shown before its first iteration
        last: images shown after its last iteration, or when training ends
        iterations: number of iterations
        batch: images per iteration
    """

    stage: Stage
    first: int
    last: int
    iterations: int
    batch: int

    def __str__(self) -> str:
        return f"{self.stage.resolution}×{self.stage.resolution}{' fading' if self.stage.fades else ''}"


class Cost(NamedTuple):
    """Cost of an iteration in a stage.

    Attributes:
        flops: floating-point operations, on average
        networks: bytes of networks, EMAs and queue, including layers of later resolutions
        moments: bytes of Adam's moments of the parameters trained in this stage
        peak: peak bytes of activations and gradients, in float32
    """

    flops: float
    networks: int
    moments: int
    peak: int

    @property
    def memory(self) -> int:
        return self.networks + self.moments + self.peak


def plan(config: Config, train_set: ImageSet | EncodedSet, device: torch.device) -> str:
    """Return a report: parameters and FLOPs of each network, images and iterations of the run, and expected memory.

    For networks that grow, it has a table of all stages that training reaches; the memory is the maximum over stages.
    """
    train, model = config.train, config.model
    step = TrainStep(config, "meta")
    networks, n = step.networks, schedule_at(config, train.images).batch
    batch = _meta_batch(config, n, model.resolution)
    latents = torch.empty(n, model.latent_dim, device="meta")
    if model.grows:
        set_phase(networks, Phase(model.resolution))
    at = f", at {model.resolution}×{model.resolution}" if model.grows else ""
    lines = [f"network         parameters   GFLOP per image, forward{at}"]
    for name, network, network_input in (
        ("encoder", networks.encoder, batch.images),
        ("decoder", networks.decoder, latents),
        ("discriminator", networks.discriminator, batch.images),
    ):
        lines.append(
            f"{name:14s} {count_parameters(network):11,d}   {forward_flops(network, network_input) / n / 1e9:.3f}"
        )
    is_resident = config.data.resident or isinstance(train_set, ImageSet)
    data = len(train_set) * model.image_channels * model.resolution**2 if is_resident else 0
    lines += ["", f"objective       {config.loss.objective}, {config.loss.order}, on {device}"]
    every = train.n_critic if config.loss.has_gan else 1
    if model.grows:
        return "\n".join(lines + _stage_table(step, len(train_set), data, every))

    with PeakMemory() as peak:
        step(batch)
    flops = iteration_flops(step, batch)
    iterations = -(-train.images // n)
    epoch = len(train_set) // n * n if config.data.drop_last else len(train_set)
    resident = _nbytes([*networks.parameters(), *networks.buffers()])
    trained = sum(_nbytes(group) for group in step.engine.groups.values())
    lines += [
        f"plan            {train.images:,} images = {train.images / epoch:,.1f} epochs of {epoch:,}"
        f" = {iterations:,} iterations of {n}; 1 in {every} updates the autoencoder",
        f"arithmetic      {flops / 1e12:.3f} TFLOP per iteration on average,"
        f" {flops * iterations / 1e15:,.2f} PFLOP in total",
        _memory(resident, 2 * trained, peak.peak, data),
    ]
    return "\n".join(lines)


def _stage_table(step: TrainStep, train_images: int, data: int, every: int) -> list[str]:
    """Return the rest of the report for networks that grow: the table of stages, and totals."""
    train, ranges = step.config.train, stage_ranges(step.config)
    costs = stage_costs(step)
    iterations = sum(stage_range.iterations for stage_range in ranges)
    lines = [
        f"plan            {train.images:,} images = {train.images / train_images:,.1f} epochs of {train_images:,}"
        f" = {iterations:,} iterations; 1 in {every} updates the autoencoder",
        "",
        "stage              from image      to image   iterations  batch  GFLOP per image  memory, GiB",
    ]
    for stage_range, cost in zip(ranges, costs, strict=True):
        first, last, batch = stage_range.first, stage_range.last, stage_range.batch
        lines.append(
            f"{stage_range!s:16s} {first:12,d} {last:13,d} {stage_range.iterations:12,d} {batch:6d}"
            f" {cost.flops / batch / 1e9:16,.3f} {(cost.memory + data) / 2**30:12.2f}"
        )
    lines += ["", f"arithmetic      {_flops_after(0, ranges, costs) / 1e15:,.2f} PFLOP in total"]
    if costs:
        cost, stage_range = max(zip(costs, ranges, strict=True), key=lambda pair: pair[0].memory)
        lines.append(f"{_memory(cost.networks, cost.moments, cost.peak, data)}; the maximum is at {stage_range}")
    if train.precision != "float32":
        lines.append(f"                activations and gradients are counted in float32: {train.precision} needs less")
    return lines


def _memory(networks: int, moments: int, peak: int, data: int) -> str:
    return (
        f"memory          {(networks + moments + peak + data) / 2**30:.2f} GiB expected:"
        f" networks, EMAs and queue {networks / 2**20:.0f} MiB, Adam {moments / 2**20:.0f} MiB,"
        f" activations and gradients {peak / 2**20:.0f} MiB, data {data / 2**20:.0f} MiB"
    )


def stage_ranges(config: Config) -> list[StageRange]:
    """Return the stages that training reaches within `train.images` images."""
    total, shown = config.train.images, 0
    ranges, all_stages = [], stages(config)
    ends = [min(stage.begin, total) for stage in all_stages[1:]] + [total]  # the last stage ends with training
    for stage, end in zip(all_stages, ends, strict=True):
        batch = schedule_at(config, stage.begin).batch
        iterations = -(-(end - shown) // batch)
        if iterations < 1:  # training ends before this stage, or the last batch of an earlier stage covers it
            continue
        ranges.append(StageRange(stage, shown, min(shown + iterations * batch, total), iterations, batch))
        shown += iterations * batch
    return ranges


def training_flops(config: Config, shown: int = 0) -> float:
    """Return the floating-point operations of a run, or of its rest after `shown` images."""
    return _flops_after(shown, stage_ranges(config), stage_costs(TrainStep(config, "meta")))


def _flops_after(shown: int, ranges: list[StageRange], costs: list[Cost]) -> float:
    total = 0.0
    for stage_range, cost in zip(ranges, costs, strict=True):
        done = max(0, shown - stage_range.first) // stage_range.batch
        total += cost.flops * max(0, stage_range.iterations - done)
    return total


def stage_costs(step: TrainStep) -> list[Cost]:
    """Return the cost of an iteration in the middle of each stage that training reaches.

    Args:
        step: a step on the meta device; it is advanced to the last of these stages.
    """
    costs, resolution = [], None
    for stage_range in stage_ranges(step.config):
        stage = stage_range.stage
        step.images = middle = stage.begin + stage.images // 2
        batch = _meta_batch(step.config, stage_range.batch, stage.resolution)
        if stage.resolution != resolution:
            step.grow(step.schedule)
        step(batch)  # creates the moments
        step.images, resolution = middle, stage.resolution
        resident = [*step.networks.parameters(), *step.networks.buffers()]
        moments = [x for m in step.engine.moments().values() for x in (m.exp_avg, m.exp_avg_sq)]
        with PeakMemory(exclude=resident + moments) as peak:
            flops = iteration_flops(step, batch)
        costs.append(Cost(flops, _nbytes(resident), _nbytes(moments), peak.peak))
    return costs


def iteration_flops(step: TrainStep, batch: Batch) -> float:
    """Return the floating-point operations of an iteration on this batch, averaged over one period of autoencoder
    updates and penalties. `step.images` is restored."""
    train, loss = step.config.train, step.config.loss
    n_critic = train.n_critic if loss.has_gan else 1
    penalty_every = loss.penalty_every if loss.has_gan and loss.adversarial == "logistic_r1" else 1
    images, flops, total, period = step.images, {}, 0, math.lcm(n_critic, penalty_every)
    for iteration in range(period):
        kind = (iteration % n_critic == 0, iteration % penalty_every == 0)
        if kind not in flops:
            step.images, step.iterations = images, iteration
            with flop_counter() as counter:
                step(batch)
            flops[kind] = counter.get_total_flops()
        total += flops[kind]
    step.images = images
    return total / period


def _meta_batch(config: Config, n: int, resolution: int) -> Batch:
    images = torch.empty(n, config.model.image_channels, resolution, resolution, device="meta")
    return Batch(images, torch.zeros(n, dtype=torch.int64, device="meta"))


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _NoModules(ModuleTracker):
    """Module tracker without hooks; torch's hooks fail when gradients of leaf tensors are computed, as in penalties."""

    def __enter__(self):
        return self

    def __exit__(self, *args: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """Return a context manager that counts floating-point operations, including the gradients of penalties."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def forward_flops(network: nn.Module, network_input: Tensor) -> int:
    """Return the floating-point operations of one forward pass: 2 per multiply-add of convolutions and matmuls."""
    with flop_counter() as counter:
        network(network_input)
    return counter.get_total_flops()


class PeakMemory(TorchDispatchMode):
    """Context manager that tracks the bytes of live tensors; `peak` is their maximum.

    Tensors created earlier count from the first in-place operation or view on, unless they are in `exclude`.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()):
        super().__init__()
        self.peak = self._now = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in exclude}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._alive:
                self._alive.add(key)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, key, storage.nbytes())
        return out

    def _free(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self._now -= nbytes
