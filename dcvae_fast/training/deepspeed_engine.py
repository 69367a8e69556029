"""Engines for optimizers with one step count for all their parameters: DeepSpeed's, with ZeRO, and Apex's.

Such an optimizer steps all its parameters together and treats a missing gradient as zeros, which decays the moments.
Parameters are therefore split at run time into units that are always stepped together, each with its own optimizer.
"""

import gc
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcvae_fast.config import Config
from dcvae_fast.distributed import Ranks, init_process_group
from dcvae_fast.errors import ConfigError, reason
from dcvae_fast.training.engine import Engine, Parameters
from dcvae_fast.training.optim import Moments, adam, read_moments, write_moments
from dcvae_fast.training.schedule import schedule_at, stages

# Settings that a user's JSON can choose: how DeepSpeed communicates and what it reports. Others must match the recipe.
ALLOWED = {
    "allgather_bucket_size": int,
    "comms_logger": dict,
    "disable_allgather": bool,
    "dump_state": bool,
    "memory_breakdown": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.allgather_partitions": bool,
    "zero_optimization.contiguous_gradients": bool,
    "zero_optimization.ignore_unused_parameters": bool,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.reduce_scatter": bool,
    "zero_optimization.round_robin_gradients": bool,
}
EXPECTED = {int: "a number from 1 on", bool: "true or false", dict: "an object"}
ALTERNATIVES = {
    "optimizer": "use the recipe's section optim",
    "scheduler": "use optim.lr and growth.lr",
    "amp": "use train.precision",
    "torch_autocast": "use train.precision",
    "activation_checkpointing": "use train.checkpoint_activations",
}
NO_STAGE_3 = (
    "stage 3 shards the weights too, but each iteration runs all networks several times, updates two EMAs and computes"
    " spectral norms, and would gather the weights each time; they take at most 92 MB per network"
)


class Unit:
    """Parameters that are always stepped together, and their optimizer."""

    def __init__(self, parameters: Parameters, optimizer: Any, moments: Sequence[Moments] | None):
        self.parameters, self._optimizer = parameters, optimizer
        if moments is not None:
            self._load(moments)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Step all parameters with these gradients, one per parameter."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def moments(self) -> list[Moments]:
        """Return the full moments of each parameter, equal on all ranks."""
        group_of = self._group_of()
        return [read_moments(self._optimizer, group_of[p], p) for p in self.parameters]

    def _load(self, moments: Sequence[Moments]) -> None:
        group_of = self._group_of()
        for parameter, parameter_moments in zip(self.parameters, moments, strict=True):
            write_moments(self._optimizer, group_of[parameter], parameter, parameter_moments)

    def _group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {p: group for group in self._optimizer.param_groups for p in group["params"]}

    def close(self) -> None:
        """Release the parameters, which keep their values."""


MakeUnit = Callable[[Parameters, Sequence[Moments] | None], Unit]


class Units(torch.optim.Optimizer):
    """Optimizer that steps the units whose parameters have gradients.

    Parameters that receive their first gradient in the same step form a unit. A unit is split when a later step has
    gradients for only some of its parameters.

    Attributes:
        units: the current units
        loaded: loaded moments of parameters that are not in a unit yet
    """

    def __init__(self, parameters: Parameters, make_unit: MakeUnit):
        super().__init__(parameters, {})
        self._make_unit = make_unit
        self.units: list[Unit] = []
        self.loaded: dict[nn.Parameter, Moments] = {}

    def step(self, closure: None = None) -> None:
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        self.zero_grad()  # otherwise ZeRO would add to the gradients
        for unit in self._units_of(gradients):
            unit.step([gradients[parameter] for parameter in unit.parameters])

    def _units_of(self, gradients: Mapping[nn.Parameter, Tensor]) -> list[Unit]:
        """Return units with exactly the parameters that have gradients. Split and create units as needed."""
        units = []
        for unit in self.units:
            has_gradient = [parameter in gradients for parameter in unit.parameters]
            if all(has_gradient) or not any(has_gradient):
                units.append(unit)
                continue
            moments = unit.moments()
            unit.close()
            for side in (True, False):
                part = [i for i, flag in enumerate(has_gradient) if flag is side]
                units.append(self._make_unit([unit.parameters[i] for i in part], [moments[i] for i in part]))
        known = {parameter for unit in units for parameter in unit.parameters}
        new = defaultdict(list)  # by step count, because a unit has only one
        for parameter in gradients:
            if parameter not in known:
                moments = self.loaded.pop(parameter, None)
                new[moments and moments.step].append((parameter, moments))
        for step, pairs in new.items():
            parameters, moments = zip(*pairs, strict=True)
            units.append(self._make_unit(parameters, None if step is None else moments))
        self.units = units
        return [unit for unit in units if unit.parameters[0] in gradients]

    def moments(self) -> dict[nn.Parameter, Moments]:
        in_units = {p: m for unit in self.units for p, m in zip(unit.parameters, unit.moments(), strict=True)}
        return self.loaded | in_units

    def close(self) -> None:
        for unit in self.units:
            unit.close()
        self.units = []


class UnitEngine(Engine):
    """Engine that steps parameters in units: for Apex's Adam, or DeepSpeed's Adam without DeepSpeed's engine."""

    optimizer: Units

    def reset(self, lr: float, batch: int) -> None:
        if hasattr(self, "optimizer"):
            self.optimizer.close()
        self._lr, self._batch = lr, batch
        self.optimizer = Units(self.parameters, self._make_unit)

    def _make_unit(self, parameters: Parameters, moments: Sequence[Moments] | None) -> Unit:
        return Unit(parameters, self._adam_of(parameters), moments)

    def _adam_of(self, parameters: Parameters) -> torch.optim.Optimizer:
        return adam(parameters, self._config, self._lr, self._scales)

    def moments(self) -> dict[nn.Parameter, Moments]:
        return self.optimizer.moments()

    def _load_moments(self, moments: Mapping[nn.Parameter, Moments]) -> None:
        self.optimizer.loaded = dict(moments)


class DeepSpeedEngine(UnitEngine):
    """Engine whose units are DeepSpeed engines, each with the loss Σ ⟨gradient, parameter⟩.

    With this loss, one objective can train parameters of several DeepSpeed engines, and several objectives can train
    the same one. Weights stay in float32; autocast selects the operations in lower precision. Weights lose their
    channels_last layout, because ZeRO's flat buffers do not keep it.
    """

    def __init__(self, *args: Any, settings: dict[str, Any], **kwargs: Any):
        """
        Args:
            settings: DeepSpeed's configuration; see `deepspeed_settings`.

        Raises:
            ConfigError: DeepSpeed is not installed.
        """
        networks = args[0]
        if next(networks.parameters()).device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed moves the weights to an available GPU
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(
                f"train.engine is deepspeed, which cannot be imported ({reason(error)}): pip install"
                " 'dcvae_fast[train]'."
            ) from error
        deepspeed.utils.logger.setLevel(logging.WARNING)
        # On CPUs DeepSpeed would first compile its own all-reduce, which requires a compiler and takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed, self.settings = deepspeed, settings
        super().__init__(*args, **kwargs)
        if not dist.is_initialized():  # DeepSpeed requires a process group, even for a single process
            init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # also read by DeepSpeed

    def describe(self) -> str:
        stage = self.settings["zero_optimization"]["stage"]
        ranks = f"{self.ranks.world_size} rank{'s' if self.ranks.world_size > 1 else ''}"
        return f"DeepSpeed {self._deepspeed.__version__}, ZeRO stage {stage}, {ranks}"

    def reset(self, lr: float, batch: int) -> None:
        super().reset(lr, batch)
        gc.collect()  # DeepSpeed's engines are reference cycles, and hold copies of the weights

    def _differentiate(self, loss: Tensor, parameters: Parameters) -> None:
        """Compute gradients with autograd.grad, because `backward` would trigger ZeRO's hooks."""
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _average(self, gradients: Sequence[Tensor]) -> None:
        """Leave averaging to DeepSpeed, but make all ranks skip the step if float16 gradients overflow on one."""
        if self.scaler.is_enabled():
            is_finite = torch.stack(torch._foreach_norm(list(gradients))).isfinite().all()
            if self.ranks.all_reduce_max(0 if is_finite else 1):
                gradients[0].fill_(math.inf)

    def _make_unit(self, parameters: Parameters, moments: Sequence[Moments] | None) -> Unit:
        elements = sum(parameter.numel() for parameter in parameters)
        # DeepSpeed allocates full buckets, by default 2 GB for each unit.
        zero = {"reduce_bucket_size": elements, **self.settings["zero_optimization"]}
        settings = {**self.settings, "train_micro_batch_size_per_gpu": self._batch, "zero_optimization": zero}
        for parameter in parameters:  # `contiguous()` would keep the channels_last strides of 1×1 convolutions
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        engine, *_ = self._deepspeed.initialize(
            model=_InnerProduct(parameters),
            optimizer=self._adam_of(parameters),
            config=settings,
            dist_init_required=False,
        )
        unit_class = _ZeroUnit if zero["stage"] else _DeepSpeedUnit
        return unit_class(engine, parameters, self.ranks, moments)


class _InnerProduct(nn.Module):
    """Module that returns the loss Σ ⟨gradient, parameter⟩, whose gradients are the given ones."""

    def __init__(self, parameters: Parameters):
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.weights, gradients, strict=True)]).sum()


class _DeepSpeedUnit(Unit):
    """Unit with a DeepSpeed engine at stage 0, where each rank holds all moments."""

    def __init__(self, engine: Any, parameters: Parameters, ranks: Ranks, moments: Sequence[Moments] | None):
        self._engine, self._ranks = engine, ranks
        super().__init__(parameters, engine.optimizer, moments)

    def step(self, gradients: Sequence[Tensor]) -> None:
        self._engine.backward(self._engine(gradients))
        self._engine.step()

    def close(self) -> None:
        self._engine.destroy()
        del self._engine, self._optimizer


class _ZeroUnit(_DeepSpeedUnit):
    """Unit with a DeepSpeed engine at stage 1 or 2: Adam steps this rank's partition of each group's flat weights."""

    def __init__(self, engine: Any, parameters: Parameters, ranks: Ranks, moments: Sequence[Moments] | None):
        zero = engine.optimizer
        # The fragments of parameters on this rank: group, parameter, range in the parameter, range in the partition.
        self._fragments = [
            (group, parameter, _range(mapping.lp_fragment_address), _range(mapping.hp_fragment_address))
            for group, members in zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True)
            for parameter in members
            if (mapping := parameter._hp_mapping) is not None
        ]
        super().__init__(engine, parameters, ranks, moments)

    def close(self) -> None:
        zero = self._optimizer
        super().close()
        # DeepSpeed destroys an engine a second time when it is garbage-collected, which would clear `_hp_mapping` of
        # parameters that belong to a newer engine by then.
        for members in zero.bit16_groups:
            members.clear()

    def moments(self) -> list[Moments]:
        adam, step = self._optimizer.optimizer, 0
        full = {p: torch.zeros(2, p.numel(), device=p.device) for p in self.parameters}
        for group, parameter, parameter_range, partition_range in self._fragments:
            (partition,) = group["params"]
            step, *averages = read_moments(adam, group, partition)
            for target, average in zip(full[parameter], averages, strict=True):
                target[parameter_range] = average[partition_range]
        for x in full.values():  # one at a time, to save memory
            self._ranks.all_reduce_sum_([x])
        step = self._ranks.all_reduce_max(step)  # a rank can have no fragments
        return [Moments(step, *(x.view(p.shape) for x in full[p])) for p in self.parameters]

    def _load(self, moments: Sequence[Moments]) -> None:
        adam, moments_of = self._optimizer.optimizer, dict(zip(self.parameters, moments, strict=True))
        for group in adam.param_groups:
            (partition,) = group["params"]
            zeros = torch.zeros_like(partition, requires_grad=False)
            write_moments(adam, group, partition, Moments(moments[0].step, zeros, zeros))
        for group, parameter, parameter_range, partition_range in self._fragments:
            (partition,) = group["params"]
            for name in ("exp_avg", "exp_avg_sq"):
                values = getattr(moments_of[parameter], name).flatten()[parameter_range]
                adam.state[partition][name][partition_range] = values


def _range(address: Any) -> slice:
    return slice(address.start, address.start + address.numel)


def deepspeed_settings(config: Config, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: settings determined by the recipe, and the allowed ones of the user's JSON.

    Raises:
        ConfigError: the file cannot be read, contradicts the recipe, or has a setting that is not allowed.
    """
    path = config.train.deepspeed_config
    user = {} if path is None else _read(path)
    stage = _stage(path, user.pop("zero_optimization.stage", "auto"), config.train.zero)
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 1,  # the engine accumulates gradients itself
        "gradient_clipping": 0.0,  # the default is 1
        "zero_optimization": {"stage": stage},
    }
    if stage:
        settings["zero_optimization"]["compute_grad_norm"] = False  # would wait for the device
    determined = list(_determined(config, world_size))
    for name, value in user.items():
        for expected, why in [(expected, why) for known, expected, why in determined if known == name]:
            if value not in ("auto", expected):
                raise ConfigError(f"{path}: {name} is {value!r}; it must be {expected!r} ({why}).")
        if name in {known for known, *_ in determined}:
            continue
        if name not in ALLOWED:
            why = ALTERNATIVES.get(name, "it has no effect, or changes the results of the recipe")
            raise ConfigError(f"{path}: {name} cannot be set here: {why}.")
        kind, (section, _, key) = ALLOWED[name], name.rpartition(".")
        if value == "auto":
            continue
        if type(value) is not kind or (kind is int and value < 1):
            raise ConfigError(f"{path}: {name} is {value!r}; it must be {EXPECTED[kind]}.")
        (settings[section] if section else settings)[key] = value
    return settings


def _read(path: str) -> dict[str, Any]:
    """Return the settings in a JSON file. Settings in sections that are checked are named SECTION.NAME."""
    try:
        user = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"train.deepspeed_config: {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"train.deepspeed_config: {path} is not valid JSON ({error}).") from error
    if not isinstance(user, dict):
        raise ConfigError(f"train.deepspeed_config: {path} must contain a JSON object.")
    for section in ("zero_optimization", "bf16", "fp16"):
        settings = user.pop(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: {section} must be an object.")
        user |= {f"{section}.{name}": value for name, value in settings.items()}
    return user


def _stage(path: str | None, value: Any, zero: int | None) -> int:
    """Return ZeRO's stage from the user's JSON or `train.zero`, which must agree if both are set."""
    if value == 3:
        raise ConfigError(f"{path}: zero_optimization.stage is 3; it must be 0, 1 or 2: {NO_STAGE_3}.")
    if value == "auto":
        return zero or 0
    if isinstance(value, bool) or value not in (0, 1, 2) or zero not in (None, value):
        expected = "0, 1 or 2" if zero is None else f"{zero}, the value of train.zero"
        raise ConfigError(f"{path}: zero_optimization.stage is {value!r}; it must be {expected}.")
    return value


def _determined(config: Config, world_size: int) -> Iterator[tuple[str, Any, str]]:
    """Yield the DeepSpeed settings that the recipe determines: name, value, and the reason for the value."""
    train = config.train
    cut = "" if train.micro_batch is None else " with train.micro_batch"
    for stage in stages(config):
        batch = schedule_at(config, stage.begin, world_size).batch
        micro = min(train.micro_batch or batch, batch)
        at = f" at {stage.resolution}×{stage.resolution}" if config.model.grows else ""
        setting = "growth.batch" if config.model.grows else "train.batch"
        why = f"{setting} on {world_size} rank{'s'[: world_size > 1]}{cut}{at}"
        yield "train_batch_size", batch * world_size, why
        yield "train_micro_batch_size_per_gpu", micro, why
        yield "gradient_accumulation_steps", -(-batch // micro), why
    for section, precision in (("bf16", "bfloat16"), ("fp16", "float16")):
        yield f"{section}.enabled", train.precision == precision, f"train.precision is {train.precision}"
    yield "fp16.loss_scale", 0, "the loss scale is dynamic"
    yield "fp16.initial_scale_power", math.log2(config.optim.loss_scale), "log2 of optim.loss_scale"
    yield "fp16.loss_scale_window", config.optim.loss_scale_window, "optim.loss_scale_window"
    yield "gradient_clipping", 0, "gradients are not clipped"
    yield "communication_data_type", "fp32", "gradients are float32"
