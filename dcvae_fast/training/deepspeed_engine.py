"""The engine by DeepSpeed: its collectives, and ZeRO, which cuts Adam's moments up among the ranks."""

import gc
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError, reason
from dcvae_fast.training.engine import Engine, Parameters, TorchUnit, Unit
from dcvae_fast.training.optim import Moments, read_moments, write_moments
from dcvae_fast.training.ranks import Ranks, connect
from dcvae_fast.training.schedule import point, stages

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
}
ZERO_FREE = {
    "allgather_bucket_size": int,
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "ignore_unused_parameters": bool,
    "overlap_comm": bool,
    "reduce_bucket_size": int,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
}
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


class DeepSpeedEngine(Engine):
    """Each unit is a DeepSpeed engine of its own, whose loss has the unit's gradients: Σ ⟨gradient, parameter⟩.

    So one loss may train parameters of several DeepSpeed engines, and one of those may be trained by several losses.
    Weights are float32 there, too: what autocast computes in is not DeepSpeed's concern. They lose the channels-last
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
            connect(store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # it reads this, too

    def describe(self) -> str:
        stage = self.settings["zero_optimization"]["stage"]
        ranks = f"{self._ranks.count} rank{'s' if self._ranks.count > 1 else ''}"
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
        """The units do it."""

    def _make(self, parameters: Parameters, moments: Sequence[Moments] | None) -> Unit:
        elements = sum(parameter.numel() for parameter in parameters)
        # Buckets are allocated whole: by default 2 GB for each unit.
        zero = {"reduce_bucket_size": elements, **self.settings["zero_optimization"]}
        settings = {**self.settings, "train_micro_batch_size_per_gpu": self._batch, "zero_optimization": zero}
        for parameter in parameters:  # DeepSpeed wants rows of stride 1, in 1×1 convolutions too
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        engine, *_ = self._deepspeed.initialize(
            model=_InnerProduct(parameters),
            optimizer=self._adam(parameters),
            config=settings,
            dist_init_required=False,
        )
        kind = _ZeroUnit if zero["stage"] else _DeepSpeedUnit
        return kind(engine, parameters, self._ranks, moments)


class _InnerProduct(nn.Module):
    """Parameters; given a tensor for each, a loss with these gradients."""

    def __init__(self, parameters: Parameters):
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.held, gradients, strict=True)]).sum()


class _DeepSpeedUnit(TorchUnit):
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
            self._ranks.sum_([x])
        step = self._ranks.worst(step)  # a rank may have no part of any
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
    """What DeepSpeed is told: the user's JSON, as far as it does not contradict the recipe.

    Raises:
        ConfigError: the file cannot be read, or says something that the recipe says otherwise, or nobody here heeds.
    """
    path, stage = config.train.deepspeed_config, config.train.zero
    user = {} if path is None else _read(path)
    zero = user.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{path}: zero_optimization is no object.")
    _compare(path, user, config, ranks)
    wanted = zero.pop("stage", "auto")
    if wanted == 3:
        raise ConfigError(f"{path}: zero_optimization.stage is 3; it must be 0, 1 or 2: {NO_STAGE_3}.")
    if wanted != "auto":
        if isinstance(wanted, bool) or wanted not in (0, 1, 2) or stage not in (None, wanted):
            either = "0, 1 or 2" if stage is None else f"{stage}, as train.zero is"
            raise ConfigError(f"{path}: zero_optimization.stage is {wanted!r}; it must be {either}.")
        stage = wanted
    _check_rest(path, zero, ZERO_FREE, "zero_optimization.")
    zero = {**_without_auto(zero), "stage": stage or 0}
    if stage:
        zero["compute_grad_norm"] = False  # it would wait for the device
    return {
        **_without_auto(user),
        "gradient_accumulation_steps": 1,  # the engine adds gradients up itself
        "gradient_clipping": 0.0,  # the default is 1
        "zero_optimization": zero,
    }


def _read(path: str) -> dict[str, Any]:
    try:
        user = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"train.deepspeed_config: {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"train.deepspeed_config: {path} is no JSON ({error}).") from error
    if not isinstance(user, dict):
        raise ConfigError(f"train.deepspeed_config: {path} holds no JSON object.")
    return user


def _compare(path: str | None, user: dict[str, Any], config: Config, ranks: int) -> None:
    """Takes out of the user's settings what the recipe says too, if it says the same."""

    def agree(settings: dict[str, Any], name: str, ours: Any, setting: str, prefix: str = "") -> None:
        theirs = settings.pop(name, "auto")
        if theirs not in ("auto", ours):
            raise ConfigError(f"{path}: {prefix}{name} is {theirs!r}, but {setting} makes it {ours!r}.")

    train, optim = config.train, config.optim
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        theirs = user.pop(name, "auto")
        for stage in stages(config) if theirs != "auto" else ():
            batch = point(config, stage.begin, ranks).batch
            micro = min(train.micro_batch or batch, batch)
            ours = {
                "train_batch_size": batch * ranks,
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": -(-batch // micro),
            }
            where = f" at {stage.resolution}×{stage.resolution}" if config.model.grows else ""
            batches = "growth.batch" if config.model.grows else "train.batch"
            cut = "" if train.micro_batch is None else ", with train.micro_batch,"
            agree({name: theirs}, name, ours[name], f"{batches} on {ranks} rank{'s'[: ranks > 1]}{cut}{where}")
    for section, precision in (("bf16", "bfloat16"), ("fp16", "float16")):
        theirs = user.pop(section, {})
        if not isinstance(theirs, dict):
            raise ConfigError(f"{path}: {section} is no object.")
        agree(theirs, "enabled", train.precision == precision, f"train.precision {train.precision}", f"{section}.")
        if section == "fp16":
            agree(theirs, "loss_scale", 0, "the recipe's dynamic loss scale", "fp16.")
            agree(theirs, "initial_scale_power", math.log2(optim.loss_scale), "optim.loss_scale", "fp16.")
            agree(theirs, "loss_scale_window", optim.loss_scale_window, "optim.loss_scale_window", "fp16.")
        _check_rest(path, theirs, {}, f"{section}.")
    agree(user, "gradient_clipping", 0, "the method, which clips none,")
    agree(user, "communication_data_type", "fp32", "the type of the gradients")
    _check_rest(path, user, FREE)


def _check_rest(path: str | None, settings: dict[str, Any], known: dict[str, type], prefix: str = "") -> None:
    """Of what the recipe does not say, only this may be set."""
    for name, value in settings.items():
        if name not in known:
            why = ELSEWHERE.get(name, "it would not be heeded, or change what the recipe computes")
            raise ConfigError(f"{path}: {prefix}{name} cannot be set here: {why}.")
        kind = known[name]
        if value != "auto" and (type(value) is not kind or (kind is int and value < 1)):
            wanted = {int: "a number from 1 on", bool: "true or false", dict: "an object"}[kind]
            raise ConfigError(f"{path}: {prefix}{name} is {value!r}; it must be {wanted}.")


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value != "auto"}
