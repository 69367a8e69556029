"""One training iteration: noise, the objectives in order, optimizer steps, CUDA graphs.

This module uses no files, clock or command line. It does not wait for the device, except for the loss scale in float16:
metrics are detached tensors on the device.
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
    """Callable that trains on one batch: objective after objective as in the authors' code, or jointly (Eq. 9).

    Several ranks compute the same update as one rank with all their images, up to rounding; but with
    `train.batch_per_rank`, minibatch standard deviations cover the images of a rank only.

    Attributes:
        images: images shown so far, on all ranks together
        iterations: iterations so far
        resolution, alpha: resolution of the networks, and fade-in weight of its layers
    """

    # channels_last convolutions are faster on GPUs and CPUs.
    memory_format = torch.channels_last

    def __init__(self, config: Config, device: torch.device | str = "cpu", ranks: Ranks = SINGLE):
        """
        Raises:
            ConfigError: the batches cannot be divided among the ranks, or DeepSpeed cannot be used as configured.
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
        self.images = self.iterations = 0
        self._alpha = torch.empty((), device=self.device)
        self._phase: tuple[int, bool] | None = None
        self.grow(self.schedule)

    def _make_engine(self) -> Engine:
        config = self.config
        if self.graphs is not None:  # only torch's Adam can be captured
            config = replace(config, optim=replace(config.optim, implementation="torch"))
        arguments = (self.networks, self.networks.groups(), config, self.ranks, learning_rate_scales(self.networks))
        if config.train.uses_deepspeed and self.device.type != "meta":
            return DeepSpeedEngine(*arguments, settings=deepspeed_settings(config, self.ranks.world_size))
        engine = Engine if choose(config.optim.implementation, self.device) == "torch" else UnitEngine
        return engine(*arguments)

    @property
    def schedule(self) -> ScheduleState:
        """Schedule of the next iteration. If its resolution differs from `self.resolution`, call `grow` and `refill`
        first."""
        return schedule_at(self.config, self.images, self.ranks.world_size)

    def grow(self, schedule: ScheduleState) -> None:
        """Continue at another resolution, with an empty queue and, if `growth.reset_adam` is set, a restarted Adam.

        No weights are added: all networks, C′ and the EMA included, have the layers of all resolutions from the start.
        """
        self._enter(schedule)
        if self.config.growth.reset_adam:
            self.engine.reset(schedule.lr, schedule.batch)
        else:
            self.engine.change(schedule.lr, schedule.batch)

    def _enter(self, schedule: ScheduleState) -> None:
        self._phase = None
        self._set_phase(schedule)
        self.networks.restart_contrast(schedule.resolution)

    @torch.no_grad()
    def refill(self, batches: Iterable[Batch]) -> None:
        """Fill the queue with keys of these images, this rank's share, at the current resolution."""
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

    def _set_phase(self, schedule: ScheduleState) -> None:
        resolution, alpha = schedule.resolution, schedule.alpha
        self.resolution, self.alpha = resolution, alpha
        phase = (resolution, alpha < 1)
        if self.config.model.grows:
            self._alpha.fill_(alpha)
            set_phase(self.networks, Phase(resolution, self._alpha if alpha < 1 else 1.0))
        if phase == self._phase:
            return
        fade_ended = self._phase == (resolution, True)
        self._phase = phase  # compiled code and graphs belong to the previous phase
        if self.compiles:
            forget_compiled()
        if self.graphs is not None:
            self.graphs.forget()
        if fade_ended and self.config.growth.reset_adam:
            self.engine.reset(schedule.lr, schedule.batch)

    def _fade_in(self, batch: Batch) -> Batch:
        """Return the batch at the current phase: while layers fade in, blended with its half-resolution version, unless
        `growth.blend_real` is false."""
        images = cross_fade(batch.images, self.alpha if self.config.growth.blend_real else 1.0)
        return Batch(images.contiguous(memory_format=self.memory_format), batch.ids)

    def _autocast(self) -> AbstractContextManager:
        precision = self.config.train.precision
        if precision == "float32" or self.device.type == "meta":
            return nullcontext()
        # Without the cache, gradients of a weight that is used twice are accumulated in float32.
        return torch.autocast(self.device.type, getattr(torch, precision), cache_enabled=False)

    def _compiling(self) -> AbstractContextManager:
        return compiling() if self.compiles else nullcontext()

    def __call__(self, batch: Batch) -> Metrics:
        """Train on this rank's share of a batch, images [B, C, R, R] at the current resolution.

        Returns:
            Scalar metrics of this rank's share. Metrics of encoder and decoder exist only if they were updated.

        Raises:
            ConfigError: torch.compile fails.
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
        loss, contrast, local_start = self.config.loss, self.networks.contrast, self.config.contrast.local_start_images
        autoencoder = not loss.has_gan or self.iterations % self.config.train.n_critic == 0
        r1 = loss.has_gan and loss.adversarial == "logistic_r1" and self.iterations % loss.penalty_every == 0
        local = autoencoder and contrast is not None and contrast.local_queue is not None
        return StepVariant(autoencoder, r1, local and local_start is not None and self.images >= local_start)

    def _replay(self, graphs: Graphs, batch: Batch, noise: Noise, variant: StepVariant) -> Metrics:
        """Run `_iterate` as a CUDA graph, one for each variant."""
        noise_tensors = {name: x for name, x in noise._asdict().items() if x is not None}

        def work(tensors: list[Tensor]) -> Metrics:
            images, ids, *rest = tensors
            return self._iterate(Batch(images, ids), Noise(**dict(zip(noise_tensors, rest, strict=True))), variant)

        return graphs.run(variant, work, [batch.images, batch.ids, *noise_tensors.values()])

    def _iterate(self, batch: Batch, noise: Noise, variant: StepVariant) -> Metrics:
        """Run an iteration on the device. Its kernel launches depend only on the variant, the shapes and the phase."""
        loss, metrics = self.config.loss, {}
        inputs = Inputs(batch.images, batch.ids, noise.posterior)
        if loss.has_gan:
            if loss.passes == "merged":
                # The discriminator's step does not change encoder and decoder, so the next objective reuses the result.
                inputs = self._reconstruct_once(inputs, needs_gradient=variant.autoencoder)
            objective = partial(discriminator_objective, r1=variant.r1)
            d_inputs = inputs._replace(prior=noise.prior, interpolation=noise.interpolation)
            metrics |= self._optimize(objective, d_inputs, "trunk", "score")
            if noise.adversarial_posterior is not None:
                inputs = inputs._replace(noise=noise.adversarial_posterior)
            if variant.autoencoder and loss.order == "sequential":
                g_inputs = inputs._replace(prior=noise.generated)
                metrics |= self._optimize(adversarial_objective, g_inputs, "encoder", "decoder")
                # Encoder and decoder have changed: reconstruct again, with new noise.
                inputs = inputs._replace(noise=noise.second_posterior, reconstruction=None)
        if variant.autoencoder:
            if loss.order == "joint":
                inputs = inputs._replace(prior=noise.generated)
            metrics |= self._instance_step(inputs, noise.location)
            update_ema(self.networks.decoder_ema, self.networks.decoder, self.config.train.ema_decay)
        copy_buffers(self.networks.decoder_ema, self.networks.decoder)
        return metrics

    def _reconstruct_once(self, inputs: Inputs, needs_gradient: bool) -> Inputs:
        """Add the reconstruction. Micro-batches instead reconstruct for each objective, to hold fewer activations."""
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
            keys = contrast.keys(inputs.images, location, self.config.train.micro_batch)
        inputs = inputs._replace(keys=keys)
        metrics = self._optimize(instance_objective, inputs, "encoder", "decoder", "trunk", "heads")
        self._enqueue(keys, inputs.ids)
        return metrics

    def _enqueue(self, keys: Keys, ids: Tensor) -> int:
        """Enqueue the keys of all ranks, so that all queues stay equal, and return their number."""
        assert self.networks.contrast is not None
        gather = partial(self.ranks.all_gather, dim=1)
        patches = None if keys.patches is None else gather(keys.patches)
        ids = self.ranks.all_gather(ids)
        self.networks.contrast.enqueue(Keys(gather(keys.embeddings), patches), ids)
        return len(ids)

    def _optimize(self, objective: Objective, inputs: Inputs, *groups: str) -> Metrics:
        """Update groups of parameters to minimise an objective over all micro-batches, and return mean metrics."""
        metrics: Metrics = {}
        micro_batches = inputs.micro_batches(self.config.train.micro_batch)
        for micro_batch in micro_batches:
            with self._autocast():
                loss, micro_metrics = objective(self.networks, micro_batch, self.config.loss)
            if len(micro_batches) == 1:
                metrics = micro_metrics
                self.engine.backward(loss, groups)
                continue
            weight = len(micro_batch.images) / len(inputs.images)
            self.engine.backward(weight * loss, groups)
            for name, value in micro_metrics.items():
                metrics[name] = metrics.get(name, 0) + weight * value
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
        schedule = schedule_at(self.config, state["images"], self.ranks.world_size)
        self._enter(schedule._replace(resolution=state["resolution"], alpha=state["alpha"]))
        self.engine.reset(schedule.lr, schedule.batch)
        self.images, self.iterations = state["images"], state["iterations"]
        self.networks.load_state_dict(state["networks"])
        self.engine.load_state_dict(state["optimizers"])
