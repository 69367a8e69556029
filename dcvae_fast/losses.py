"""Adversarial losses, KL divergence and reconstruction losses: pure functions of tensors, each a scalar.

Scores are the discriminator's, [B], high for real; numbers of real, fake and reconstructed images may differ.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Adversarial = Literal["hinge", "log"]


def discriminator_loss(real: Tensor, fake: Tensor, rec: Tensor, kind: Adversarial = "hinge") -> Tensor:
    """What the discriminator minimises: real against prior samples and reconstructions.

    `hinge` is the authors' code, the two kinds of fakes at half weight each; `log` is the negative of Eq. 4.
    """
    if kind == "hinge":
        return F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean() + 0.5 * F.relu(1 + rec).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean() + F.softplus(rec).mean()


def autoencoder_loss(fake: Tensor, rec: Tensor, kind: Adversarial = "hinge") -> Tensor:
    """What encoder and decoder minimise against the discriminator.

    `hinge`: −½ mean C(fake) − ½ mean C(rec). `log`: −log D instead of Eq. 4's log(1 − D), which saturates.
    """
    if kind == "hinge":
        return -0.5 * fake.mean() - 0.5 * rec.mean()
    return F.softplus(-fake).mean() + F.softplus(-rec).mean()


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
