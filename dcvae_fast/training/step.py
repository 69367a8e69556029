"""One training iteration: discriminator, autoencoder, instance loss. Knows no files, no clock, no command line.

Nothing here waits for the device: metrics are tensors on it, detached.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
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
from dcvae_fast.training.engine import Engine
from dcvae_fast.training.schedule import Point, point
from dcvae_fast.training.seeding import derive_seed
from dcvae_pipelines import Batch, cross_fade

Metrics = dict[str, Tensor]


class Reconstruction(NamedTuple):
    """G(z) for z drawn from q(z|x), and q(z|x)."""

    images: Tensor
    posterior: Posterior


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

    Randomness comes from (seed, rank, images seen), so a resumed run draws what an uninterrupted one would.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu", rank: int = 0, ranks: int = 1):
        self.config = config
        self.device = torch.device(device)
        self.rank, self.ranks = rank, ranks
        # Channels last: convolutions are faster so, on GPUs and CPUs alike.
        self.networks = Networks(config).to(self.device).to(memory_format=torch.channels_last).train()
        if config.train.checkpoint_activations:
            checkpoint_activations(self.networks)
        discriminator = self.networks.discriminator
        self.engine = Engine(
            {
                "encoder": self.networks.encoder.parameters(),
                "decoder": self.networks.decoder.parameters(),
                "trunk": discriminator.critic.trunk.parameters(),
                "score": discriminator.critic.score.parameters(),
                "heads": discriminator.heads.parameters(),
            },
            config.optim,
            learning_rate_scales(self.networks),
        )
        # The meta device, on which a plan is made, has no generator of its own and draws nothing.
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device)
        self.images = 0  # shown so far, on all ranks together
        self.iterations = 0
        self.grow(point(config, 0))

    @property
    def point(self) -> Point:
        """Resolution, fade, batch and learning rate of the next iteration. Where the resolution is not `resolution`,
        `grow` and `refill` come first."""
        return point(self.config, self.images)

    def grow(self, to: Point) -> None:
        """Go on at another resolution: with no moments in the optimizers, and an empty queue.

        The new layers have been in all networks from the start, C′ and the averages included, and are the same there.
        """
        self._set_phase(to)
        self.engine.reset(to.lr)
        contrast = self.networks.contrast
        if contrast is not None:
            low = not self.config.model.grows or to.resolution >= LOW
            contrast.restart([layer for layer in self.config.contrast.layers if low or layer != "low"])

    @torch.no_grad()
    def refill(self, batches: Iterable[Batch]) -> None:
        """Fill the queue with keys of fresh images, at the present resolution."""
        contrast = self.networks.contrast
        if contrast is None:
            return
        missing = self.config.contrast.negatives
        for batch in batches:
            with self._autocast():
                keys, _ = contrast.keys(self._shown(batch).images)
            contrast.queue.enqueue(keys, batch.ids)
            missing -= len(batch.ids)
            if missing <= 0:
                return

    def _set_phase(self, to: Point) -> None:
        self.resolution, self.alpha = to.resolution, to.alpha
        if self.config.model.grows:
            set_phase(self.networks, Phase(to.resolution, to.alpha))

    def _shown(self, batch: Batch) -> Batch:
        """The batch as networks that are fading in see it."""
        images = cross_fade(batch.images, self.point.alpha).contiguous(memory_format=torch.channels_last)
        return Batch(images, batch.ids)

    def _autocast(self) -> AbstractContextManager:
        if self.config.train.precision == "float32" or self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def __call__(self, batch: Batch) -> Metrics:
        """Train on images [B, C, R, R] of the present resolution; returns scalars, those of the autoencoder only where
        it was stepped."""
        train, loss = self.config.train, self.config.loss
        self._set_phase(self.point)
        batch = self._shown(batch)
        self.generator.manual_seed(derive_seed(train.seed, self.rank, self.images))
        steps_autoencoder = not loss.has_gan or self.iterations % train.n_critic == 0

        metrics: Metrics = {}
        reconstruction = None
        if loss.has_gan:
            # The discriminator's step leaves the autoencoder as it is, so the reconstruction serves again after it.
            with torch.set_grad_enabled(steps_autoencoder):
                reconstruction = self._reconstruct(batch.images)
            metrics |= self._discriminator_step(batch.images, reconstruction.images.detach())
            if steps_autoencoder and loss.order == "sequential":
                metrics |= self._autoencoder_step(reconstruction)
                reconstruction = None  # the autoencoder has changed
        if steps_autoencoder:
            metrics |= self._instance_step(batch, reconstruction or self._reconstruct(batch.images))
            update_average(self.networks.decoder_average, self.networks.decoder, train.average)
        copy_buffers(self.networks.decoder_average, self.networks.decoder)
        self.images += len(batch.images) * self.ranks
        self.iterations += 1
        return metrics

    def _noise(self, n: int) -> Tensor:
        return torch.randn(n, self.config.model.latent_dim, device=self.device, generator=self.generator)

    def _reconstruct(self, images: Tensor) -> Reconstruction:
        with self._autocast():
            mean, logvar = self.networks.encoder(images)
            posterior = Posterior(widened(mean), widened(logvar))
            return Reconstruction(widened(self.networks.decoder(posterior.sample(self.generator))), posterior)

    def _discriminator_step(self, images: Tensor, rec: Tensor) -> Metrics:
        """Real images against as many prior samples and reconstructions; steps trunk and score head."""
        config = self.config.loss
        with self._autocast():
            with torch.no_grad():
                fake = widened(self.networks.decoder(self._noise(len(images))))
            scores = widened(self.networks.discriminator(torch.cat([images, fake, rec]), stddev_parts=3).score)
        real_score, fake_score, rec_score = scores.chunk(3)
        loss = discriminator_loss(real_score, fake_score, rec_score, config.adversarial, config.drift)
        metrics = {
            "loss/discriminator": loss.detach(),
            "score/real": real_score.detach().mean(),
            "score/fake": fake_score.detach().mean(),
            "score/rec": rec_score.detach().mean(),
        }
        if config.adversarial == "wgan_gp":
            penalty = lipschitz_penalty(self._gradient_norms(self._between(images, fake, rec)))
            metrics["loss/penalty"] = penalty.detach()
            loss = loss + config.penalty * penalty
        elif config.adversarial == "logistic_r1" and self.iterations % config.penalty_every == 0:
            penalty = r1_penalty(self._gradient_norms(images))
            metrics["loss/penalty"] = penalty.detach()
            loss = loss + config.penalty_every * config.penalty * penalty
        self._update(loss, "trunk", "score")
        return metrics

    def _between(self, images: Tensor, fake: Tensor, rec: Tensor) -> Tensor:
        """A random point between each real image and its sample or its reconstruction, whichever a coin says."""
        shape = (2, len(images), 1, 1, 1)
        coin, place = torch.rand(shape, device=self.device, generator=self.generator)
        return torch.lerp(images, torch.where(coin < 0.5, fake, rec), place)

    def _gradient_norms(self, images: Tensor) -> Tensor:
        """Of the score in each image, [B]."""
        images = images.detach().requires_grad_()
        with self._autocast():
            scores = widened(self.networks.discriminator(images).score)
        return gradient_norm(scores, images)

    def _adversarial_loss(self, rec: Tensor) -> Tensor:
        """How well fresh prior samples and the reconstructions pass for real; no gradient for the discriminator."""
        sampled = self.config.train.sampled_batch or len(rec)
        with self._autocast(), frozen(self.networks.discriminator):
            fake = widened(self.networks.decoder(self._noise(sampled)))
            # Statistics of the minibatch keep samples and reconstructions apart where there are as many of both.
            parts = 2 if sampled == len(rec) else 1
            scores = widened(self.networks.discriminator(torch.cat([fake, rec]), stddev_parts=parts).score)
        fake_score, rec_score = scores.split([sampled, len(rec)])
        return autoencoder_loss(fake_score, rec_score, self.config.loss.adversarial)

    def _autoencoder_step(self, rec: Reconstruction) -> Metrics:
        """The adversarial loss of the autoencoder, and KL; steps encoder and decoder."""
        loss = self._adversarial_loss(rec.images)
        kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
        self._update(loss + self.config.loss.kl_weight * kl, "encoder", "decoder")
        return {"loss/adversarial": loss.detach()}

    def _instance_step(self, batch: Batch, rec: Reconstruction) -> Metrics:
        """The reconstruction loss and KL, with the adversarial loss where the order is joint.

        Steps encoder and decoder, and for InfoNCE the trunk and the contrastive heads.
        """
        config, discriminator = self.config, self.networks.discriminator
        kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
        metrics = {"loss/kl": kl.detach(), "pixel_mse": pixel_loss(batch.images, rec.images.detach())}
        loss = config.loss.kl_weight * kl
        if config.loss.has_gan and config.loss.order == "joint":
            adversarial = self._adversarial_loss(rec.images)
            metrics["loss/adversarial"] = adversarial.detach()
            loss = loss + adversarial

        groups = ["encoder", "decoder"]
        if config.loss.instance == "contrast":
            groups += ["trunk", "heads"]
            instance, contrast_metrics = self._contrast(batch, rec.images)
            metrics |= contrast_metrics
        elif config.loss.instance == "feature":
            with self._autocast(), frozen(discriminator):
                real, fake = discriminator(batch.images, stddev_parts=0), discriminator(rec.images, stddev_parts=0)
            instance = feature_loss(real.features, fake.features, config.contrast.layers)
        else:
            instance = pixel_loss(batch.images, rec.images)
        metrics[f"loss/{config.loss.instance}"] = instance.detach()
        self._update(loss + instance, *groups)
        return metrics

    def _contrast(self, batch: Batch, rec: Tensor) -> tuple[Tensor, Metrics]:
        """InfoNCE of the reconstructions against their images and the queue, which then takes the images' keys."""
        contrast, discriminator = self.networks.contrast, self.networks.discriminator
        assert contrast is not None
        contrast.update(discriminator)
        with self._autocast():
            keys, key_critique = contrast.keys(batch.images)
            query_critique = discriminator(rec, stddev_parts=0)
            queries = contrast.embed(discriminator, query_critique)
        loss, metrics = contrast.loss(queries, keys, batch.ids)
        contrast.queue.enqueue(keys, batch.ids)

        start = self.config.contrast.local_start_images
        if contrast.local_queue is not None and start is not None and self.images >= start:
            location = torch.rand(1, device=self.device, generator=self.generator)
            query_patches = contrast.local_patches(query_critique, location)
            key_patches = contrast.local_patches(key_critique, location)
            local = contrast.local_loss(query_patches, key_patches, batch.ids)
            contrast.local_queue.enqueue(key_patches, batch.ids)
            metrics["loss/contrast_local"] = local.detach()
            loss = loss + local
        return loss, metrics

    def _update(self, loss: Tensor, *groups: str) -> None:
        self.engine.backward(loss, groups)
        self.engine.step(groups)

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
        there = point(self.config, state["images"])
        self.grow(there._replace(resolution=state["resolution"], alpha=state["alpha"]))
        self.images, self.iterations = state["images"], state["iterations"]
        self.networks.load_state_dict(state["networks"])
        self.engine.load_state_dict(state["optimizers"])
