"""One training iteration: discriminator, autoencoder, instance loss. Knows no files, no clock, no command line.

Nothing here waits for the device: metrics are tensors on it, detached.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcvae_fast.config import Config
from dcvae_fast.contrast import InstanceContrast
from dcvae_fast.losses import (
    autoencoder_loss,
    discriminator_loss,
    feature_loss,
    gradient_norm,
    kl_divergence,
    lipschitz_penalty,
    pixel_loss,
    r1_penalty,
)
from dcvae_fast.models.build import build_autoencoder, build_discriminator, learning_rate_scales
from dcvae_fast.models.dcvae import Posterior
from dcvae_fast.models.layers import copy_buffers, frozen, update_average, widened
from dcvae_fast.models.progressive import LOW, Phase, checkpoint_activations, set_phase
from dcvae_fast.training.compiled import compile_forward, compiling, forget_compiled, uncompiled, uses_compile
from dcvae_fast.training.deepspeed_engine import DeepSpeedEngine, deepspeed_settings
from dcvae_fast.training.engine import Engine
from dcvae_fast.training.graphs import CudaRecorder, Graphs, uses_graphs
from dcvae_fast.training.ranks import ALONE, Ranks
from dcvae_fast.training.schedule import Point, check_batches, point, sampled
from dcvae_fast.training.seeding import derive_seed
from dcvae_pipelines import Batch, cross_fade

Metrics = dict[str, Tensor]


class Reconstruction(NamedTuple):
    """G(z) for z drawn from q(z|x), and q(z|x)."""

    images: Tensor
    posterior: Posterior


# Given a part of the batch.
Reconstruct = Callable[[slice], Reconstruction]


class Draws(NamedTuple):
    """All that is random in an iteration, this rank's share; None where it takes none."""

    posterior: Tensor  # [B, Z], of the reconstruction
    prior: Tensor | None  # [B, Z], samples for the discriminator
    between: Tensor | None  # [2, B, 1, 1, 1], where gradients are penalised
    generated: Tensor | None  # [B', Z], samples for the autoencoder
    again: Tensor | None  # [B, Z], of the reconstruction once the autoencoder has been stepped
    location: Tensor | None  # [1], of the local patches


class Kind(NamedTuple):
    """What an iteration does: those of one kind launch the same work."""

    autoencoder: bool
    """whether the autoencoder is stepped"""
    r1: bool
    """whether the discriminator's gradient is penalised at real images"""
    local: bool
    """whether local patches are contrasted"""


class Keys(NamedTuple):
    """What the images' momentum features are, for contrast."""

    embeddings: Tensor  # [S, B, D]
    location: Tensor | None  # of the local patches, where those are contrasted
    patches: Tensor | None  # [L, B, W]


class Networks(nn.Module):
    """All networks of a run, initialised from the configuration's seed alone."""

    def __init__(self, config: Config):
        super().__init__()
        m, seed = config.model, config.train.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "networks"))
            self.encoder, self.decoder = build_autoencoder(m)
            self.discriminator = build_discriminator(m)
            self.contrast = None
            if config.loss.instance == "contrast":
                self.contrast = InstanceContrast(
                    self.discriminator,
                    config.contrast,
                    m.contrast_dim,
                    m.discriminator_width,
                    derive_seed(seed, "queue"),
                )
        self.decoder_average = deepcopy(self.decoder).requires_grad_(False)


class TrainStep:
    """Calling it with a batch trains on it once (in the order of the authors' code, or jointly as in Eq. 9).

    Randomness comes from (seed, images seen), so a resumed run draws what an uninterrupted one would. Each of several
    ranks draws for all, and takes its share: together they do what one would do with all their images, up to rounding.
    """

    # Convolutions are faster so, on GPUs and CPUs alike.
    memory_format = torch.channels_last

    def __init__(self, config: Config, device: torch.device | str = "cpu", ranks: Ranks = ALONE):
        """
        Raises:
            ConfigError: the ranks cannot share the batches, or DeepSpeed is wanted and cannot be used so.
        """
        check_batches(config, ranks.count)
        self.config = config
        self.device = torch.device(device)
        self.ranks = ranks
        self.networks = Networks(config).to(self.device).to(memory_format=self.memory_format).train()
        if config.train.checkpoint_activations:
            checkpoint_activations(self.networks)
        discriminator, contrast = self.networks.discriminator, self.networks.contrast
        self.compiles = uses_compile(config, self.device)
        if self.compiles:
            modules = [self.networks.encoder.trunk, self.networks.decoder, discriminator.critic]
            compile_forward(modules if contrast is None else [*modules, contrast.momentum.critic])
        self._compiled_for: tuple[int, bool] | None = None
        self._alpha = torch.empty((), device=self.device)
        self.graphs = None
        if uses_graphs(config, self.device, ranks):
            self.graphs = Graphs(partial(CudaRecorder, self.device))
            # No other Adam can be part of one.
            config = replace(config, optim=replace(config.optim, fused="torch"))
        groups = {
            "encoder": self.networks.encoder.parameters(),
            "decoder": self.networks.decoder.parameters(),
            "trunk": discriminator.critic.trunk.parameters(),
            "score": discriminator.critic.score.parameters(),
            "heads": discriminator.heads.parameters(),
        }
        arguments = (self.networks, groups, config, ranks, learning_rate_scales(self.networks))
        if config.train.uses_deepspeed and self.device.type != "meta":
            self.engine: Engine = DeepSpeedEngine(*arguments, settings=deepspeed_settings(config, ranks.count))
        else:
            self.engine = Engine(*arguments)
        # The meta device, on which a plan is made, has no generator of its own and draws nothing.
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device)
        self.images = 0  # shown so far, on all ranks together
        self.iterations = 0
        self.grow(self.point)

    @property
    def point(self) -> Point:
        """Resolution, fade, batch and learning rate of the next iteration. Where the resolution is not `resolution`,
        `grow` and `refill` come first."""
        return point(self.config, self.images, self.ranks.count)

    def grow(self, to: Point) -> None:
        """Go on at another resolution: with no moments in the optimizers, and an empty queue.

        The new layers have been in all networks from the start, C′ and the averages included, and are the same there.
        """
        self._set_phase(to)
        self.engine.reset(to.lr, to.batch)
        contrast = self.networks.contrast
        if contrast is not None:
            low = not self.config.model.grows or to.resolution >= LOW
            contrast.restart([layer for layer in self.config.contrast.layers if low or layer != "low"])

    @torch.no_grad()
    def refill(self, batches: Iterable[Batch]) -> None:
        """Fill the queue with keys of fresh images, this rank's share of them, at the present resolution."""
        contrast = self.networks.contrast
        if contrast is None:
            return
        missing = self.config.contrast.negatives
        for batch in batches:
            with self._autocast(), compiling() if self.compiles else nullcontext():
                keys, _ = contrast.keys(self._shown(batch).images)
            ids = self.ranks.gathered(batch.ids)
            contrast.queue.enqueue(self.ranks.gathered(keys, dim=1), ids)
            missing -= len(ids)
            if missing <= 0:
                return

    def _set_phase(self, to: Point) -> None:
        self.resolution, self.alpha = to.resolution, to.alpha
        fades = to.alpha < 1
        if self.config.model.grows:
            self._alpha.fill_(to.alpha)
            set_phase(self.networks, Phase(to.resolution, self._alpha if fades else 1.0))
        if self.compiles and (to.resolution, fades) != self._compiled_for:
            forget_compiled()
            self._compiled_for = (to.resolution, fades)

    def _shown(self, batch: Batch) -> Batch:
        """The batch as networks that are fading in see it."""
        images = cross_fade(batch.images, self.alpha).contiguous(memory_format=self.memory_format)
        return Batch(images, batch.ids)

    def _autocast(self) -> AbstractContextManager:
        precision = self.config.train.precision
        if precision == "float32" or self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, precision))

    def __call__(self, batch: Batch) -> Metrics:
        """Train on images [B, C, R, R] of the present resolution, this rank's share; returns scalars, of its share too,
        those of the autoencoder only where it was stepped.

        Raises:
            ConfigError: the networks are to be compiled, and cannot be.
        """
        self._set_phase(self.point)
        batch, kind = self._shown(batch), self._kind()
        draws = self._draws(len(batch.images), kind)
        with compiling() if self.compiles else nullcontext():
            if self.graphs is None:
                metrics = self._iterate(batch, draws, kind)
            else:
                metrics = self._replayed(self.graphs, batch, draws, kind)
        self.images += len(batch.images) * self.ranks.count
        self.iterations += 1
        return metrics

    def _kind(self) -> Kind:
        loss, local = self.config.loss, self.config.contrast.local_start_images
        autoencoder = not loss.has_gan or self.iterations % self.config.train.n_critic == 0
        r1 = loss.has_gan and loss.adversarial == "logistic_r1" and self.iterations % loss.penalty_every == 0
        local = autoencoder and loss.instance == "contrast" and local is not None and self.images >= local
        return Kind(autoencoder, r1, local)

    def _draws(self, n: int, kind: Kind) -> Draws:
        """Those of an iteration on n images."""
        config, loss = self.config, self.config.loss
        self.generator.manual_seed(derive_seed(config.train.seed, self.images))
        adversarial = loss.has_gan and kind.autoencoder
        posterior = self._noise(n)
        prior = self._noise(n) if loss.has_gan else None
        between = None
        if loss.has_gan and loss.adversarial == "wgan_gp":
            shape = (2, n * self.ranks.count, 1, 1, 1)
            between = self.ranks.own(torch.rand(shape, device=self.device, generator=self.generator), dim=1)
        generated = self._noise(sampled(config, self.ranks.count) or n) if adversarial else None
        again = self._noise(n) if adversarial and loss.order == "sequential" else None
        location = torch.rand(1, device=self.device, generator=self.generator) if kind.local else None
        return Draws(posterior, prior, between, generated, again, location)

    def _noise(self, n: int) -> Tensor:
        """[n, Z]: this rank's share."""
        shape = (n * self.ranks.count, self.config.model.latent_dim)
        return self.ranks.own(torch.randn(shape, device=self.device, generator=self.generator))

    def _replayed(self, graphs: Graphs, batch: Batch, draws: Draws, kind: Kind) -> Metrics:
        """What `_iterate` does, by a graph of its kind."""
        drawn = {name: x for name, x in draws._asdict().items() if x is not None}
        nothing = dict.fromkeys(Draws._fields)

        def work(inputs: list[Tensor]) -> Metrics:
            images, ids, *rest = inputs
            return self._iterate(Batch(images, ids), Draws(**{**nothing, **dict(zip(drawn, rest, strict=True))}), kind)

        setting = (self.resolution, self.alpha < 1, self.engine.layout)
        return graphs.run(setting, kind, work, [batch.images, batch.ids, *drawn.values()])

    def _iterate(self, batch: Batch, draws: Draws, kind: Kind) -> Metrics:
        """An iteration on the device. What it launches depends on the kind, the shapes and the phase alone."""
        loss, n = self.config.loss, len(batch.images)
        metrics: Metrics = {}
        reconstruct = None
        if loss.has_gan:
            # The discriminator's step leaves the autoencoder as it is, so the reconstruction serves again after it.
            reconstruct = self._reconstruct_once(batch.images, draws.posterior, kind.autoencoder)
            metrics |= self._discriminator_step(batch.images, reconstruct, draws, kind.r1)
            if kind.autoencoder and loss.order == "sequential":
                metrics |= self._autoencoder_step(n, reconstruct, draws)
                reconstruct = None  # the autoencoder has changed
        if kind.autoencoder:
            if reconstruct is None:
                noise = draws.posterior if draws.again is None else draws.again
                reconstruct = self._reconstruct_once(batch.images, noise, True)
            metrics |= self._instance_step(batch, reconstruct, draws)
            update_average(self.networks.decoder_average, self.networks.decoder, self.config.train.average)
        copy_buffers(self.networks.decoder_average, self.networks.decoder)
        return metrics

    def _parts(self, n: int) -> list[slice]:
        """The batch, or the micro-batches that it is cut into."""
        size = self.config.train.micro_batch or n
        return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]

    def _reconstruct_once(self, images: Tensor, noise: Tensor, trained: bool) -> Reconstruct:
        """What gives the reconstruction of a part of the batch, always the same one.

        It is computed now, or, of micro-batches, each time again: otherwise all their activations would be held.

        Args:
            trained: whether gradients are wanted.
        """
        if self.config.train.micro_batch is not None:
            return lambda part: self._reconstruct(images[part], noise[part])
        with torch.set_grad_enabled(trained):
            whole = self._reconstruct(images, noise)
        return lambda part: whole

    def _reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        with self._autocast():
            mean, logvar = self.networks.encoder(images)
            posterior = Posterior(widened(mean), widened(logvar))
            return Reconstruction(widened(self.networks.decoder(posterior.at(noise))), posterior)

    def _discriminator_step(self, images: Tensor, reconstruct: Reconstruct, draws: Draws, r1: bool) -> Metrics:
        """Real images against as many prior samples and reconstructions; steps trunk and score head."""
        prior, between = draws.prior, draws.between
        assert prior is not None

        def loss(part: slice) -> tuple[Tensor, Metrics]:
            with self._autocast(), torch.no_grad():
                rec, fake = reconstruct(part).images.detach(), widened(self.networks.decoder(prior[part]))
            places = None if between is None else between[:, part]
            return self._discriminator_loss(images[part], fake, rec, places, r1)

        return self._update(loss, len(images), "trunk", "score")

    def _discriminator_loss(
        self, images: Tensor, fake: Tensor, rec: Tensor, between: Tensor | None, r1: bool
    ) -> tuple[Tensor, Metrics]:
        config = self.config.loss
        with self._autocast():
            scores = widened(
                self.networks.discriminator(torch.cat([images, fake, rec]), stddev_parts=3, layers=()).score
            )
        real_score, fake_score, rec_score = scores.chunk(3)
        loss = discriminator_loss(real_score, fake_score, rec_score, config.adversarial, config.drift)
        metrics = {
            "loss/discriminator": loss.detach(),
            "score/real": real_score.detach().mean(),
            "score/fake": fake_score.detach().mean(),
            "score/rec": rec_score.detach().mean(),
        }
        if between is not None:  # a random point between each image and its sample or reconstruction, as a coin says
            coin, place = between
            points = torch.lerp(images, torch.where(coin < 0.5, fake, rec), place)
            penalty = lipschitz_penalty(self._gradient_norms(points))
            metrics["loss/penalty"] = penalty.detach()
            loss = loss + config.penalty * penalty
        elif r1:
            penalty = r1_penalty(self._gradient_norms(images))
            metrics["loss/penalty"] = penalty.detach()
            loss = loss + config.penalty_every * config.penalty * penalty
        return loss, metrics

    def _gradient_norms(self, images: Tensor) -> Tensor:
        """Of the score in each image, [B]; in float32, for the gradients of single pixels are small."""
        images = images.detach().requires_grad_()
        with uncompiled():
            scores = self.networks.discriminator(images, layers=()).score
        return gradient_norm(scores, images)

    def _adversarial_loss(self, rec: Tensor, noise: Tensor) -> Tensor:
        """How well prior samples and the reconstructions pass for real; no gradient for the discriminator."""
        with self._autocast(), frozen(self.networks.discriminator):
            fake = widened(self.networks.decoder(noise))
            scores = widened(self.networks.discriminator(torch.cat([fake, rec]), stddev_parts=2, layers=()).score)
        fake_score, rec_score = scores.split([len(fake), len(rec)])
        return autoencoder_loss(fake_score, rec_score, self.config.loss.adversarial)

    def _autoencoder_step(self, n: int, reconstruct: Reconstruct, draws: Draws) -> Metrics:
        """The adversarial loss of the autoencoder, and KL; steps encoder and decoder."""
        noise = draws.generated
        assert noise is not None

        def loss(part: slice) -> tuple[Tensor, Metrics]:
            rec = reconstruct(part)
            adversarial = self._adversarial_loss(rec.images, noise if part == slice(0, n) else noise[part])
            kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
            return adversarial + self.config.loss.kl_weight * kl, {"loss/adversarial": adversarial.detach()}

        return self._update(loss, n, "encoder", "decoder")

    def _instance_step(self, batch: Batch, reconstruct: Reconstruct, draws: Draws) -> Metrics:
        """The reconstruction loss and KL, with the adversarial loss where the order is joint.

        Steps encoder and decoder, and for InfoNCE the trunk and the contrastive heads.
        """
        config, n = self.config, len(batch.images)
        noise = draws.generated if config.loss.order == "joint" else None
        keys = self._new_keys(batch, draws.location) if config.loss.instance == "contrast" else None

        def loss(part: slice) -> tuple[Tensor, Metrics]:
            rec = reconstruct(part)
            kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
            metrics = {"loss/kl": kl.detach(), "pixel_mse": pixel_loss(batch.images[part], rec.images.detach())}
            total = config.loss.kl_weight * kl
            if noise is not None:
                adversarial = self._adversarial_loss(rec.images, noise if part == slice(0, n) else noise[part])
                metrics["loss/adversarial"] = adversarial.detach()
                total = total + adversarial
            if keys is not None:
                instance, contrast_metrics = self._contrast(rec.images, keys, batch.ids, part)
                metrics |= contrast_metrics
            elif config.loss.instance == "feature":
                instance = self._feature_loss(batch.images[part], rec.images)
            else:
                instance = pixel_loss(batch.images[part], rec.images)
            metrics[f"loss/{config.loss.instance}"] = instance.detach()
            return total + instance, metrics

        groups = ("encoder", "decoder", "trunk", "heads") if keys is not None else ("encoder", "decoder")
        metrics = self._update(loss, n, *groups)
        if keys is not None:
            self._enqueue(keys, batch.ids)
        return metrics

    def _feature_loss(self, images: Tensor, rec: Tensor) -> Tensor:
        discriminator, low = self.networks.discriminator, not self.config.model.grows or self.resolution >= LOW
        layers = tuple(layer for layer in self.config.contrast.layers if low or layer != "low")
        with self._autocast(), frozen(discriminator):
            real, fake = (discriminator(x, stddev_parts=0, layers=layers, scored=False) for x in (images, rec))
        return feature_loss(real.features, fake.features, layers)

    def _new_keys(self, batch: Batch, location: Tensor | None) -> Keys:
        """Moves C′ towards C, and makes the keys of the batch."""
        contrast = self.networks.contrast
        assert contrast is not None
        contrast.update(self.networks.discriminator)
        with self._autocast():
            made = [contrast.keys(batch.images[part], location is not None) for part in self._parts(len(batch.images))]
        keys, patches = torch.cat([keys for keys, _ in made], dim=1), None
        if location is not None:
            patches = torch.cat([contrast.local_patches(critique, location) for _, critique in made], dim=1)
        return Keys(keys, location, patches)

    def _contrast(self, rec: Tensor, keys: Keys, ids: Tensor, part: slice) -> tuple[Tensor, Metrics]:
        """InfoNCE of the reconstructions of a part of the batch against their images and the queue."""
        contrast, discriminator = self.networks.contrast, self.networks.discriminator
        assert contrast is not None
        with self._autocast():
            critique = contrast.critique(discriminator, rec, keys.location is not None)
            queries = contrast.embed(discriminator, critique)
        loss, metrics = contrast.loss(queries, keys.embeddings[:, part], ids[part])
        if keys.location is not None and keys.patches is not None:
            patches = contrast.local_patches(critique, keys.location)
            local = contrast.local_loss(patches, keys.patches[:, part], ids[part])
            metrics["loss/contrast_local"] = local.detach()
            loss = loss + local
        return loss, metrics

    def _enqueue(self, keys: Keys, ids: Tensor) -> None:
        """The keys of all ranks: each has the same queue."""
        contrast, ranks = self.networks.contrast, self.ranks
        assert contrast is not None
        ids = ranks.gathered(ids)
        contrast.queue.enqueue(ranks.gathered(keys.embeddings, dim=1), ids)
        if contrast.local_queue is not None and keys.patches is not None:
            contrast.local_queue.enqueue(ranks.gathered(keys.patches, dim=1), ids)

    def _update(self, loss: Callable[[slice], tuple[Tensor, Metrics]], n: int, *groups: str) -> Metrics:
        """Steps these groups for the mean loss of the batch's parts; the mean of their metrics."""
        metrics: Metrics = {}
        parts = self._parts(n)
        for part in parts:
            value, found = loss(part)
            share = (part.stop - part.start) / n
            self.engine.backward(value if len(parts) == 1 else value * share, groups)
            for name, each in found.items():
                metrics[name] = each if len(parts) == 1 else metrics.get(name, 0) + share * each
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
        there = point(self.config, state["images"], self.ranks.count)
        self.grow(there._replace(resolution=state["resolution"], alpha=state["alpha"]))
        self.images, self.iterations = state["images"], state["iterations"]
        self.networks.load_state_dict(state["networks"])
        self.engine.load_state_dict(state["optimizers"])
