"""Distances between images and their reconstructions, and how smoothly images follow the latent."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcvae_fast.evaluation.images import Noise
from dcvae_fast.evaluation.pretrained import Extractor, find_weights, read_weights
from dcvae_fast.models.dcvae import DCVAE

# Of ImageNet's images, RGB, on [0, 1] and, as Caffe's networks have it, on 0–255.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68, 116.779, 103.939)

PPL_EPSILON = 1e-4
PPL_LARGEST = 256  # pixels that LPIPS is shown: its VGG16 was trained on 224


def images_at_once(resolution: int) -> int:
    """As many as need little memory: 256 at 32×32, 1 from 512×512 on."""
    return max(1, 256 * 32**2 // resolution**2)


def pixel_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Mean squared error on [-1, 1] between real images and reconstructions, batches [B, C, R, R] of both; and of how
    many images."""
    total, elements, count = torch.zeros((), dtype=torch.float64), 0, 0
    for real, reconstructed in pairs:
        total += (reconstructed - real).square().double().sum().cpu()
        elements += real.numel()
        count += len(real)
    return total.item() / elements, count


def pixel_distances(error: float, pixels: int) -> dict[str, float]:
    """The same error in the three units that Tables 1 and 8 may have.

    Args:
        error: mean squared, on [-1, 1].
        pixels: of an image, all channels.

    Returns:
        pixel_mse: on [-1, 1]. pixel_squares: an image's sum of squares on [0, 1], the mean over images. pixel_rmse:
        root of the mean square on 0–255.
    """
    return {"pixel_mse": error, "pixel_squares": error / 4 * pixels, "pixel_rmse": error**0.5 * 127.5}


def load_vgg16(weights: Path | None = None) -> Extractor:
    """VGG16 up to relu4_3, as torchvision has it, with weights from this folder, or downloaded.

    Raises:
        EvaluationError: its weights cannot be had.
    """
    from torchvision.models import VGG16_Weights, vgg16

    state = read_weights(find_weights(VGG16_Weights.IMAGENET1K_V1.url, weights))
    with torch.device("meta"):  # the layers behind are large and not needed
        layers = nn.Sequential(*list(vgg16().features.children())[:23])
    kept = {name.removeprefix("features."): value for name, value in state.items()}
    layers.load_state_dict({name: kept[name] for name in layers.state_dict()}, assign=True)
    return Extractor("vgg16 relu4_3", layers.eval().requires_grad_(False))


@torch.no_grad()
def perceptual_distances(pairs: Iterable[tuple[Tensor, Tensor]], extractor: Extractor) -> tuple[dict[str, float], int]:
    """Mean squared difference of features, over all their elements (Tables 1 and 8).

    The paper does not say how images are scaled for VGG16. So there are two numbers: as torchvision's weights were
    trained, with ImageNet's mean and standard deviation; and 0–255 less the mean, as Caffe's weights were.

    Args:
        pairs: batches [B, C, R, R] in [-1, 1] of real images and of reconstructions; grey ones are shown as RGB.
        extractor: images [B, 3, R, R] → features.

    Returns:
        perceptual_imagenet and perceptual_caffe; and of how many images.
    """
    totals, elements, count = torch.zeros(2, dtype=torch.float64), 0, 0
    for pair in pairs:
        both = torch.cat(pair).expand(-1, 3, -1, -1).add(1)  # [0, 2]
        imagenet = (both / 2 - _of_channels(IMAGENET_MEAN, both)) / _of_channels(IMAGENET_STD, both)
        caffe = both * 127.5 - _of_channels(CAFFE_MEAN, both)
        for i, scaled in enumerate((imagenet, caffe)):
            real, reconstructed = extractor.network(scaled).chunk(2)
            totals[i] += (reconstructed - real).square().double().sum().cpu()
        elements += real.numel()
        count += len(pair[0])
    return dict(zip(("perceptual_imagenet", "perceptual_caffe"), (totals / elements).tolist(), strict=True)), count


def _of_channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None, None]


@torch.no_grad()
def path_lengths(model: DCVAE, lpips: Extractor, pairs: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Perceptual lengths of short steps along paths between draws from the prior: squared, over ε² (Table 7).

    StyleGAN's path length in the input space: two latents on the sphere that the prior is concentrated on, a point
    anywhere on the great circle between them, and another ε further on.

    Args:
        model: a decoder of images of 32×32 or more.
        lpips: two batches [B, 3, H, W] with values 0–255 → distances [B].
        pairs: steps.
        batch: at once.
        seed: of the latents.

    Yields:
        float32 [≤ batch], `pairs` in all.
    """
    size = model.config.latent_dim
    noise = Noise(2 * size + 1, seed)
    for start in range(0, pairs, batch):
        rows = noise.take(min(batch, pairs - start)).double()
        begin, end, where = rows.split([size, size, 1], dim=1)
        where = torch.special.ndtr(where)  # uniform
        # In float64: the two ends differ by ε of an angle.
        ends = torch.cat([slerp(begin, end, where), slerp(begin, end, where + PPL_EPSILON)]) * size**0.5
        images = face(model.decode(ends.float().to(model.device)).expand(-1, 3, -1, -1))
        yield (lpips.network(*images.add(1).mul(127.5).chunk(2)) / PPL_EPSILON**2).flatten().cpu()


def slerp(begin: Tensor, end: Tensor, where: Tensor) -> Tensor:
    """Points on the unit sphere between the directions of [B, Z] and [B, Z]; where, [B, 1], is 0 to 1."""
    begin, end = F.normalize(begin, dim=1), F.normalize(end, dim=1)
    angle = where * (begin * end).sum(1, keepdim=True).clamp(-1, 1).acos()
    across = F.normalize(end - (begin * end).sum(1, keepdim=True) * begin, dim=1)
    return begin * angle.cos() + across * angle.sin()


def face(images: Tensor) -> Tensor:
    """The part of [B, C, R, R] where StyleGAN looks for a face, half as wide and high, shrunk to 256×256 if larger."""
    eighth = images.shape[-1] // 8
    part = images[..., 3 * eighth : 7 * eighth, 2 * eighth : 6 * eighth]
    return F.avg_pool2d(part, max(1, part.shape[-1] // PPL_LARGEST))


def trimmed_mean(lengths: Tensor) -> float:
    """Mean of [N] without what is below the 1st or above the 99th percentile."""
    lengths = lengths.double()
    lowest = torch.quantile(lengths, 0.01, interpolation="lower")
    highest = torch.quantile(lengths, 0.99, interpolation="higher")
    return lengths[(lengths >= lowest) & (lengths <= highest)].mean().item()
