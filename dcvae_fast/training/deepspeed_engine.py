"""Training by optimizers with one step count for all their parameters: DeepSpeed's, with ZeRO, and Apex's.

Such an optimizer steps all its parameters together and takes a missing gradient for zeros, which decays moments. The
parameters are therefore split, at run time, into units that are always stepped together, each with its own optimizer.
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

# What a user's JSON may say besides what is compared with the recipe: how DeepSpeed communicates and what it reports.
FREE = {
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
WANTED = {int: "a number from 1 on", bool: "true or false", dict: "an object"}
ELSEWHERE = {
    "optimizer": "Adam's settings are those of the recipe's section optim",
    "scheduler": "the learning rate is optim.lr and growth.lr",
    "amp": "precision is train.precision",
    "torch_autocast": "precision is train.precision",
    "activation_checkpointing": "that is train.checkpoint_activations",
}
NO_STAGE_3 = (
    "stage 3 cuts up the weights too, but each iteration runs through all networks several times, moves two averages"
    " towards them and takes their spectral norms, and would gather them for each; they take 92 MB a network at most"
)


class Unit:
    """Parameters that are always stepped together, and their optimizer."""

    def __init__(self, parameters: Parameters, optimizer: Any, moments: Sequence[Moments] | None):
        self.parameters, self._optimizer = parameters, optimizer
        if moments is not None:
            self._load(moments)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Step all parameters, given the gradient of each."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def moments(self) -> list[Moments]:
        """Return the moments of each parameter, whole, the same on all ranks."""
        group_of = self._group_of()
        return [read_moments(self._optimizer, group_of[p], p) for p in self.parameters]

    def _load(self, moments: Sequence[Moments]) -> None:
        group_of = self._group_of()
        for parameter, of_parameter in zip(self.parameters, moments, strict=True):
            write_moments(self._optimizer, group_of[parameter], parameter, of_parameter)

    def _group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {p: group for group in self._optimizer.param_groups for p in group["params"]}

    def close(self) -> None:
        """Release the parameters, which keep their values."""


MakeUnit = Callable[[Parameters, Sequence[Moments] | None], Unit]


class Units(torch.optim.Optimizer):
    """Steps the units whose parameters have gradients.

    Parameters that receive their first gradient together form a unit, which is split when a step leaves out some of
    them.
    """

    def __init__(self, parameters: Parameters, make: MakeUnit):
        super().__init__(parameters, {})
        self._make = make
        self.units: list[Unit] = []
        self.loaded: dict[nn.Parameter, Moments] = {}
        """moments of parameters that are in no unit yet"""

    def step(self, closure: None = None) -> None:
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        self.zero_grad()  # ZeRO would add to them
        for unit in self._units_of(gradients):
            unit.step([gradients[parameter] for parameter in unit.parameters])

    def _units_of(self, stepped: Mapping[nn.Parameter, Tensor]) -> list[Unit]:
        """Return the units that hold these parameters and no others; split and make units as needed."""
        units = []
        for unit in self.units:
            inside = [parameter in stepped for parameter in unit.parameters]
            if all(inside) or not any(inside):
                units.append(unit)
                continue
            moments = unit.moments()
            unit.close()
            for side in (True, False):
                part = [i for i, is_inside in enumerate(inside) if is_inside is side]
                units.append(self._make([unit.parameters[i] for i in part], [moments[i] for i in part]))
        known = {parameter for unit in units for parameter in unit.parameters}
        new = defaultdict(list)  # by step count: a unit has only one
        for parameter in stepped:
            if parameter not in known:
                moments = self.loaded.pop(parameter, None)
                new[moments and moments.step].append((parameter, moments))
        for step, pairs in new.items():
            parameters, moments = zip(*pairs, strict=True)
            units.append(self._make(parameters, None if step is None else moments))
        self.units = units
        return [unit for unit in units if unit.parameters[0] in stepped]

    def moments(self) -> dict[nn.Parameter, Moments]:
        held = {p: moments for unit in self.units for p, moments in zip(unit.parameters, unit.moments(), strict=True)}
        return self.loaded | held

    def close(self) -> None:
        for unit in self.units:
            unit.close()
        self.units = []


class UnitEngine(Engine):
    """Step parameters in units: for Apex's Adam, and for DeepSpeed's Adam without DeepSpeed's engine."""

    optimizer: Units

    def reset(self, lr: float, batch: int) -> None:
        if hasattr(self, "optimizer"):
            self.optimizer.close()
        self._lr, self._batch = lr, batch
        self.optimizer = Units(self.parameters, self._make)

    def _make(self, parameters: Parameters, moments: Sequence[Moments] | None) -> Unit:
        return Unit(parameters, self._adam_of(parameters), moments)

    def _adam_of(self, parameters: Parameters) -> torch.optim.Optimizer:
        return adam(parameters, self._config, self._lr, self._scales)

    def moments(self) -> dict[nn.Parameter, Moments]:
        return self.optimizer.moments()

    def _load_moments(self, moments: Mapping[nn.Parameter, Moments]) -> None:
        self.optimizer.loaded = dict(moments)


class DeepSpeedEngine(UnitEngine):
    """An engine whose units are DeepSpeed engines, each with the loss Σ ⟨gradient, parameter⟩.

    A loss may thus train parameters of several DeepSpeed engines, and a DeepSpeed engine may be trained by several
    losses. Weights stay float32; autocast decides what is computed in lower precision. They lose the channels-last
    layout, which ZeRO's flat buffers do not keep.
    """

    def __init__(self, *args: Any, settings: dict[str, Any], **kwargs: Any):
        """
        Args:
            settings: for DeepSpeed; see `deepspeed_settings`.

        Raises:
            ConfigError: DeepSpeed is not installed.
        """
        networks = args[0]
        if next(networks.parameters()).device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it would move the weights to a GPU, if there is one
        try:
            import deepspeed
        except ImportError as error:
            why = f"which cannot be imported ({reason(error)}): pip install 'dcvae_fast[train]'"
            raise ConfigError(f"train.engine is deepspeed, {why}.") from error
        deepspeed.utils.logger.setLevel(logging.WARNING)
        # On CPUs it would first compile an all-reduce of its own, which takes a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed, self.settings = deepspeed, settings
        super().__init__(*args, **kwargs)
        if not dist.is_initialized():  # DeepSpeed needs the others, even where there are none
            init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # it reads this, too

    def describe(self) -> str:
        stage = self.settings["zero_optimization"]["stage"]
        ranks = f"{self.ranks.world_size} rank{'s' if self.ranks.world_size > 1 else ''}"
        return f"DeepSpeed {self._deepspeed.__version__}, ZeRO stage {stage}, {ranks}"

    def reset(self, lr: float, batch: int) -> None:
        super().reset(lr, batch)
        gc.collect()  # DeepSpeed's engines refer to themselves, and hold copies of the weights

    def _differentiate(self, loss: Tensor, parameters: Parameters) -> None:
        """Not by `backward`: ZeRO's hooks would take the gradients, before the unit's own loss brings them."""
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _average(self, gradients: Sequence[Tensor]) -> None:
        """Leave that to DeepSpeed. But if float16 gradients overflow on one rank, no rank may step."""
        if self.scaler.is_enabled():
            is_finite = torch.stack(torch._foreach_norm(list(gradients))).isfinite().all()
            if self.ranks.all_reduce_max(0 if is_finite else 1):
                gradients[0].fill_(math.inf)

    def _make(self, parameters: Parameters, moments: Sequence[Moments] | None) -> Unit:
        elements = sum(parameter.numel() for parameter in parameters)
        # Buckets are allocated whole: by default 2 GB for each unit.
        zero = {"reduce_bucket_size": elements, **self.settings["zero_optimization"]}
        settings = {**self.settings, "train_micro_batch_size_per_gpu": self._batch, "zero_optimization": zero}
        for parameter in parameters:  # DeepSpeed wants rows of stride 1, in 1×1 convolutions too
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        engine, *_ = self._deepspeed.initialize(
            model=_InnerProduct(parameters),
            optimizer=self._adam_of(parameters),
            config=settings,
            dist_init_required=False,
        )
        kind = _ZeroUnit if zero["stage"] else _DeepSpeedUnit
        return kind(engine, parameters, self.ranks, moments)


class _InnerProduct(nn.Module):
    """Parameters; given a tensor for each, a loss with these gradients."""

    def __init__(self, parameters: Parameters):
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.held, gradients, strict=True)]).sum()


class _DeepSpeedUnit(Unit):
    """An engine of DeepSpeed's, at stage 0: each rank has all moments."""

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
    """The same from stage 1 on: Adam steps this rank's partition of each group's weights, laid one after another."""

    def __init__(self, engine: Any, parameters: Parameters, ranks: Ranks, moments: Sequence[Moments] | None):
        zero = engine.optimizer
        # This rank's part of each parameter that it has a part of: the group; where it is in the parameter; where in
        # the partition.
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
        # DeepSpeed destroys an engine again when it is garbage-collected. That would clear `_hp_mapping` of parameters
        # that belong to a newer engine by then.
        for members in zero.bit16_groups:
            members.clear()

    def moments(self) -> list[Moments]:
        adam, step = self._optimizer.optimizer, 0
        whole = {p: torch.zeros(2, p.numel(), device=p.device) for p in self.parameters}
        for group, parameter, here, there in self._fragments:
            (partition,) = group["params"]
            step, *averages = read_moments(adam, group, partition)
            for mine, average in zip(whole[parameter], averages, strict=True):
                mine[here] = average[there]
        for x in whole.values():  # one by one, to hold little at a time
            self._ranks.all_reduce_sum_([x])
        step = self._ranks.all_reduce_max(step)  # a rank may have no part of any
        return [Moments(step, *(x.view(p.shape) for x in whole[p])) for p in self.parameters]

    def _load(self, moments: Sequence[Moments]) -> None:
        adam, of = self._optimizer.optimizer, dict(zip(self.parameters, moments, strict=True))
        for group in adam.param_groups:
            (partition,) = group["params"]
            zeros = torch.zeros_like(partition, requires_grad=False)
            write_moments(adam, group, partition, Moments(moments[0].step, zeros, zeros))
        for group, parameter, here, there in self._fragments:
            (partition,) = group["params"]
            for name in ("exp_avg", "exp_avg_sq"):
                adam.state[partition][name][there] = getattr(of[parameter], name).flatten()[here]


def _range(address: Any) -> slice:
    return slice(address.start, address.start + address.numel)


def deepspeed_settings(config: Config, ranks: int) -> dict[str, Any]:
    """Return the settings of DeepSpeed: those that the recipe decides, and the rest of the user's JSON.

    Raises:
        ConfigError: the file cannot be read, contradicts the recipe, or has a setting without effect here.
    """
    path = config.train.deepspeed_config
    user = {} if path is None else _read(path)
    stage = _stage(path, user.pop("zero_optimization.stage", "auto"), config.train.zero)
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 1,  # the engine adds gradients up itself
        "gradient_clipping": 0.0,  # the default is 1
        "zero_optimization": {"stage": stage},
    }
    if stage:
        settings["zero_optimization"]["compute_grad_norm"] = False  # it would wait for the device
    decided = list(_decided(config, ranks))
    for name, theirs in user.items():
        for ours, setting in [(ours, setting) for known, ours, setting in decided if known == name]:
            if theirs not in ("auto", ours):
                raise ConfigError(f"{path}: {name} is {theirs!r}, but {setting} makes it {ours!r}.")
        if name in {known for known, *_ in decided}:
            continue
        if name not in FREE:
            why = ELSEWHERE.get(name, "it has no effect, or changes what the recipe computes")
            raise ConfigError(f"{path}: {name} cannot be set here: {why}.")
        kind, (section, _, key) = FREE[name], name.rpartition(".")
        if theirs == "auto":
            continue
        if type(theirs) is not kind or (kind is int and theirs < 1):
            raise ConfigError(f"{path}: {name} is {theirs!r}; it must be {WANTED[kind]}.")
        (settings[section] if section else settings)[key] = theirs
    return settings


def _read(path: str) -> dict[str, Any]:
    """Return the settings in a JSON file; those in the sections that are checked are named SECTION.NAME."""
    try:
        user = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"train.deepspeed_config: {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"train.deepspeed_config: {path} is not valid JSON ({error}).") from error
    if not isinstance(user, dict):
        raise ConfigError(f"train.deepspeed_config: {path} must hold a JSON object.")
    for section in ("zero_optimization", "bf16", "fp16"):
        settings = user.pop(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: {section} must be an object.")
        user |= {f"{section}.{name}": value for name, value in settings.items()}
    return user


def _stage(path: str | None, theirs: Any, ours: int | None) -> int:
    """Return ZeRO's stage, which the user's JSON may give, or `train.zero`, or both alike."""
    if theirs == 3:
        raise ConfigError(f"{path}: zero_optimization.stage is 3; it must be 0, 1 or 2: {NO_STAGE_3}.")
    if theirs == "auto":
        return ours or 0
    if isinstance(theirs, bool) or theirs not in (0, 1, 2) or ours not in (None, theirs):
        either = "0, 1 or 2" if ours is None else f"{ours}, as train.zero is"
        raise ConfigError(f"{path}: zero_optimization.stage is {theirs!r}; it must be {either}.")
    return theirs


def _decided(config: Config, ranks: int) -> Iterator[tuple[str, Any, str]]:
    """Yield settings of DeepSpeed that the recipe decides: name, value, and what in the recipe decides it."""
    train = config.train
    cut = "" if train.micro_batch is None else ", with train.micro_batch,"
    for stage in stages(config):
        batch = schedule_at(config, stage.begin, ranks).batch
        micro = min(train.micro_batch or batch, batch)
        at = f" at {stage.resolution}×{stage.resolution}" if config.model.grows else ""
        batches = "growth.batch" if config.model.grows else "train.batch"
        setting = f"{batches} on {ranks} rank{'s'[: ranks > 1]}{cut}{at}"
        yield "train_batch_size", batch * ranks, setting
        yield "train_micro_batch_size_per_gpu", micro, setting
        yield "gradient_accumulation_steps", -(-batch // micro), setting
    for section, precision in (("bf16", "bfloat16"), ("fp16", "float16")):
        yield f"{section}.enabled", train.precision == precision, f"train.precision {train.precision}"
    yield "fp16.loss_scale", 0, "the recipe's dynamic loss scale"
    yield "fp16.initial_scale_power", math.log2(config.optim.loss_scale), "optim.loss_scale"
    yield "fp16.loss_scale_window", config.optim.loss_scale_window, "optim.loss_scale_window"
    yield "gradient_clipping", 0, "the method, which clips none,"
    yield "communication_data_type", "fp32", "the type of the gradients"
