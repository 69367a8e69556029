"""What a run will cost, found by running iterations on the meta device: shapes are computed, numbers are not."""

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
    """A stage as training passes through it, in whole iterations."""

    stage: Stage
    first: int
    """images shown when its first iteration begins"""
    last: int
    """images shown after its last iteration, or when training ends"""
    iterations: int
    batch: int

    def __str__(self) -> str:
        return f"{self.stage.resolution}×{self.stage.resolution}{' fading' if self.stage.fades else ''}"


class Cost(NamedTuple):
    """What an iteration of a stage takes: floating-point operations on average, and bytes."""

    flops: float
    networks: int
    """with averages and queue, and with the layers of later resolutions"""
    moments: int
    """Adam's, of the parameters that are stepped"""
    peak: int
    """most of activations and gradients at one time, in float32"""

    @property
    def memory(self) -> int:
        return self.networks + self.moments + self.peak


def plan(config: Config, train_set: ImageSet | EncodedSet, device: torch.device) -> str:
    """A readable page: parameters and FLOPs a network, the run in images, the memory expected.

    Of networks that grow, a table of all stages that training reaches too; the memory is that of the greediest.
    """
    train, model = config.train, config.model
    step = TrainStep(config, "meta")
    networks, n = step.networks, schedule_at(config, train.images).batch
    batch = _meta_batch(config, n, model.resolution)
    latents = torch.empty(n, model.latent_dim, device="meta")
    if model.grows:
        set_phase(networks, Phase(model.resolution))
    at = f", at {model.resolution}×{model.resolution}" if model.grows else ""
    lines = [f"network         parameters   GFLOP an image, forward{at}"]
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
        return "\n".join(lines + _growing(step, len(train_set), data, every))

    with PeakMemory() as peak:
        step(batch)
    flops = iteration_flops(step, batch)
    iterations = -(-train.images // n)
    epoch = len(train_set) // n * n if config.data.drop_last else len(train_set)
    resident = _nbytes([*networks.parameters(), *networks.buffers()])
    trained = sum(_nbytes(group) for group in step.engine.groups.values())
    lines += [
        f"plan            {train.images:,} images = {train.images / epoch:,.1f} epochs of {epoch:,}"
        f" = {iterations:,} iterations of {n}; the autoencoder is stepped in 1 of {every}",
        f"arithmetic      {flops / 1e12:.3f} TFLOP an iteration on average,"
        f" {flops * iterations / 1e15:,.2f} PFLOP in all",
        _memory(resident, 2 * trained, peak.peak, data),
    ]
    return "\n".join(lines)


def _growing(step: TrainStep, train_images: int, data: int, every: int) -> list[str]:
    """The rest of the page, for networks that grow: the table, and totals."""
    train, passed = step.config.train, stage_ranges(step.config)
    costs = stage_costs(step)
    iterations = sum(stretch.iterations for stretch in passed)
    lines = [
        f"plan            {train.images:,} images = {train.images / train_images:,.1f} epochs of {train_images:,}"
        f" = {iterations:,} iterations; the autoencoder is stepped in 1 of {every}",
        "",
        "stage              from image      to image   iterations  batch  GFLOP an image  memory, GiB",
    ]
    for stretch, cost in zip(passed, costs, strict=True):
        lines.append(
            f"{stretch!s:16s} {stretch.first:12,d} {stretch.last:13,d} {stretch.iterations:12,d} {stretch.batch:6d}"
            f" {cost.flops / stretch.batch / 1e9:15,.3f} {(cost.memory + data) / 2**30:12.2f}"
        )
    lines += ["", f"arithmetic      {_flops_after(0, passed, costs) / 1e15:,.2f} PFLOP in all"]
    if costs:
        most, at = max(zip(costs, passed, strict=True), key=lambda pair: pair[0].memory)
        lines.append(f"{_memory(most.networks, most.moments, most.peak, data)}; the most, at {at}")
    if train.precision != "float32":
        lines.append(f"                activations and gradients are counted in float32: {train.precision} needs less")
    return lines


def _memory(networks: int, moments: int, peak: int, data: int) -> str:
    return (
        f"memory          {(networks + moments + peak + data) / 2**30:.2f} GiB expected:"
        f" networks, averages and queue {networks / 2**20:.0f} MiB, Adam {moments / 2**20:.0f} MiB,"
        f" activations and gradients {peak / 2**20:.0f} MiB, data {data / 2**20:.0f} MiB"
    )


def stage_ranges(config: Config) -> list[StageRange]:
    """How training passes through the stages that `train.images` images reach."""
    total, shown = config.train.images, 0
    passed, found = [], stages(config)
    ends = [min(stage.begin, total) for stage in found[1:]] + [total]  # the last stage goes on for as long as training
    for stage, end in zip(found, ends, strict=True):
        batch = schedule_at(config, stage.begin).batch
        iterations = -(-(end - shown) // batch)
        if iterations < 1:  # training ends before this stage, or one batch of the stage before it goes beyond it
            continue
        passed.append(StageRange(stage, shown, min(shown + iterations * batch, total), iterations, batch))
        shown += iterations * batch
    return passed


def training_flops(config: Config, shown: int = 0) -> float:
    """Floating-point operations of a training of which `shown` images are done."""
    return _flops_after(shown, stage_ranges(config), stage_costs(TrainStep(config, "meta")))


def _flops_after(shown: int, passed: list[StageRange], costs: list[Cost]) -> float:
    total = 0.0
    for stretch, cost in zip(passed, costs, strict=True):
        done = max(0, shown - stretch.first) // stretch.batch
        total += cost.flops * max(0, stretch.iterations - done)
    return total


def stage_costs(step: TrainStep) -> list[Cost]:
    """What an iteration takes half-way through each stage that training passes through.

    Args:
        step: on the meta device; left at the last of these stages.
    """
    costs, resolution = [], None
    for stretch in stage_ranges(step.config):
        stage = stretch.stage
        step.images = half_way = stage.begin + stage.images // 2
        batch = _meta_batch(step.config, stretch.batch, stage.resolution)
        if stage.resolution != resolution:
            step.grow(step.schedule)
            step(batch)  # so that there are moments, as in all later iterations
            step.images, resolution = half_way, stage.resolution
        resident = [*step.networks.parameters(), *step.networks.buffers()]
        moments = [x for found in step.engine.moments().values() for x in (found.exp_avg, found.exp_avg_sq)]
        with PeakMemory(besides=resident + moments) as peak:
            flops = iteration_flops(step, batch)
        costs.append(Cost(flops, _nbytes(resident), _nbytes(moments), peak.peak))
    return costs


def iteration_flops(step: TrainStep, batch: Batch) -> float:
    """Floating-point operations of an iteration on this batch, averaged over those that step the autoencoder or take a
    penalty and those that do not. The step ends with as many images as it had."""
    train, loss = step.config.train, step.config.loss
    n_critic = train.n_critic if loss.has_gan else 1
    penalty_every = loss.penalty_every if loss.has_gan and loss.adversarial == "logistic_r1" else 1
    images, measured, total, period = step.images, {}, 0, math.lcm(n_critic, penalty_every)
    for iteration in range(period):
        kind = (iteration % n_critic == 0, iteration % penalty_every == 0)
        if kind not in measured:
            step.images, step.iterations = images, iteration
            with flop_counter() as counter:
                step(batch)
            measured[kind] = counter.get_total_flops()
        total += measured[kind]
    step.images = images
    return total / period


def _meta_batch(config: Config, n: int, resolution: int) -> Batch:
    images = torch.empty(n, config.model.image_channels, resolution, resolution, device="meta")
    return Batch(images, torch.zeros(n, dtype=torch.int64, device="meta"))


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _NoModules(ModuleTracker):
    """Attributes no arithmetic to modules: its hooks fail where a gradient is taken in a leaf, as penalties do."""

    def __enter__(self):
        return self

    def __exit__(self, *args: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """Inside, counts floating-point operations, those of penalties' gradients too."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def forward_flops(network: nn.Module, network_input: Tensor) -> int:
    """Floating-point operations of one forward pass: two for each multiply-add of convolutions and matrix products."""
    with flop_counter() as counter:
        network(network_input)
    return counter.get_total_flops()


class PeakMemory(TorchDispatchMode):
    """Inside, counts the bytes of tensors as they are made and freed; `peak` is the most at one time.

    A tensor from outside counts where it is changed in place or viewed, unless it is among `besides`.
    """

    def __init__(self, besides: Iterable[Tensor] = ()):
        super().__init__()
        self.peak = self._now = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in besides}

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
