"""Distances between images and their reconstructions, and perceptual path length."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcvae_fast.evaluation.images import Noise
from dcvae_fast.evaluation.pretrained import Extractor, find_weights, read_weights
from dcvae_fast.models.dcvae import DCVAE

# Statistics of ImageNet's RGB images on [0, 1] and, for Caffe's networks, on 0–255.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68, 116.779, 103.939)

PPL_EPSILON = 1e-4
PPL_LARGEST = 256  # pixels, limit of the images given to LPIPS; its VGG16 was trained on 224


def inference_batch_size(resolution: int) -> int:
    """Return a batch size that needs little memory: 256 at 32×32, 1 from 512×512."""
    return max(1, 256 * 32**2 // resolution**2)


def pixel_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Mean squared error on [-1, 1] between real images and reconstructions, in batches [B, C, R, R] of both.

    Returns:
        The error and the number of images.
    """
    total, elements, count = torch.zeros((), dtype=torch.float64), 0, 0
    for real, reconstructed in pairs:
        total += (reconstructed - real).square().double().sum().cpu()
        elements += real.numel()
        count += len(real)
    return total.item() / elements, count


def pixel_distances(error: float, pixels: int) -> dict[str, float]:
    """Convert a mean squared error to the three units that Tables 1 and 8 could use.

    Args:
        error: mean squared error on [-1, 1].
        pixels: values per image, in all channels.

    Returns:
        pixel_mse: on [-1, 1]. pixel_squares: sum of squares per image on [0, 1], averaged over images. pixel_rmse:
        root mean square on 0–255.
    """
    return {"pixel_mse": error, "pixel_squares": error / 4 * pixels, "pixel_rmse": error**0.5 * 127.5}


def load_vgg16(weights: Path | None = None) -> Extractor:
    """Load torchvision's VGG16 up to relu4_3, with weights from a folder, or downloaded.

    Raises:
        EvaluationError: the weights are missing, damaged or cannot be downloaded.
    """
    from torchvision.models import VGG16_Weights, vgg16

    state = read_weights(find_weights(VGG16_Weights.IMAGENET1K_V1.url, weights))
    with torch.device("meta"):  # the later layers are large and not needed
        layers = nn.Sequential(*list(vgg16().features.children())[:23])
    features_state = {name.removeprefix("features."): value for name, value in state.items()}
    layers.load_state_dict({name: features_state[name] for name in layers.state_dict()}, assign=True)
    return Extractor("vgg16 relu4_3", layers.eval().requires_grad_(False))


@torch.no_grad()
def perceptual_distances(pairs: Iterable[tuple[Tensor, Tensor]], extractor: Extractor) -> tuple[dict[str, float], int]:
    """Mean squared difference of features, over all their elements (Tables 1 and 8).

    The paper does not say how images are scaled for VGG16, so there are two numbers: with ImageNet's mean and standard
    deviation, as in the training of torchvision's weights; and on 0–255 minus the mean, as for Caffe's weights.

    Args:
        pairs: batches [B, C, R, R] in [-1, 1] of real images and reconstructions; grey images are repeated to RGB.
        extractor: images [B, 3, R, R] → features.

    Returns:
        perceptual_imagenet and perceptual_caffe, and the number of images.
    """
    totals, elements, count = torch.zeros(2, dtype=torch.float64), 0, 0
    for pair in pairs:
        images = torch.cat(pair).expand(-1, 3, -1, -1).add(1)  # [0, 2]
        imagenet = (images / 2 - _per_channel(IMAGENET_MEAN, images)) / _per_channel(IMAGENET_STD, images)
        caffe = images * 127.5 - _per_channel(CAFFE_MEAN, images)
        for i, scaled in enumerate((imagenet, caffe)):
            real, reconstructed = extractor.network(scaled).chunk(2)
            totals[i] += (reconstructed - real).square().double().sum().cpu()
        elements += real.numel()
        count += len(pair[0])
    return dict(zip(("perceptual_imagenet", "perceptual_caffe"), (totals / elements).tolist(), strict=True)), count


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None, None]


@torch.no_grad()
def path_lengths(model: DCVAE, lpips: Extractor, pairs: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield squared LPIPS distances over ε² for short steps on paths between draws from the prior (Table 7).

    This is StyleGAN's path length in the input space: a step of ε from a uniformly drawn point on the great circle
    between two latents, on the sphere where the prior concentrates.

    Args:
        model: a model of images of 32×32 or more.
        lpips: two batches [B, 3, H, W] with values 0–255 → distances [B].
        pairs: number of steps.
        batch: steps per batch.
        seed: seed of the latents.

    Yields:
        float32 [≤ batch], `pairs` in all.
    """
    size = model.config.latent_dim
    noise = Noise(2 * size + 1, seed)
    for start in range(0, pairs, batch):
        rows = noise.take(min(batch, pairs - start)).double()
        begin, end, t = rows.split([size, size, 1], dim=1)
        t = torch.special.ndtr(t)  # uniform in [0, 1]
        # In float64, because the ends of a step differ by only ε of the angle.
        ends = torch.cat([slerp(begin, end, t), slerp(begin, end, t + PPL_EPSILON)]) * size**0.5
        images = face(model.decode(ends.float().to(model.device)).float().expand(-1, 3, -1, -1))
        yield (lpips.network(*images.add(1).mul(127.5).chunk(2)) / PPL_EPSILON**2).flatten().cpu()


def slerp(begin: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation between the directions of `begin` and `end` [B, Z], with t [B, 1] from 0 to 1."""
    begin, end = F.normalize(begin, dim=1), F.normalize(end, dim=1)
    angle = t * (begin * end).sum(1, keepdim=True).clamp(-1, 1).acos()
    across = F.normalize(end - (begin * end).sum(1, keepdim=True) * begin, dim=1)
    return begin * angle.cos() + across * angle.sin()


def face(images: Tensor) -> Tensor:
    """Crop [B, C, R, R] to StyleGAN's face region, half as wide and high, and downscale it if larger than 256×256."""
    eighth = images.shape[-1] // 8
    part = images[..., 3 * eighth : 7 * eighth, 2 * eighth : 6 * eighth]
    return F.avg_pool2d(part, max(1, part.shape[-1] // PPL_LARGEST))


def trimmed_mean(lengths: Tensor) -> float:
    """Mean of [N] without values below the 1st or above the 99th percentile."""
    lengths = lengths.double()
    lowest = torch.quantile(lengths, 0.01, interpolation="lower")
    highest = torch.quantile(lengths, 0.99, interpolation="higher")
    return lengths[(lengths >= lowest) & (lengths <= highest)].mean().item()
