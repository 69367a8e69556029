"""One training iteration: discriminator, autoencoder, instance loss. Knows no files, no clock, no command line.

Nothing here waits for the device: metrics are tensors on it, detached.
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcvae_fast.config import Config
from dcvae_fast.contrast import InstanceContrast
from dcvae_fast.losses import autoencoder_loss, discriminator_loss, feature_loss, kl_divergence, pixel_loss
from dcvae_fast.models.autogan import Decoder, Discriminator, Encoder
from dcvae_fast.models.dcvae import Posterior
from dcvae_fast.models.layers import copy_buffers, frozen, update_average
from dcvae_fast.training.engine import Engine
from dcvae_fast.training.seeding import derive_seed
from dcvae_pipelines import Batch

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
            self.encoder = Encoder(m.latent_dim, m.encoder_width, m.image_channels)
            self.decoder = Decoder(m.latent_dim, m.decoder_width, m.image_channels)
            self.discriminator = Discriminator(m.discriminator_width, m.image_channels, m.contrast_dim)
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
        )
        # The meta device, on which a plan is made, has no generator of its own and draws nothing.
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device)
        self.images = 0  # shown so far, on all ranks together

    def __call__(self, batch: Batch) -> Metrics:
        """Train on images [B, C, H, W]; returns scalars, those of the autoencoder only where it was stepped."""
        train, loss = self.config.train, self.config.loss
        batch = Batch(batch.images.contiguous(memory_format=torch.channels_last), batch.ids)
        self.generator.manual_seed(derive_seed(train.seed, self.rank, self.images))
        iteration = self.images // (train.batch * self.ranks)
        steps_autoencoder = not loss.has_gan or iteration % train.n_critic == 0

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
        return metrics

    def _noise(self, n: int) -> Tensor:
        return torch.randn(n, self.config.model.latent_dim, device=self.device, generator=self.generator)

    def _reconstruct(self, images: Tensor) -> Reconstruction:
        posterior = Posterior(*self.networks.encoder(images))
        return Reconstruction(self.networks.decoder(posterior.sample(self.generator)), posterior)

    def _discriminator_step(self, images: Tensor, rec: Tensor) -> Metrics:
        """Real images against as many prior samples and reconstructions; steps trunk and score head."""
        with torch.no_grad():
            fake = self.networks.decoder(self._noise(len(images)))
        scores = self.networks.discriminator(torch.cat([images, fake, rec])).score
        real_score, fake_score, rec_score = scores.chunk(3)
        loss = discriminator_loss(real_score, fake_score, rec_score, self.config.loss.adversarial)
        self._update(loss, "trunk", "score")
        return {
            "loss/discriminator": loss.detach(),
            "score/real": real_score.detach().mean(),
            "score/fake": fake_score.detach().mean(),
            "score/rec": rec_score.detach().mean(),
        }

    def _adversarial_loss(self, rec: Tensor) -> Tensor:
        """How well fresh prior samples and the reconstructions pass for real; no gradient for the discriminator."""
        fake = self.networks.decoder(self._noise(self.config.train.sampled_batch))
        with frozen(self.networks.discriminator):
            scores = self.networks.discriminator(torch.cat([fake, rec])).score
        fake_score, rec_score = scores.split([len(fake), len(rec)])
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
            with frozen(discriminator):
                real, fake = discriminator(batch.images), discriminator(rec.images)
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
        keys, key_critique = contrast.keys(batch.images)
        query_critique = discriminator(rec)
        queries = discriminator.embed(query_critique, self.config.contrast.layers)
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
        return {"images": self.images, "networks": self.networks.state_dict(), "optimizers": self.engine.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images = state["images"]
        self.networks.load_state_dict(state["networks"])
        self.engine.load_state_dict(state["optimizers"])
