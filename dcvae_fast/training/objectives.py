"""The objectives of DC-VAE (Eq. 9): networks, inputs and loss settings → a loss and detached metrics.

Encoder E and decoder G make a reconstruction of an image x: G(z) with z drawn from q(z|x). Discriminator C tells real
images from prior samples and reconstructions (set level). C′, its moving average, makes the keys by which each
reconstruction is recognised among other images (instance level). The functions have no state: `step.py` calls them in
order and steps the parameters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dcvae_fast.config import LossConfig
from dcvae_fast.contrast import Keys
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
from dcvae_fast.models.dcvae import Posterior
from dcvae_fast.models.layers import frozen, no_autocast, upcast
from dcvae_fast.training.compiled import uncompiled
from dcvae_fast.training.networks import Networks

Metrics = dict[str, Tensor]


class Reconstruction(NamedTuple):
    """G(z) [B, C, R, R] for z drawn from q(z|x), and q(z|x)."""

    images: Tensor
    posterior: Posterior


class Inputs(NamedTuple):
    """The part of a batch, and of an iteration's noise, that one objective sees.

    Attributes:
        images: [B, C, R, R] in [-1, 1]
        ids: int64 [B], of the images
        noise: [B, Z], which draws z from the posterior
        prior: latents [B', Z] of prior samples; None where there are none
        interpolation: uniform [B, 2, 1, 1, 1], where WGAN-GP penalises gradients; None for other losses
        keys: of the images, for the instance objective
        reconstruction: of the images, if already computed from `noise`: two objectives in a row share one
    """

    images: Tensor
    ids: Tensor
    noise: Tensor
    prior: Tensor | None = None
    interpolation: Tensor | None = None
    keys: Keys | None = None
    reconstruction: Reconstruction | None = None

    def micro_batches(self, size: int | None) -> list["Inputs"]:
        """Cut into micro-batches of `size` images, without a shared reconstruction; None leaves the batch whole."""
        if size is None or size >= len(self.images):
            return [self]
        parts = []
        for begin in range(0, len(self.images), size):
            cut = slice(begin, begin + size)
            prior = None if self.prior is None else self.prior[cut]
            interpolation = None if self.interpolation is None else self.interpolation[cut]
            keys = None if self.keys is None else self.keys.part(cut)
            parts.append(Inputs(self.images[cut], self.ids[cut], self.noise[cut], prior, interpolation, keys))
        return parts


def reconstruct(networks: Networks, inputs: Inputs) -> Reconstruction:
    """Encode the images, draw from the posterior, decode."""
    if inputs.reconstruction is not None:
        return inputs.reconstruction
    mean, logvar = networks.encoder(inputs.images)
    posterior = Posterior(upcast(mean), upcast(logvar))
    return Reconstruction(upcast(networks.decoder(posterior.at(inputs.noise))), posterior)


def discriminator_objective(
    networks: Networks, inputs: Inputs, loss: LossConfig, r1: bool = False
) -> tuple[Tensor, Metrics]:
    """Loss of C: real images against prior samples and reconstructions (Eq. 4), with a gradient penalty.

    Args:
        networks: E and G are constants here.
        inputs: with `prior`, and for WGAN-GP `interpolation`.
        loss: settings.
        r1: whether this iteration takes the R1 penalty.
    """
    images = inputs.images
    with torch.no_grad():
        rec = reconstruct(networks, inputs).images.detach()
        fake = upcast(networks.decoder(inputs.prior))
    scores = upcast(networks.discriminator(torch.cat([images, fake, rec]), stddev_parts=3, layers=()).score)
    real_score, fake_score, rec_score = scores.chunk(3)
    total = discriminator_loss(real_score, fake_score, rec_score, loss.adversarial, loss.drift)
    metrics = {
        "loss/discriminator": total.detach(),
        "score/real": real_score.detach().mean(),
        "score/fake": fake_score.detach().mean(),
        "score/rec": rec_score.detach().mean(),
    }
    if inputs.interpolation is not None:
        # Between each image and its sample or its reconstruction, one of them chosen at random per image.
        coin, position = inputs.interpolation.unbind(1)
        between = torch.lerp(images, torch.where(coin < 0.5, fake, rec), position)
        penalty, weight = lipschitz_penalty(_score_gradient_norms(networks, between)), loss.penalty
    elif r1:
        penalty, weight = r1_penalty(_score_gradient_norms(networks, images)), loss.penalty_every * loss.penalty
    else:
        return total, metrics
    metrics["loss/penalty"] = penalty.detach()
    return total + weight * penalty, metrics


def adversarial_objective(networks: Networks, inputs: Inputs, loss: LossConfig) -> tuple[Tensor, Metrics]:
    """Loss of E and G: prior samples and reconstructions should score as real images (Eq. 4); plus KL (Eq. 8)."""
    rec = reconstruct(networks, inputs)
    adversarial = _adversarial_loss(networks, rec.images, inputs.prior, loss)
    kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
    return adversarial + loss.kl_weight * kl, {"loss/adversarial": adversarial.detach()}


def instance_objective(networks: Networks, inputs: Inputs, loss: LossConfig) -> tuple[Tensor, Metrics]:
    """Loss of E and G, and with InfoNCE also of C: each reconstruction should match its own image; plus KL (Eq. 8).

    The match is InfoNCE (Eq. 6), or for the ablations of Table 1 the L2 distance of features (Eq. 3) or pixels (Eq. 1).
    With `inputs.prior` the adversarial loss belongs to the same step, which then minimises Eq. 9 as a whole.
    """
    rec = reconstruct(networks, inputs)
    kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
    metrics = {"loss/kl": kl.detach(), "pixel_mse": pixel_loss(inputs.images, rec.images.detach())}
    total = loss.kl_weight * kl
    if inputs.prior is not None:
        adversarial = _adversarial_loss(networks, rec.images, inputs.prior, loss)
        metrics["loss/adversarial"] = adversarial.detach()
        total = total + adversarial
    match loss.instance:
        case "contrast":
            contrast, keys = networks.contrast, inputs.keys
            assert contrast is not None and keys is not None
            instance, contrast_metrics = contrast.loss(networks.discriminator, rec.images, keys, inputs.ids)
            metrics |= contrast_metrics
        case "feature":
            instance = _feature_loss(networks, inputs.images, rec.images)
        case "pixel":
            instance = pixel_loss(inputs.images, rec.images)
    metrics[f"loss/{loss.instance}"] = instance.detach()
    return total + instance, metrics


def _adversarial_loss(networks: Networks, rec: Tensor, prior: Tensor | None, loss: LossConfig) -> Tensor:
    """How far prior samples and reconstructions are from scoring as real; C is a constant."""
    with frozen(networks.discriminator):
        fake = upcast(networks.decoder(prior))
        scores = upcast(networks.discriminator(torch.cat([fake, rec]), stddev_parts=2, layers=()).score)
    fake_score, rec_score = scores.split([len(fake), len(rec)])
    return autoencoder_loss(fake_score, rec_score, loss.adversarial)


def _feature_loss(networks: Networks, images: Tensor, rec: Tensor) -> Tensor:
    """L2 between features of images and reconstructions in C (Eq. 3); C is a constant."""
    with frozen(networks.discriminator):
        real, fake = (
            networks.discriminator(x, stddev_parts=0, layers=networks.layers, scored=False) for x in (images, rec)
        )
    return feature_loss(real.features, fake.features, networks.layers)


def _score_gradient_norms(networks: Networks, images: Tensor) -> Tensor:
    """Per-image norm of ∂score/∂image, [B]; in float32, because the gradients of single pixels are small."""
    images = images.detach().requires_grad_()
    with uncompiled(), no_autocast(images.device):
        return gradient_norm(networks.discriminator(images, layers=()).score, images)
