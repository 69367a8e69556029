"""Tensors of images → bytes, grids and PNG files."""

import io

import torch
from torch import Tensor


def to_bytes(images: Tensor, *, rounded: bool = True) -> Tensor:
    """Images in [-1, 1] → uint8, rounded to the nearest value or, as the authors' code does, down."""
    pixels = images.detach().float().add(1).mul(127.5)
    return (pixels.round() if rounded else pixels).clamp(0, 255).to(torch.uint8)


def make_grid(tiles: Tensor, columns: int) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] → a grid uint8 [3, H', W'] on the CPU, row by row; small images are enlarged to
    64 pixels."""
    from torchvision import utils

    scale = max(1, 64 // tiles.shape[-1])
    pixels = to_bytes(tiles).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return utils.make_grid(pixels, nrow=columns, padding=2, pad_value=255)


def png_bytes(image: Tensor) -> bytes:
    """uint8 [C, H, W], one channel or three → the content of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file, format="PNG")
    return file.getvalue()
