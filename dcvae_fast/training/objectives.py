"""The objectives of DC-VAE (Eq. 9) as pure functions: networks, inputs and loss settings → a loss and detached metrics.

Encoder E and decoder G reconstruct an image x as G(z), with z drawn from q(z|x). Discriminator C separates real images
from prior samples and reconstructions (set level). The momentum discriminator C′, an EMA of C, computes the keys of the
contrastive loss, which matches each reconstruction with its own image (instance level). `step.py` calls the functions
in order and steps the parameters.
"""

from collections.abc import Sequence
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
    """Images G(z) [B, C, R, R] with z drawn from q(z|x), and the posterior q(z|x)."""

    images: Tensor
    posterior: Posterior


class Inputs(NamedTuple):
    """Inputs of one objective: images and the noise that the objective needs.

    Attributes:
        images: [B, C, R, R] in [-1, 1]
        ids: image ids, int64 [B]
        noise: standard normal [B, Z]; z = mean + std · noise
        prior: latents [B', Z] of prior samples; None without prior samples
        interpolation: uniform [B, 2, 1, 1, 1], for WGAN-GP's gradient penalty; None for other losses
        keys: momentum features of the images, for the instance objective
        reconstruction: the reconstruction with `noise` if already computed, so that two objectives can share it
    """

    images: Tensor
    ids: Tensor
    noise: Tensor
    prior: Tensor | None = None
    interpolation: Tensor | None = None
    keys: Keys | None = None
    reconstruction: Reconstruction | None = None

    def micro_batches(self, size: int | None) -> list["Inputs"]:
        """Split into micro-batches of `size` images, without `reconstruction`; None does not split."""
        if size is None or size >= len(self.images):
            return [self]
        micro_batches = []
        for start in range(0, len(self.images), size):
            rows = slice(start, start + size)
            prior = None if self.prior is None else self.prior[rows]
            interpolation = None if self.interpolation is None else self.interpolation[rows]
            keys = None if self.keys is None else self.keys.select(rows)
            inputs = Inputs(self.images[rows], self.ids[rows], self.noise[rows], prior, interpolation, keys)
            micro_batches.append(inputs)
        return micro_batches


def reconstruct(networks: Networks, inputs: Inputs) -> Reconstruction:
    """Encode the images, sample the posterior and decode, unless `inputs.reconstruction` is set."""
    if inputs.reconstruction is not None:
        return inputs.reconstruction
    mean, logvar = networks.encoder(inputs.images)
    posterior = Posterior(upcast(mean), upcast(logvar))
    return Reconstruction(upcast(networks.decoder(posterior.at(inputs.noise))), posterior)


def discriminator_objective(
    networks: Networks, inputs: Inputs, loss: LossConfig, r1: bool = False
) -> tuple[Tensor, Metrics]:
    """Loss of C: real images against prior samples and reconstructions (Eq. 4), plus a gradient penalty.

    Args:
        networks: E and G receive no gradient.
        inputs: requires `prior`, and for WGAN-GP `interpolation`.
        loss: loss settings.
        r1: whether to add the R1 penalty in this iteration.
    """
    images = inputs.images
    with torch.no_grad():
        fake = upcast(networks.decoder(inputs.prior))
        rec = reconstruct(networks, inputs).images.detach()
    real_score, fake_score, rec_score = _scores(networks, (images, fake, rec), loss)
    total = discriminator_loss(real_score, fake_score, rec_score, loss.adversarial, loss.drift)
    metrics = {
        "loss/discriminator": total.detach(),
        "score/real": real_score.detach().mean(),
        "score/fake": fake_score.detach().mean(),
        "score/rec": rec_score.detach().mean(),
    }
    if inputs.interpolation is not None:
        # Interpolate each image with its prior sample or its reconstruction, chosen at random per image.
        choice, position = inputs.interpolation.unbind(1)
        interpolated = torch.lerp(images, torch.where(choice < 0.5, fake, rec), position)
        penalty, weight = lipschitz_penalty(_score_gradient_norms(networks, interpolated)), loss.penalty
    elif r1:
        penalty, weight = r1_penalty(_score_gradient_norms(networks, images)), loss.penalty_every * loss.penalty
    else:
        return total, metrics
    metrics["loss/penalty"] = penalty.detach()
    return total + weight * penalty, metrics


def adversarial_objective(networks: Networks, inputs: Inputs, loss: LossConfig) -> tuple[Tensor, Metrics]:
    """Loss of E and G: C should score prior samples and reconstructions as real (Eq. 4), plus KL (Eq. 8)."""
    fake = upcast(networks.decoder(inputs.prior))
    rec = reconstruct(networks, inputs)
    adversarial = _adversarial_loss(networks, fake, rec.images, loss)
    kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
    return adversarial + loss.kl_weight * kl, {"loss/adversarial": adversarial.detach()}


def instance_objective(networks: Networks, inputs: Inputs, loss: LossConfig) -> tuple[Tensor, Metrics]:
    """Loss of E and G, and with InfoNCE also of C: each reconstruction should match its own image, plus KL (Eq. 8).

    The instance loss is InfoNCE (Eq. 6), or in the ablations of Table 1 the L2 distance of features (Eq. 3) or pixels
    (Eq. 1). If `inputs.prior` is set, the adversarial loss is added, and the sum is Eq. 9.
    """
    fake = None if inputs.prior is None else upcast(networks.decoder(inputs.prior))
    rec = reconstruct(networks, inputs)
    kl = kl_divergence(rec.posterior.mean, rec.posterior.logvar)
    metrics = {"loss/kl": kl.detach(), "pixel_mse": pixel_loss(inputs.images, rec.images.detach())}
    total = loss.kl_weight * kl
    if fake is not None:
        adversarial = _adversarial_loss(networks, fake, rec.images, loss)
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


def _adversarial_loss(networks: Networks, fake: Tensor, rec: Tensor, loss: LossConfig) -> Tensor:
    """Adversarial loss of E and G for prior samples and reconstructions. C receives no gradient."""
    with frozen(networks.discriminator):
        fake_score, rec_score = _scores(networks, (fake, rec), loss)
    return autoencoder_loss(fake_score, rec_score, loss.adversarial)


def _scores(networks: Networks, sets: tuple[Tensor, ...], loss: LossConfig) -> Sequence[Tensor]:
    """Return C's scores of several sets of images, in one pass or, if `loss.passes` is separate, in one pass each."""
    if loss.passes == "separate":
        return [upcast(networks.discriminator(images, layers=()).score) for images in sets]
    scores = upcast(networks.discriminator(torch.cat(sets), stddev_parts=len(sets), layers=()).score)
    return scores.split([len(images) for images in sets])


def _feature_loss(networks: Networks, images: Tensor, rec: Tensor) -> Tensor:
    """L2 distance of C's features of images and reconstructions (Eq. 3). C receives no gradient."""
    with frozen(networks.discriminator):
        real, fake = (
            networks.discriminator(x, stddev_parts=0, layers=networks.layers, scored=False) for x in (images, rec)
        )
    return feature_loss(real.features, fake.features, networks.layers)


def _score_gradient_norms(networks: Networks, images: Tensor) -> Tensor:
    """Per-image norm of ∂score/∂image, [B]. Computed in float32, because the gradients of single pixels are small."""
    images = images.detach().requires_grad_()
    with uncompiled(), no_autocast(images.device):
        return gradient_norm(networks.discriminator(images, layers=()).score, images)
