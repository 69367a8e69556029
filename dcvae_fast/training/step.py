"""One training iteration: noise, the objectives in order, optimizer, graphs. Knows no files, clock or command line.

Nothing here waits for the device, except for the loss scale in float16: metrics are detached tensors on it.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dcvae_fast.config import Config
from dcvae_fast.contrast import Keys
from dcvae_fast.distributed import SINGLE, Ranks
from dcvae_fast.models.build import learning_rate_scales
from dcvae_fast.models.layers import copy_buffers, update_ema
from dcvae_fast.models.progressive import Phase, checkpoint_activations, set_phase
from dcvae_fast.training.compiled import compile_forward, compiling, forget_compiled, uses_compile
from dcvae_fast.training.deepspeed_engine import DeepSpeedEngine, UnitEngine, deepspeed_settings
from dcvae_fast.training.engine import Engine
from dcvae_fast.training.graphs import CudaRecorder, Graphs, uses_graphs
from dcvae_fast.training.networks import Networks
from dcvae_fast.training.noise import Noise, NoiseSource, StepVariant
from dcvae_fast.training.objectives import (
    Inputs,
    Metrics,
    adversarial_objective,
    discriminator_objective,
    instance_objective,
    reconstruct,
)
from dcvae_fast.training.optim import choose
from dcvae_fast.training.schedule import ScheduleState, check_batches, schedule_at
from dcvae_pipelines import Batch, cross_fade

Objective = Callable[..., tuple[Tensor, Metrics]]


class TrainStep:
    """Calling it with a batch trains on it once, in the order of the authors' code or jointly (Eq. 9).

    Ranks together do what one rank would do with all their images, up to rounding.
    """

    # channels_last convolutions are faster, on GPUs and CPUs.
    memory_format = torch.channels_last

    def __init__(self, config: Config, device: torch.device | str = "cpu", ranks: Ranks = SINGLE):
        """
        Raises:
            ConfigError: the ranks cannot share the batches, or DeepSpeed cannot be used as configured.
        """
        check_batches(config, ranks.world_size)
        self.config, self.device, self.ranks = config, torch.device(device), ranks
        self.networks = Networks(config).to(self.device).to(memory_format=self.memory_format).train()
        if config.train.checkpoint_activations:
            checkpoint_activations(self.networks)
        self.compiles = uses_compile(config, self.device)
        if self.compiles:
            compile_forward(self.networks.compilable())
        self.graphs = Graphs(partial(CudaRecorder, self.device)) if uses_graphs(config, self.device, ranks) else None
        self.engine = self._make_engine()
        self._noise = NoiseSource(config, self.device, ranks)
        self.images = 0  # shown so far, on all ranks together
        self.iterations = 0
        self._alpha = torch.empty((), device=self.device)
        self._phase: tuple[int, bool] | None = None
        self.grow(self.schedule)

    def _make_engine(self) -> Engine:
        config = self.config
        if self.graphs is not None:  # only torch's Adam can be part of a graph
            config = replace(config, optim=replace(config.optim, implementation="torch"))
        arguments = (self.networks, self.networks.groups(), config, self.ranks, learning_rate_scales(self.networks))
        if config.train.uses_deepspeed and self.device.type != "meta":
            return DeepSpeedEngine(*arguments, settings=deepspeed_settings(config, self.ranks.world_size))
        engine = Engine if choose(config.optim.implementation, self.device) == "torch" else UnitEngine
        return engine(*arguments)

    @property
    def schedule(self) -> ScheduleState:
        """Resolution, fade, batch and learning rate of the next iteration. If its resolution is not `resolution`, call
        `grow` and `refill` first."""
        return schedule_at(self.config, self.images, self.ranks.world_size)

    def grow(self, to: ScheduleState) -> None:
        """Continue at another resolution, without moments in the optimizer and with an empty queue.

        All layers have been in all networks from the start, C′ and the averages included, where they are the same.
        """
        self._phase = None
        self._set_phase(to)
        self.engine.reset(to.lr, to.batch)
        self.networks.restart_contrast(to.resolution)

    @torch.no_grad()
    def refill(self, batches: Iterable[Batch]) -> None:
        """Fill the queue with keys of fresh images, this rank's share of them, at the present resolution."""
        contrast = self.networks.contrast
        if contrast is None:
            return
        missing = self.config.contrast.negatives
        for batch in batches:
            with self._autocast(), self._compiling():
                keys = contrast.keys(self._fade_in(batch).images)
            missing -= self._enqueue(keys, batch.ids)
            if missing <= 0:
                return

    def _set_phase(self, to: ScheduleState) -> None:
        self.resolution, self.alpha = to.resolution, to.alpha
        phase = (to.resolution, to.alpha < 1)
        if self.config.model.grows:
            self._alpha.fill_(to.alpha)
            set_phase(self.networks, Phase(to.resolution, self._alpha if to.alpha < 1 else 1.0))
        if phase == self._phase:
            return
        self._phase = phase  # what was compiled and recorded belongs to the previous one
        if self.compiles:
            forget_compiled()
        if self.graphs is not None:
            self.graphs.forget()

    def _fade_in(self, batch: Batch) -> Batch:
        """Return the images as networks that are fading in see them."""
        images = cross_fade(batch.images, self.alpha).contiguous(memory_format=self.memory_format)
        return Batch(images, batch.ids)

    def _autocast(self) -> AbstractContextManager:
        precision = self.config.train.precision
        if precision == "float32" or self.device.type == "meta":
            return nullcontext()
        # Without the cache, gradients of a weight that is used twice are added up in float32.
        return torch.autocast(self.device.type, getattr(torch, precision), cache_enabled=False)

    def _compiling(self) -> AbstractContextManager:
        return compiling() if self.compiles else nullcontext()

    def __call__(self, batch: Batch) -> Metrics:
        """Train on images [B, C, R, R] of the present resolution, this rank's share.

        Returns:
            Scalars, of this rank's share; those of the autoencoder only if it was stepped.

        Raises:
            ConfigError: the networks are to be compiled, and cannot be.
        """
        self._set_phase(self.schedule)
        batch, variant = self._fade_in(batch), self._variant()
        noise = self._noise.draw(len(batch.images), variant, self.images)
        with self._compiling():
            if self.graphs is None:
                metrics = self._iterate(batch, noise, variant)
            else:
                metrics = self._replay(self.graphs, batch, noise, variant)
        self.images += len(batch.images) * self.ranks.world_size
        self.iterations += 1
        return metrics

    def _variant(self) -> StepVariant:
        loss, local_start = self.config.loss, self.config.contrast.local_start_images
        autoencoder = not loss.has_gan or self.iterations % self.config.train.n_critic == 0
        r1 = loss.has_gan and loss.adversarial == "logistic_r1" and self.iterations % loss.penalty_every == 0
        contrasts = autoencoder and loss.instance == "contrast"
        return StepVariant(autoencoder, r1, contrasts and local_start is not None and self.images >= local_start)

    def _replay(self, graphs: Graphs, batch: Batch, noise: Noise, variant: StepVariant) -> Metrics:
        """Do what `_iterate` does, by a CUDA graph of its variant."""
        drawn = {name: x for name, x in noise._asdict().items() if x is not None}

        def work(tensors: list[Tensor]) -> Metrics:
            images, ids, *rest = tensors
            return self._iterate(Batch(images, ids), Noise(**dict(zip(drawn, rest, strict=True))), variant)

        return graphs.run(variant, work, [batch.images, batch.ids, *drawn.values()])

    def _iterate(self, batch: Batch, noise: Noise, variant: StepVariant) -> Metrics:
        """Run an iteration on the device. Its launches depend on the variant, the shapes and the phase alone."""
        loss, metrics = self.config.loss, {}
        inputs = Inputs(batch.images, batch.ids, noise.posterior)
        if loss.has_gan:
            # The discriminator's step does not change the autoencoder: its reconstruction serves the next step, too.
            inputs = self._reconstruct_once(inputs, needs_gradient=variant.autoencoder)
            objective = partial(discriminator_objective, r1=variant.r1)
            drawn = inputs._replace(prior=noise.prior, interpolation=noise.interpolation)
            metrics |= self._optimize(objective, drawn, "trunk", "score")
            if variant.autoencoder and loss.order == "sequential":
                drawn = inputs._replace(prior=noise.generated)
                metrics |= self._optimize(adversarial_objective, drawn, "encoder", "decoder")
                inputs = inputs._replace(noise=noise.again, reconstruction=None)  # the autoencoder has changed
        if variant.autoencoder:
            if loss.order == "joint":
                inputs = inputs._replace(prior=noise.generated)
            metrics |= self._instance_step(inputs, noise.location)
            update_ema(self.networks.decoder_ema, self.networks.decoder, self.config.train.ema_decay)
        copy_buffers(self.networks.decoder_ema, self.networks.decoder)
        return metrics

    def _reconstruct_once(self, inputs: Inputs, needs_gradient: bool) -> Inputs:
        """Add the reconstruction; but micro-batches reconstruct again for each objective, to hold fewer activations."""
        if self.config.train.micro_batch is not None:
            return inputs
        with self._autocast(), torch.set_grad_enabled(needs_gradient):
            return inputs._replace(reconstruction=reconstruct(self.networks, inputs))

    def _instance_step(self, inputs: Inputs, location: Tensor | None) -> Metrics:
        contrast = self.networks.contrast
        if contrast is None:
            return self._optimize(instance_objective, inputs, "encoder", "decoder")
        contrast.update(self.networks.discriminator)
        with self._autocast():
            keys = contrast.keys(inputs.images, location, at_once=self.config.train.micro_batch)
        inputs = inputs._replace(keys=keys)
        metrics = self._optimize(instance_objective, inputs, "encoder", "decoder", "trunk", "heads")
        self._enqueue(keys, inputs.ids)
        return metrics

    def _enqueue(self, keys: Keys, ids: Tensor) -> int:
        """Put the keys of all ranks, whose queues are the same, into the queue; returns how many."""
        assert self.networks.contrast is not None
        gather = partial(self.ranks.all_gather, dim=1)
        patches = None if keys.patches is None else gather(keys.patches)
        ids = self.ranks.all_gather(ids)
        self.networks.contrast.enqueue(Keys(gather(keys.embeddings), patches), ids)
        return len(ids)

    def _optimize(self, objective: Objective, inputs: Inputs, *groups: str) -> Metrics:
        """Step groups of parameters to minimise an objective over the micro-batches; returns mean metrics."""
        metrics: Metrics = {}
        parts = inputs.micro_batches(self.config.train.micro_batch)
        for part in parts:
            with self._autocast():
                loss, part_metrics = objective(self.networks, part, self.config.loss)
            if len(parts) == 1:
                metrics = part_metrics
                self.engine.backward(loss, groups)
                continue
            share = len(part.images) / len(inputs.images)
            self.engine.backward(share * loss, groups)
            for name, value in part_metrics.items():
                metrics[name] = metrics.get(name, 0) + share * value
        self.engine.step()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "iterations": self.iterations,
            "resolution": self.resolution,
            "alpha": self.alpha,
            "networks": self.networks.state_dict(),
            "optimizers": self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        there = schedule_at(self.config, state["images"], self.ranks.world_size)
        self.grow(there._replace(resolution=state["resolution"], alpha=state["alpha"]))
        self.images, self.iterations = state["images"], state["iterations"]
        self.networks.load_state_dict(state["networks"])
        self.engine.load_state_dict(state["optimizers"])
