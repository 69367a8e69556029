import numpy as np
import pytest
import torch
from PIL import Image

from dcvae_pipelines import cross_fade
from dcvae_pipelines.pixels import normalize, resize, to_grey


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [8, 32, 50, 64, 100])
def test_resize_matches_pillow(channels: int, resolution: int):
    images = noise(2, channels, 50, 50)
    for image, resized in zip(images, resize(images, resolution), strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        expected = np.array(pil.resize((resolution, resolution), Image.Resampling.BICUBIC)).reshape(
            resolution, resolution, -1
        )
        assert (resized.int() - torch.from_numpy(expected).permute(2, 0, 1).int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("resolution", [8, 32, 100])
def test_resize_on_a_gpu_matches_the_cpu(resolution: int):
    images = noise(4, 3, 50, 50)
    on_gpu, on_cpu = resize(images.cuda(), resolution).cpu().int(), resize(images, resolution).int()
    difference = (on_gpu - on_cpu).abs()
    # Pillow rounds and clamps between its two passes, so pixels that overshoot can differ by more.
    assert difference.float().mean() < 0.5 and difference.flatten().kthvalue(int(0.99 * difference.numel())).values <= 2


def test_resize_keeps_the_memory_format():
    images = noise(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert resize(images, 8).is_contiguous(memory_format=torch.channels_last)
    assert resize(images.contiguous(), 8).is_contiguous()
    assert torch.equal(resize(images, 8), resize(images.contiguous(), 8))


def test_grey_matches_pillow():
    images = noise(1, 3, 300, 300)
    expected = np.array(Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("L"))
    assert torch.equal(to_grey(images)[0, 0], torch.from_numpy(expected))


def test_normalize_is_exact_in_every_memory_format():
    images = noise(6, 3, 4, 4)
    expected = images.float() / 127.5 - 1
    assert torch.equal(normalize(images), expected)
    flips = torch.tensor([0, 1, 1, 0, 0, 1])
    mirrored = torch.stack([image.flip(2) if flip else image for image, flip in zip(expected, flips, strict=True)])
    assert torch.equal(normalize(images, flips), mirrored)
    converted = normalize(images, flips, torch.bfloat16, channels_last=True)
    assert converted.dtype == torch.bfloat16 and converted.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(converted, mirrored.bfloat16())


def test_cross_fade_matches_progressive_gan():
    images = normalize(noise(2, 3, 8, 8))
    coarse = images.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(cross_fade(images, 0.0), coarse)
    torch.testing.assert_close(cross_fade(images, 0.25), 0.75 * coarse + 0.25 * images)
    assert cross_fade(images, 1.0) is images
