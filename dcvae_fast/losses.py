"""Adversarial losses, KL divergence and reconstruction losses: pure functions of tensors, each a scalar.

Scores are the discriminator's, [B], high for real; numbers of real, fake and reconstructed images may differ.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Adversarial = Literal["hinge", "log", "wgan_gp", "logistic_r1"]


def discriminator_loss(
    real: Tensor, fake: Tensor, rec: Tensor, kind: Adversarial = "hinge", drift: float = 1e-3
) -> Tensor:
    """What the discriminator minimises, but penalties: real against prior samples and reconstructions.

    `hinge` is the authors' code; `log` is the negative of Eq. 4; `wgan_gp` is Progressive GAN's, whose `drift` keeps
    the scores of real images near 0; `logistic_r1` is `log` with the two kinds of fakes at half weight each, which all
    but `log` have.
    """
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
    """What encoder and decoder minimise against the discriminator.

    `hinge` and `wgan_gp`: −½ mean C(fake) − ½ mean C(rec). `log`: −log D instead of Eq. 4's log(1 − D), which
    saturates; `logistic_r1` is half of that.
    """
    match kind:
        case "hinge" | "wgan_gp":
            return -0.5 * fake.mean() - 0.5 * rec.mean()
        case "log":
            return F.softplus(-fake).mean() + F.softplus(-rec).mean()
        case "logistic_r1":
            return 0.5 * F.softplus(-fake).mean() + 0.5 * F.softplus(-rec).mean()


def gradient_norm(scores: Tensor, images: Tensor) -> Tensor:
    """‖∂C/∂x‖ of each image, [B], in float32 at least; itself differentiable.

    Args:
        scores: [B], each of its own image alone (but for the minibatch's statistics).
        images: [B, C, H, W], of which the scores were computed, with requires_grad.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return torch.linalg.vector_norm(
        gradient.flatten(1), dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32)
    )


def lipschitz_penalty(norms: Tensor) -> Tensor:
    """WGAN-GP's, of gradient norms between real and generated images: their mean squared distance from 1."""
    return (norms - 1).square().mean()


def r1_penalty(norms: Tensor) -> Tensor:
    """Of gradient norms at real images: half their mean square."""
    return 0.5 * norms.square().mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL[q(z|x) || N(0, I)], mean and logvar [B, Z]: summed over the latent, averaged over the batch, in nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()


def pixel_loss(images: Tensor, rec: Tensor) -> Tensor:
    """Mean squared error on [-1, 1] (the reconstruction term of Eq. 1, divided by the number of values)."""
    return F.mse_loss(rec, images)


def feature_loss(real: dict[str, Tensor], rec: dict[str, Tensor], layers: tuple[str, ...]) -> Tensor:
    """Mean squared error between the discriminator's features of images and reconstructions, averaged over layers.

    The reconstruction term of Eq. 3, divided by the number of values; no gradient reaches the features of the images.
    """
    return torch.stack([F.mse_loss(rec[layer], real[layer].detach()) for layer in layers]).mean()
