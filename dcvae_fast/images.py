"""Conversion of image tensors to bytes, grids and PNG files."""

import io

import torch
from torch import Tensor


def to_bytes(images: Tensor, *, rounded: bool = True) -> Tensor:
    """Convert images in [-1, 1] to uint8, rounded to nearest or, as in the authors' code, down."""
    pixels = images.detach().float().mul(127.5).add(127.5)  # in this order, which decides what is rounded down
    return (pixels.round() if rounded else pixels).clamp(0, 255).to(torch.uint8)


def make_grid(tiles: Tensor, columns: int) -> Tensor:
    """Arrange images [N, C, H, W] in [-1, 1] row by row in a grid, uint8 [3, H', W'] on the CPU.

    Small images are enlarged by an integer factor, to 64 pixels at most.
    """
    from torchvision import utils

    scale = max(1, 64 // tiles.shape[-1])
    pixels = to_bytes(tiles).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return utils.make_grid(pixels, nrow=columns, padding=2, pad_value=255)


def png_bytes(image: Tensor) -> bytes:
    """Encode an image, uint8 [C, H, W] with one or three channels, as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file, format="PNG")
    return file.getvalue()
