"""What a run will cost, found by running one iteration on the meta device: shapes are computed, numbers are not."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from dcvae_fast.config import Config
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch, EncodedSet, ImageSet


def plan(config: Config, train_set: ImageSet | EncodedSet, device: torch.device) -> str:
    """A readable page: parameters and FLOPs a network, the run in images, the memory expected."""
    train, model = config.train, config.model
    step = TrainStep(config, "meta")
    networks, n = step.networks, train.batch
    images = torch.empty(n, model.image_channels, model.resolution, model.resolution, device="meta")
    latents = torch.empty(n, model.latent_dim, device="meta")
    lines = ["network         parameters   GFLOP an image, forward"]
    for name, network, network_input in (
        ("encoder", networks.encoder, images),
        ("decoder", networks.decoder, latents),
        ("discriminator", networks.discriminator, images),
    ):
        lines.append(
            f"{name:14s} {count_parameters(network):11,d}   {forward_flops(network, network_input) / n / 1e9:.3f}"
        )

    batch = Batch(images, torch.zeros(n, dtype=torch.int64, device="meta"))
    peak = PeakMemory()
    with FlopCounterMode(display=False) as counter, peak:
        step(batch)
    every = train.n_critic if config.loss.has_gan else 1
    flops = counter.get_total_flops()
    if every > 1:  # the other iterations step the discriminator alone
        with FlopCounterMode(display=False) as counter:
            step(batch)
        flops = (flops + (every - 1) * counter.get_total_flops()) / every
    iterations = -(-train.images // n)
    epoch = len(train_set) // n * n if config.data.drop_last else len(train_set)
    is_resident = config.data.resident or isinstance(train_set, ImageSet)
    data = len(train_set) * model.image_channels * model.resolution**2 if is_resident else 0
    resident = sum(tensor.nbytes for tensor in [*networks.parameters(), *networks.buffers()])
    trained = sum(p.nbytes for group in step.engine.groups.values() for p in group)
    lines += [
        "",
        f"objective       {config.loss.objective}, {config.loss.order}, on {device}",
        f"plan            {train.images:,} images = {train.images / epoch:,.1f} epochs of {epoch:,}"
        f" = {iterations:,} iterations of {n}; the autoencoder is stepped in 1 of {every}",
        f"arithmetic      {flops / 1e12:.3f} TFLOP an iteration on average,"
        f" {flops * iterations / 1e15:,.2f} PFLOP in all",
        f"memory          {(resident + 2 * trained + peak.peak + data) / 2**30:.2f} GiB expected:"
        f" networks, averages and queue {resident / 2**20:.0f} MiB, Adam {2 * trained / 2**20:.0f} MiB,"
        f" activations and gradients {peak.peak / 2**20:.0f} MiB, data {data / 2**20:.0f} MiB",
    ]
    return "\n".join(lines)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def forward_flops(network: nn.Module, network_input: Tensor) -> int:
    """Floating-point operations of one forward pass: two for each multiply-add of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        network(network_input)
    return counter.get_total_flops()


class PeakMemory(TorchDispatchMode):
    """Inside, counts the bytes of tensors as they are made and freed; `peak` is the most at one time."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

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
