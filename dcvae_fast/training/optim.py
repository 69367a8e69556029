"""Which Adam."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dcvae_fast.config import OptimConfig


def adam(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    lr: float | None = None,
    scales: Mapping[Tensor, float] | None = None,
) -> torch.optim.Adam:
    """torch's fused Adam, plain on the meta device. Parameters without a gradient keep moments and step counts.

    Args:
        lr: instead of the configuration's.
        scales: c of parameters with equalised learning rate: they are the product of c and what Adam is meant to step,
            so its steps are lr · c with ε / c.
    """
    by_scale = defaultdict(list)
    for parameter in parameters:
        by_scale[(scales or {}).get(parameter, 1.0)].append(parameter)
    lr = config.lr if lr is None else lr
    groups = [{"params": some, "lr": lr * c, "eps": config.eps / c} for c, some in by_scale.items()]
    fused = groups[0]["params"][0].device.type != "meta"
    return torch.optim.Adam(groups, betas=config.betas, fused=fused)
