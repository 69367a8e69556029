"""Which Adam, and its moments in a form that does not depend on which."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcvae_fast.config import OptimConfig
from dcvae_fast.errors import ConfigError, reason


class Moments(NamedTuple):
    """What Adam remembers of a parameter."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adam(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    lr: float | None = None,
    scales: Mapping[Any, float] | None = None,
) -> torch.optim.Optimizer:
    """The Adam that `optim.implementation` asks for, over parameters that are always stepped together.

    Args:
        lr: instead of the configuration's.
        scales: c of parameters with equalised learning rate: they are the product of c and what Adam is meant to step,
            so its steps are lr · c with ε / c.

    Raises:
        ConfigError: it is not installed, or cannot be used here.
    """
    by_scale = defaultdict(list)
    for parameter in parameters:
        by_scale[(scales or {}).get(parameter, 1.0)].append(parameter)
    lr = config.lr if lr is None else lr
    groups = [{"params": some, "lr": lr * c, "eps": config.eps / c} for c, some in by_scale.items()]
    device = groups[0]["params"][0].device
    kind = choose(config.implementation, device)
    if kind == "torch":
        on_gpu = device.type == "cuda"  # where a CUDA graph may hold it
        return torch.optim.Adam(groups, betas=config.betas, fused=device.type != "meta", capturable=on_gpu)
    try:
        return _other(kind)(groups, betas=config.betas, adam_w_mode=False)
    except Exception as error:  # a compiler that is missing or fails, a device it is not for
        raise ConfigError(f"optim.implementation is {kind}, which cannot be used here ({reason(error)}).") from error


def choose(implementation: str, device: torch.device) -> str:
    """`apex`, `deepspeed` or `torch`, for `optim.implementation` and a device."""
    if device.type == "meta":
        return "torch"
    if implementation != "auto":
        return implementation
    try:
        return "apex" if device.type == "cuda" and _other("apex") else "torch"
    except ConfigError:
        return "torch"


def _other(kind: str) -> Any:
    """The class of an Adam that is not torch's."""
    try:
        if kind == "apex":
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
        else:
            from deepspeed.ops.adam import FusedAdam
    except ImportError as error:
        names = {"apex": "NVIDIA's Apex (apex.optimizers; not the package called apex in the index)"}
        raise ConfigError(f"optim.implementation is {kind}, but {names.get(kind, kind)} is not installed.") from error
    return FusedAdam


def read_moments(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Moments:
    """Return the moments of a parameter of one of the optimizer's groups, after a step."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.Adam):
        step = state["step"]
    else:  # Apex counts the steps of a group, DeepSpeed those of the group's last parameter
        last = optimizer.state[group["params"][-1]]
        step = last["step"] if "step" in last else group["step"]
    return Moments(int(step), state["exp_avg"], state["exp_avg_sq"])


def write_moments(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, moments: Moments) -> None:
    """Before the first step, what `read_moments` gave."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.Adam):
        device = "cpu" if parameter.is_meta else parameter.device
        state["step"] = torch.tensor(float(moments.step), device=device)
    elif type(optimizer).__module__.startswith("apex"):
        group["step"] = moments.step
    else:
        state["step"] = moments.step
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.empty_like(parameter).copy_(getattr(moments, name))
