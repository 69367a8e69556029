"""Operations on decoded pixels, shared by all sources and devices."""

import torch
from torch import Tensor
from torch.nn import functional as F


def resize(images: Tensor, resolution: int) -> Tensor:
    """Resize uint8 [B, C, H, H] to [B, C, R, R] by antialiased bicubic, as Pillow does; keeps the memory format."""
    if images.shape[2:] == (resolution, resolution):
        return images
    if images.device.type == "cpu":  # torch's uint8 kernel has Pillow's fixed-point arithmetic
        return F.interpolate(images, size=(resolution, resolution), mode="bicubic", antialias=True)
    resized = F.interpolate(images.float(), size=(resolution, resolution), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)  # bicubic overshoots at edges


def to_grey(images: Tensor) -> Tensor:
    """Convert RGB uint8 [B, 3, H, W] to its ITU-R 601 luma uint8 [B, 1, H, W], bitwise equal to Pillow's."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[:, None]


def normalize(
    images: Tensor, mirrored: Tensor | None = None, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Tensor:
    """Convert uint8 [B, C, H, W] to network inputs in [-1, 1].

    Args:
        mirrored: [B], nonzero for images to flip left to right.
        dtype: dtype of the result; bfloat16 is rounded from float32.
        channels_last: whether the result is channels_last instead of contiguous.
    """
    if mirrored is not None:
        images = torch.where(mirrored.bool()[:, None, None, None], images.flip(3), images)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=layout).div_(127.5).sub_(1).to(dtype)


def cross_fade(images: Tensor, alpha: float) -> Tensor:
    """Blend real images with their half resolution, as a growing network blends its output.

    Progressive GAN's rule: alpha·x + (1 − alpha)·up(down(x)), with 2×2 box down and nearest up.

    Args:
        images: [B, C, R, R], R even.
        alpha: weight of the full resolution, 0 to 1.
    """
    if alpha >= 1:
        return images
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
    return torch.lerp(coarse, images, alpha)
