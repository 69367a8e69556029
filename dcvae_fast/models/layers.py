"""Layers and helpers that the networks share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Critique(NamedTuple):
    """Output of the discriminator.

    Attributes:
        score: [B], high for real images; [0] if it was not computed
        features: by layer: feature maps [B, W, H, H], and `final` [B, …]
    """

    score: Tensor
    features: dict[str, Tensor]


def init_weights(network: nn.Module) -> None:
    """Initialise as AutoGAN: convolutions Xavier uniform, BatchNorm scales N(1, 0.02), linear layers as in torch."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks, whose backward pass sums the gradients over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with statistics of all ranks; with a single rank, torch's implementation."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        world_size, x = dist.get_world_size(), upcast(input)
        local_var, local_mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean = SumOverRanks.apply(local_mean) / world_size
        var = SumOverRanks.apply(local_var + (local_mean - mean).square()) / world_size
        with torch.no_grad():
            count = world_size * input.numel() / input.shape[1]
            for running, batch in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                running.copy_(torch.lerp(upcast(running), batch, self.momentum))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(input.dtype)


class ContrastHead(nn.Module):
    """Contrastive head: feature map [B, W, H, H] → 1×1 convolution to one channel → linear → [B, D] (§4.2)."""

    def __init__(self, width: int, positions: int, contrast_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1)
        self.linear = nn.Linear(positions, contrast_dim, bias=False)
        init_weights(self)

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.linear(self.conv(feature_map).flatten(1))


def upcast(x: Tensor) -> Tensor:
    """Convert to float32, unless the dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Context manager that passes gradients through `network` to its input, but not to its parameters."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """ema ← decay · ema + (1 − decay) · network, in place, for parameters only."""
    torch._foreach_lerp_(tuple(ema.parameters()), tuple(network.parameters()), 1 - decay)


@torch.no_grad()
def copy_buffers(target: nn.Module, network: nn.Module) -> None:
    """Copy the buffers (batch statistics) of `network` to `target`."""
    for destination, source in zip(target.buffers(), network.buffers(), strict=True):
        destination.copy_(source)


def upsample(x: Tensor, size: int, mode: str) -> Tensor:
    """Resize [B, C, H, W] to [B, C, size, size] by `nearest` or `bilinear` interpolation."""
    return nn.functional.interpolate(x, size=(size, size), mode=mode)
