"""Linear classifier on latents (Table 6)."""

import torch
from torch import Tensor

from dcvae_fast.models.dcvae import DCVAE
from dcvae_pipelines import ImageSet


@torch.no_grad()
def posterior_means(model: DCVAE, images: Tensor, batch: int = 256) -> Tensor:
    """Images uint8 [N, C, H, W] → posterior means [N, Z] on the CPU."""
    parts = [model.encode(part.to(model.device).float() / 127.5 - 1).mean.cpu() for part in images.split(batch)]
    return torch.cat(parts)


def linear_probe(model: DCVAE, train: ImageSet, test: ImageSet) -> float:
    """Share of test images that logistic regression on the frozen posterior means names rightly.

    Raises:
        ValueError: a set has no labels.
    """
    if train.labels is None or test.labels is None:
        raise ValueError("a linear probe needs labels")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(posterior_means(model, train.images).numpy(), train.labels.numpy())
    return float(classifier.score(posterior_means(model, test.images).numpy(), test.labels.numpy()))
