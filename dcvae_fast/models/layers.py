"""What the networks are built from."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Critique(NamedTuple):
    """What the discriminator makes of a batch."""

    score: Tensor  # [B]: high for real; [0] where it was not asked for
    features: dict[str, Tensor]  # by layer, those asked for: feature maps [B, W, H, H], and `final` [B, …]


def init_weights(network: nn.Module) -> None:
    """As AutoGAN: Xavier uniform convolutions, BatchNorm scales N(1, 0.02); linear layers keep torch's own."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks that train together; its gradient is that of the sum of their losses."""

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
    """Over the batch of all ranks that train together; on one rank, torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        ranks, wide = dist.get_world_size(), upcast(input)
        own_var, own_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        mean = SumOverRanks.apply(own_mean) / ranks
        var = SumOverRanks.apply(own_var + (own_mean - mean).square()) / ranks
        with torch.no_grad():
            count = ranks * input.numel() / input.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], wide, scale[:, None, None]).to(input.dtype)


class ContrastHead(nn.Module):
    """A feature map [B, W, H, H] → queries or keys [B, D]: 1×1 convolution to one channel, linear layer (§4.2)."""

    def __init__(self, width: int, positions: int, contrast_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1)
        self.linear = nn.Linear(positions, contrast_dim, bias=False)
        init_weights(self)

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.linear(self.conv(feature_map).flatten(1))


def upcast(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, autocast is off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, gradients pass through `network` to its input but none is computed for its parameters."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · network, in place, parameters only."""
    torch._foreach_lerp_(tuple(average.parameters()), tuple(network.parameters()), 1 - decay)


@torch.no_grad()
def copy_buffers(target: nn.Module, network: nn.Module) -> None:
    """Give `target` the buffers (batch statistics) of `network`."""
    for mine, theirs in zip(target.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def upsample(x: Tensor, size: int, mode: str) -> Tensor:
    """[B, C, H, W] → [B, C, size, size] by `nearest` or `bilinear` interpolation."""
    return nn.functional.interpolate(x, size=(size, size), mode=mode)
