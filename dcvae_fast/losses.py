"""Adversarial losses, KL divergence and reconstruction losses: pure functions of tensors that return scalars.

Scores are outputs of the discriminator, [B], high for real images. The numbers of real, fake and reconstructed images
can differ. Inputs can have any floating-point dtype; losses are computed and returned in at least float32, because
squares and exponentials overflow in float16.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dcvae_fast.models.layers import upcast

Adversarial = Literal["hinge", "log", "wgan_gp", "logistic_r1"]


def discriminator_loss(
    real: Tensor, fake: Tensor, rec: Tensor, kind: Adversarial = "hinge", drift: float = 1e-3
) -> Tensor:
    """Loss of the discriminator, without penalties: real images against prior samples and reconstructions.

    `hinge` is the loss of the authors' code, `log` the negative of Eq. 4, and `wgan_gp` the loss of Progressive GAN,
    whose `drift` term keeps the scores of real images near 0. `logistic_r1` is `log` with weight ½ for prior samples
    and for reconstructions, as in `hinge` and `wgan_gp`.
    """
    real, fake, rec = upcast(real), upcast(fake), upcast(rec)
    match kind:
        case "hinge":
            return F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean() + 0.5 * F.relu(1 + rec).mean()
        case "log":
            return F.softplus(-real).mean() + F.softplus(fake).mean() + F.softplus(rec).mean()
        case "wgan_gp":
            return 0.5 * fake.mean() + 0.5 * rec.mean() - real.mean() + drift * real.square().mean()
        case "logistic_r1":
            return F.softplus(-real).mean() + 0.5 * F.softplus(fake).mean() + 0.5 * F.softplus(rec).mean()


def autoencoder_loss(fake: Tensor, rec: Tensor, kind: Adversarial = "hinge") -> Tensor:
    """Adversarial loss of encoder and decoder.

    `hinge` and `wgan_gp`: −½ mean C(fake) − ½ mean C(rec). `log`: −log D, because log(1 − D) of Eq. 4 saturates.
    `logistic_r1`: half of `log`.
    """
    fake, rec = upcast(fake), upcast(rec)
    match kind:
        case "hinge" | "wgan_gp":
            return -0.5 * fake.mean() - 0.5 * rec.mean()
        case "log":
            return F.softplus(-fake).mean() + F.softplus(-rec).mean()
        case "logistic_r1":
            return 0.5 * F.softplus(-fake).mean() + 0.5 * F.softplus(-rec).mean()


def gradient_norm(scores: Tensor, images: Tensor) -> Tensor:
    """Per-image gradient norm ‖∂C/∂x‖, [B], in float32 or float64; differentiable.

    Args:
        scores: [B]; each must depend only on its own image (minibatch statistics aside).
        images: [B, C, H, W] with requires_grad, from which the scores were computed.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return torch.linalg.vector_norm(
        gradient.flatten(1), dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32)
    )


def lipschitz_penalty(norms: Tensor) -> Tensor:
    """WGAN-GP's penalty: mean (norm − 1)² of gradient norms [B] at interpolations of real and generated images."""
    return (norms - 1).square().mean()


def r1_penalty(norms: Tensor) -> Tensor:
    """R1 penalty: half the mean square of gradient norms [B] at real images."""
    return 0.5 * norms.square().mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL[q(z|x) || N(0, I)] in nats, for mean and logvar [B, Z]: summed over Z, averaged over the batch."""
    mean, logvar = upcast(mean), upcast(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()


def pixel_loss(images: Tensor, rec: Tensor) -> Tensor:
    """Mean squared error of images in [-1, 1] (reconstruction term of Eq. 1, divided by the number of values)."""
    return F.mse_loss(upcast(rec), upcast(images))


def feature_loss(real: dict[str, Tensor], rec: dict[str, Tensor], layers: tuple[str, ...]) -> Tensor:
    """Mean squared error of the discriminator's features of images and reconstructions, averaged over layers.

    This is the reconstruction term of Eq. 3, divided by the number of values. `real` receives no gradient.
    """
    return torch.stack([F.mse_loss(upcast(rec[layer]), upcast(real[layer].detach())) for layer in layers]).mean()
