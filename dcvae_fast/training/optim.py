"""Which Adam."""

from collections.abc import Iterable

import torch
from torch import nn

from dcvae_fast.config import OptimConfig


def adam(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Adam:
    """torch's fused Adam, plain on the meta device. Parameters without a gradient keep moments and step counts."""
    parameters = list(parameters)
    fused = parameters[0].device.type != "meta"
    return torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
