"""Where gradients go: averaged over the ranks, then into Adam; by torch, or by DeepSpeed."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dcvae_fast.config import Config, OptimConfig
from dcvae_fast.errors import DivergedError
from dcvae_fast.training.optim import Moments, adam, choose, read_moments, write_moments
from dcvae_fast.training.ranks import ALONE, Ranks

Parameters = Sequence[nn.Parameter]


class Unit(Protocol):
    """Parameters that are always stepped together, and their Adam."""

    parameters: Parameters

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Step all parameters, given the gradient of each."""
        ...

    def moments(self) -> list[Moments]:
        """Of each parameter, whole, the same on all ranks."""
        ...

    def close(self) -> None:
        """Let go of the parameters; what they are stays."""
        ...


class TorchUnit:
    """With an optimizer of torch's kind, and gradients that are means already."""

    def __init__(self, parameters: Parameters, optimizer: Any, moments: Sequence[Moments] | None):
        self.parameters, self._optimizer = parameters, optimizer
        if moments is not None:
            self._load(moments)

    def step(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def moments(self) -> list[Moments]:
        group_of = self._group_of()
        return [read_moments(self._optimizer, group_of[p], p) for p in self.parameters]

    def _load(self, moments: Sequence[Moments]) -> None:
        group_of = self._group_of()
        for parameter, found in zip(self.parameters, moments, strict=True):
            write_moments(self._optimizer, group_of[parameter], parameter, found)

    def _group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {p: group for group in self._optimizer.param_groups for p in group["params"]}

    def close(self) -> None:
        pass


class LossScale:
    """What float16 losses are multiplied by, lest small gradients vanish; follows what the gradients bear."""

    def __init__(self, config: OptimConfig):
        self.value, self._window, self._steps = config.loss_scale, config.loss_scale_window, 0
        self._losses: list[Tensor] = []

    def scaled(self, loss: Tensor) -> Tensor:
        self._losses.append(loss.detach())
        return loss * self.value

    def unscale(self, gradients: list[Tensor], ranks: Ranks) -> bool:
        """Divide gradients by the scale, in place, and adapt it; whether all are finite, on all ranks. Waits for the
        device. Where a loss is not finite itself, the scale is not to blame.

        Raises:
            DivergedError: gradients overflow whatever the scale.
        """
        torch._foreach_mul_(gradients, 1 / self.value)
        sound = torch.stack(self._losses).isfinite().all()
        finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        self._losses = []
        worst = ranks.worst(0 if finite else 1 if sound else 2)
        if worst == 0:
            self._steps += 1
            if self._steps % self._window == 0:
                self.value *= 2
            return True
        if worst == 1:
            self.value, self._steps = self.value / 2, 0
            with ranks.together():
                if self.value < 2**-24:
                    raise DivergedError("the gradients are no finite numbers in float16, at any loss scale.")
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._steps = state["value"], state["steps"]


class Engine:
    """Steps whatever has received a gradient, and nothing else: each parameter keeps one Adam state through all kinds
    of steps, and one without a gradient keeps its moments and its step count.

    Parameters are told apart into units by themselves: those that begin together are one, which is cut in two when a
    step leaves out a part of it. So an optimizer that steps whole units, filling in zeros for missing gradients, as
    DeepSpeed's do, is right too.
    """

    settings: Mapping[str, Any] = {}
    """of the library that does it"""

    def __init__(
        self,
        networks: nn.Module,
        groups: Mapping[str, Iterable[nn.Parameter]],
        config: Config,
        ranks: Ranks = ALONE,
        scales: Mapping[Tensor, float] | None = None,
    ):
        """
        Args:
            networks: whose parameters are stepped; names in the state are its.
            groups: of parameters, by name, for `backward`.
            scales: see `adam`.
        """
        self.groups = {name: list(parameters) for name, parameters in groups.items()}
        self._names = {parameter: name for name, parameter in networks.named_parameters()}
        self._config, self._scales, self._ranks = config.optim, scales, ranks
        self.loss_scale = LossScale(config.optim) if config.train.precision == "float16" else None
        self._units: list[Unit] = []
        self.layout = 0  # changes with the units
        self.reset(config.optim.lr, config.train.batch)

    def describe(self) -> str:
        """What it is, in words."""
        return "torch" if self._ranks.count == 1 else f"torch, averaged over {self._ranks.count} ranks"

    @property
    def adam(self) -> str:
        """Whose Adam: see `choose`."""
        return choose(self._config.fused, next(iter(self._names)).device)

    def reset(self, lr: float, batch: int) -> None:
        """Forget all moments, and go on with this learning rate, and batch on each rank."""
        for unit in self._units:
            unit.close()
        self._units, self._lr, self._batch = [], lr, batch
        self.layout += 1
        self._loaded: dict[nn.Parameter, Moments] = {}  # moments of parameters that are in no unit yet

    def backward(self, loss: Tensor, groups: Iterable[str]) -> None:
        """Add the gradient of loss to the parameters of these groups, and to no others."""
        if self.loss_scale is not None:
            loss = self.loss_scale.scaled(loss)
        self._differentiate(loss, [parameter for name in groups for parameter in self.groups[name]])

    def _differentiate(self, loss: Tensor, parameters: Parameters) -> None:
        loss.backward(inputs=parameters)

    def step(self) -> None:
        """Step what has gradients, with their means over all ranks, and clear them."""
        gradients = {}
        for group in self.groups.values():
            for parameter in group:
                if parameter.grad is not None:
                    gradients[parameter], parameter.grad = parameter.grad, None
        if self.loss_scale is not None and not self.loss_scale.unscale(list(gradients.values()), self._ranks):
            return
        self._average(list(gradients.values()))
        for unit in self._units_of(gradients):
            unit.step([gradients[parameter] for parameter in unit.parameters])

    def _average(self, gradients: Sequence[Tensor]) -> None:
        self._ranks.average_(gradients)

    def _units_of(self, stepped: Mapping[nn.Parameter, Tensor]) -> list[Unit]:
        """Units that hold these parameters and no others; made where there are none yet."""
        found = []
        for unit in self._units:
            inside = [parameter in stepped for parameter in unit.parameters]
            if all(inside) or not any(inside):
                found.append(unit)
                continue
            moments = unit.moments()
            unit.close()
            for side in (True, False):
                part = [i for i, is_inside in enumerate(inside) if is_inside is side]
                found.append(self._make([unit.parameters[i] for i in part], [moments[i] for i in part]))
        known = {parameter for unit in found for parameter in unit.parameters}
        new = defaultdict(list)  # those of one step count go together: a unit has only one
        for parameter in stepped:
            if parameter not in known:
                moments = self._loaded.pop(parameter, None)
                new[moments and moments.step].append((parameter, moments))
        for step, pairs in new.items():
            parameters, moments = zip(*pairs, strict=True)
            found.append(self._make(parameters, None if step is None else moments))
        if len(found) != len(self._units):  # units are only cut or added
            self._units = found
            self.layout += 1
        return [unit for unit in found if unit.parameters[0] in stepped]

    def _make(self, parameters: Parameters, moments: Sequence[Moments] | None) -> Unit:
        return TorchUnit(parameters, self._adam(parameters), moments)

    def _adam(self, parameters: Parameters) -> torch.optim.Optimizer:
        return adam(parameters, self._config, self._lr, self._scales)

    def moments(self) -> dict[nn.Parameter, Moments]:
        """Of all parameters that have any; whole, whatever rank holds them."""
        found = {p: moments for unit in self._units for p, moments in zip(unit.parameters, unit.moments(), strict=True)}
        return self._loaded | found

    def state_dict(self) -> dict[str, Any]:
        """Moments by the parameter's name, whatever the optimizer and the number of ranks."""
        moments = {self._names[parameter]: found._asdict() for parameter, found in self.moments().items()}
        scale = None if self.loss_scale is None else self.loss_scale.state_dict()
        return {"moments": moments, "loss_scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; `reset` comes first."""
        named = {name: parameter for parameter, name in self._names.items()}
        self._loaded = {named[name]: Moments(**found) for name, found in state["moments"].items()}
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
