"""What the networks are built from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def init_weights(network: nn.Module) -> None:
    """As AutoGAN: Xavier uniform convolutions, BatchNorm scales N(1, 0.02); linear layers keep torch's own."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


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
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
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
