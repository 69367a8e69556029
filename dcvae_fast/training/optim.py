"""Implementations of Adam, and its moments in a format common to all of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcvae_fast.config import OptimConfig
from dcvae_fast.errors import ConfigError, reason


class Moments(NamedTuple):
    """Adam's state of one parameter.

    Attributes:
        step: number of steps
        exp_avg, exp_avg_sq: first and second moment, of the parameter's shape
    """

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adam(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    lr: float | None = None,
    scales: Mapping[Any, float] | None = None,
) -> torch.optim.Optimizer:
    """Return the implementation of Adam that `optim.implementation` selects.

    Args:
        parameters: apex and deepspeed require parameters that are always stepped together.
        config: settings of Adam.
        lr: learning rate; None for `config.lr`.
        scales: factor c of parameters with equalised learning rate. The parameter is c times the weight that Adam
            should step, which is equivalent to learning rate lr · c and ε / c.

    Raises:
        ConfigError: the implementation is not installed, or cannot be used here.
    """
    by_scale = defaultdict(list)
    for parameter in parameters:
        by_scale[(scales or {}).get(parameter, 1.0)].append(parameter)
    lr = config.lr if lr is None else lr
    groups = [{"params": scaled, "lr": lr * c, "eps": config.eps / c} for c, scaled in by_scale.items()]
    device = groups[0]["params"][0].device
    implementation = choose(config.implementation, device)
    if implementation == "torch":
        capturable = device.type == "cuda"  # for CUDA graphs
        return torch.optim.Adam(groups, betas=config.betas, fused=device.type != "meta", capturable=capturable)
    try:
        return _fused_adam(implementation)(groups, betas=config.betas, adam_w_mode=False)
    except Exception as error:  # the compiler is missing or fails, or the device is not supported
        raise ConfigError(
            f"optim.implementation is {implementation}, which cannot be used here ({reason(error)})."
        ) from error


def choose(implementation: str, device: torch.device) -> str:
    """Return the implementation for a device: apex, deepspeed or torch. `auto` is apex if available, else torch."""
    if device.type == "meta":
        return "torch"
    if implementation != "auto":
        return implementation
    try:
        return "apex" if device.type == "cuda" and _fused_adam("apex") else "torch"
    except ConfigError:
        return "torch"


def _fused_adam(implementation: str) -> Any:
    """Return the FusedAdam class of Apex or DeepSpeed."""
    try:
        if implementation == "apex":
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
        else:
            from deepspeed.ops.adam import FusedAdam
    except ImportError as error:
        names = {"apex": "NVIDIA's Apex (apex.optimizers; not the package called apex on PyPI)"}
        name = names.get(implementation, implementation)
        raise ConfigError(f"optim.implementation is {implementation}, but {name} is not installed.") from error
    return FusedAdam


def read_moments(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Moments:
    """Return the moments of a parameter in one of the optimizer's groups. Requires at least one step."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.Adam):
        step = state["step"]
    else:  # Apex stores the step count in the group, DeepSpeed in the state of the group's last parameter
        last = optimizer.state[group["params"][-1]]
        step = last["step"] if "step" in last else group["step"]
    return Moments(int(step), state["exp_avg"], state["exp_avg_sq"])


def write_moments(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, moments: Moments) -> None:
    """Set the moments of a parameter, before the optimizer's first step."""
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
