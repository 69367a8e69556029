"""Engine: backward passes, gradient averaging over ranks, and Adam."""

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
    """Steps the parameters that have received a gradient.

    One Adam serves all objectives, because torch.optim.Adam skips parameters without a gradient and counts steps per
    parameter.

    Attributes:
        settings: DeepSpeed's configuration; empty if DeepSpeed is not used
        groups: parameters by group name
        names: parameters by their names in the networks
        scaler: dynamic loss scale for float16
    """

    settings: Mapping[str, Any] = {}

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
            networks: all networks; the state dict uses their parameter names.
            groups: the trained parameters by group name; `backward` selects groups.
            config: settings of Adam and precision.
            ranks: ranks over which gradients are averaged.
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
        """Implementation of Adam: apex, deepspeed or torch."""
        return choose(self._config.implementation, self.parameters[0].device)

    def reset(self, lr: float, batch: int) -> None:
        """Restart Adam with this learning rate. `batch` is the batch per rank, used by DeepSpeed."""
        self.optimizer: torch.optim.Optimizer = adam(self.parameters, self._config, lr, self._scales)

    def change(self, lr: float, batch: int) -> None:
        """Continue with another learning rate and batch per rank, and with the same moments."""
        moments = self.moments()
        self.reset(lr, batch)
        self._load_moments(moments)

    def backward(self, loss: Tensor, groups: Iterable[str]) -> None:
        """Accumulate the gradient of the loss in the parameters of these groups only."""
        self._differentiate(self.scaler.scale(loss), [parameter for name in groups for parameter in self.groups[name]])

    def _differentiate(self, loss: Tensor, parameters: Parameters) -> None:
        loss.backward(inputs=parameters)

    def step(self) -> None:
        """Average gradients over all ranks, step the parameters that have gradients, and clear the gradients.

        Raises:
            DivergedError: in float16, a loss or its gradients are not finite at any loss scale.
        """
        self._average([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_LOSS_SCALE:  # waits for the device
            with self.ranks.raise_on_all_ranks():
                raise DivergedError("a loss or its gradients are not finite in float16 at any loss scale.")

    def _average(self, gradients: Sequence[Tensor]) -> None:
        self.ranks.all_reduce_mean_(gradients)

    def moments(self) -> dict[nn.Parameter, Moments]:
        """Return the full moments of all parameters that have been stepped, on every rank."""
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
        """Return the loss scale and the moments by parameter name. Independent of optimizer and number of ranks."""
        moments = self.moments()
        scale = self.scaler.state_dict()
        return {
            "moments": {name: moments[p]._asdict() for name, p in self.names.items() if p in moments},
            "loss_scale": {"value": scale["scale"], "steps": scale["_growth_tracker"]} if scale else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state dict. Call `reset` first."""
        self._load_moments({self.names[name]: Moments(**moments) for name, moments in state["moments"].items()})
        if self.scaler.is_enabled() and (scale := state["loss_scale"]) is not None:
            steps = scale["steps"] % self._config.loss_scale_window
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale["value"], "_growth_tracker": steps})
