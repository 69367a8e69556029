"""Where gradients go: one process."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dcvae_fast.config import OptimConfig
from dcvae_fast.training.optim import adam


class Engine:
    """Groups of parameters that are stepped together, each with one Adam that it keeps through every kind of step."""

    def __init__(
        self,
        groups: Mapping[str, Iterable[nn.Parameter]],
        config: OptimConfig,
        scales: Mapping[Tensor, float] | None = None,
    ):
        self.groups = {name: list(parameters) for name, parameters in groups.items()}
        self._config, self._scales = config, scales
        self.reset(config.lr)

    def reset(self, lr: float) -> None:
        """Forget all moments, and go on with this learning rate."""
        self.optimizers = {
            name: adam(parameters, self._config, lr, self._scales) for name, parameters in self.groups.items()
        }

    def backward(self, loss: Tensor, groups: Iterable[str]) -> None:
        """Add the gradient of loss to the parameters of these groups, and to no others."""
        loss.backward(inputs=[parameter for name in groups for parameter in self.groups[name]])

    def step(self, groups: Iterable[str]) -> None:
        """Step these groups and clear their gradients."""
        for name in groups:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
