"""Backward passes, gradients averaged over the ranks, and Adam."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcvae_fast.config import Config
from dcvae_fast.distributed import SINGLE, Ranks
from dcvae_fast.errors import DivergedError
from dcvae_fast.training.optim import Moments, adam, choose, read_moments, write_moments

Parameters = Sequence[nn.Parameter]

SMALLEST_LOSS_SCALE = 2**-24


class Engine:
    """Step the parameters that have received a gradient.

    One Adam serves all objectives: torch's leaves out parameters without a gradient, and counts steps for each.
    """

    settings: Mapping[str, Any] = {}
    """settings of DeepSpeed, if it is used"""

    def __init__(
        self,
        networks: nn.Module,
        groups: Mapping[str, Parameters],
        config: Config,
        ranks: Ranks = SINGLE,
        scales: Mapping[Tensor, float] | None = None,
    ):
        """
        Args:
            networks: whose parameters are stepped; the state uses their names.
            groups: the parameters, by names for `backward`.
            config: settings of Adam and precision.
            ranks: over which gradients are averaged.
            scales: see `adam`.
        """
        self.groups, self.ranks = groups, ranks
        self.names = {name: parameter for name, parameter in networks.named_parameters()}
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self._config, self._scales = config.optim, scales
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=config.optim.loss_scale,
            growth_interval=config.optim.loss_scale_window,
            enabled=config.train.precision == "float16" and device.type != "meta",
        )
        self.reset(config.optim.lr, config.train.batch)

    def describe(self) -> str:
        """Return a short description for the log."""
        world_size = self.ranks.world_size
        return "torch" if world_size == 1 else f"torch, averaged over {world_size} ranks"

    @property
    def adam_name(self) -> str:
        """Whose Adam is used: see `choose`."""
        return choose(self._config.implementation, self.parameters[0].device)

    def reset(self, lr: float, batch: int) -> None:
        """Forget all moments; continue with this learning rate, and batch per rank."""
        self.optimizer: torch.optim.Optimizer = adam(self.parameters, self._config, lr, self._scales)

    def backward(self, loss: Tensor, groups: Iterable[str]) -> None:
        """Add the gradient of the loss to the parameters of these groups, and to no others."""
        self._differentiate(self.scaler.scale(loss), [parameter for name in groups for parameter in self.groups[name]])

    def _differentiate(self, loss: Tensor, parameters: Parameters) -> None:
        loss.backward(inputs=parameters)

    def step(self) -> None:
        """Step the parameters that have gradients by their means over all ranks, and clear the gradients.

        Raises:
            DivergedError: a float16 loss or its gradients are not finite at any loss scale.
        """
        self._average([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_LOSS_SCALE:  # waits for the device
            with self.ranks.raise_on_all_ranks():
                raise DivergedError("a loss or its gradients are not finite in float16, at any loss scale.")

    def _average(self, gradients: Sequence[Tensor]) -> None:
        self.ranks.all_reduce_mean_(gradients)

    def moments(self) -> dict[nn.Parameter, Moments]:
        """Return the moments of all parameters that have been stepped, whole on every rank."""
        optimizer = self.optimizer
        return {
            parameter: read_moments(optimizer, group, parameter)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in optimizer.state
        }

    def _load_moments(self, moments: Mapping[nn.Parameter, Moments]) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in moments:
                    write_moments(self.optimizer, group, parameter, moments[parameter])

    def state_dict(self) -> dict[str, Any]:
        """Return moments by the parameter's name, independent of optimizer and number of ranks, and the loss scale."""
        moments = self.moments()
        scale = self.scaler.state_dict()
        return {
            "moments": {name: moments[p]._asdict() for name, p in self.names.items() if p in moments},
            "loss_scale": {"value": scale["scale"], "steps": scale["_growth_tracker"]} if scale else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; call `reset` first."""
        self._load_moments({self.names[name]: Moments(**moments) for name, moments in state["moments"].items()})
        if self.scaler.is_enabled() and (scale := state["loss_scale"]) is not None:
            steps = scale["steps"] % self._config.loss_scale_window
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale["value"], "_growth_tracker": steps})
