"""Linear classifier on latents (Table 6)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from dcvae_fast.errors import EvaluationError
from dcvae_fast.models.dcvae import DCVAE
from dcvae_pipelines import ImageSet
from dcvae_pipelines.pixels import normalize

STEPS, BATCH, LEARNING_RATE = 1000, 512, 0.05


@torch.no_grad()
def posterior_means(model: DCVAE, parts: Iterable[ImageSet], batch: int) -> tuple[Tensor, Tensor]:
    """Posterior means float32 [N, Z] of the labelled images, and their labels int64 [N], on the CPU.

    Raises:
        EvaluationError: a part has no labels.
    """
    means, labels = [], []
    for part in parts:
        part_labels = check_labels(part)
        is_labelled = part_labels >= 0
        labels.append(part_labels[is_labelled])
        for pixels in part.images[is_labelled].split(batch):
            means.append(model.encode(normalize(pixels.to(model.device))).mean.float().cpu())
    return torch.cat(means), torch.cat(labels)


def check_labels(images: ImageSet) -> Tensor:
    """Return the labels.

    Raises:
        EvaluationError: the images have no labels.
    """
    if images.labels is None:
        raise EvaluationError(f"a probe needs labels, which {images.name} does not have.")
    return images.labels


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, trials: int = 5, seed: int = 0, device: torch.device
) -> Tensor:
    """Train linear classifiers on the training latents, and return their error rates [trials] on the test latents.

    Softmax regression on latents normalised to mean 0 and variance 1, with Adam and a learning rate that decays to 0.
    Trials differ in initialisation and mini-batches, and are trained in parallel.

    Args:
        train, test: latents float32 [N, Z] and classes int64 [N].
        trials: number of classifiers.
        seed: seed of the initialisation and mini-batches.
        device: device to train on.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, scale = train[0].mean(0), train[0].std(0).clamp_min(1e-8)
    latents, test_latents = (((split[0] - mean) / scale).to(device) for split in (train, test))
    labels, count, size = train[1].to(device), len(train[0]), train[0].shape[1]
    classes = int(max(train[1].max(), test[1].max())) + 1
    weight_TZC = torch.randn(trials, size, classes, generator=generator).div(size**0.5).to(device).requires_grad_()
    bias_T1C = torch.zeros(trials, 1, classes, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight_TZC, bias_T1C], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        indices_TB = torch.randint(count, (trials, min(BATCH, count)), generator=generator).to(device)
        logits_TBC = torch.baddbmm(bias_T1C, latents[indices_TB], weight_TZC)
        # Sum of the trials' mean losses.
        loss = trials * F.cross_entropy(logits_TBC.flatten(0, 1), labels[indices_TB].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights, biases = weight_TZC.detach(), bias_T1C.detach()
    predicted_TN = torch.baddbmm(biases, test_latents.expand(trials, -1, -1), weights).argmax(2)
    return (predicted_TN.cpu() != test[1]).double().mean(1)


def half_width(values: Tensor) -> float:
    """Half width of the 95 % confidence interval of the mean of [N], by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5)
