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
def test_resizing_gives_pillows_numbers(channels: int, resolution: int):
    images = noise(2, channels, 50, 50)
    for image, ours in zip(images, resize(images, resolution), strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        pil = np.array(pil.resize((resolution, resolution), Image.Resampling.BICUBIC)).reshape(
            resolution, resolution, -1
        )
        assert (ours.int() - torch.from_numpy(pil).permute(2, 0, 1).int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("resolution", [8, 32, 100])
def test_a_gpu_resizes_as_a_cpu_does(resolution: int):
    images = noise(4, 3, 50, 50)
    on_gpu, on_cpu = resize(images.cuda(), resolution).cpu().int(), resize(images, resolution).int()
    difference = (on_gpu - on_cpu).abs()
    # Pillow rounds between its two passes, and clamps there: only what overshoots differs by more.
    assert difference.float().mean() < 0.5 and difference.flatten().kthvalue(int(0.99 * difference.numel())).values <= 2


def test_resizing_keeps_the_layout():
    images = noise(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert resize(images, 8).is_contiguous(memory_format=torch.channels_last)
    assert resize(images.contiguous(), 8).is_contiguous()
    assert torch.equal(resize(images, 8), resize(images.contiguous(), 8))


def test_grey_is_pillows():
    images = noise(1, 3, 300, 300)
    expected = np.array(Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("L"))
    assert torch.equal(to_grey(images)[0, 0], torch.from_numpy(expected))


def test_normalizing_is_exact_in_every_layout():
    images = noise(6, 3, 4, 4)
    expected = images.float() / 127.5 - 1
    assert torch.equal(normalize(images), expected)
    coins = torch.tensor([0, 1, 1, 0, 0, 1])
    mirrored = torch.stack([image.flip(2) if coin else image for image, coin in zip(expected, coins, strict=True)])
    assert torch.equal(normalize(images, coins), mirrored)
    other = normalize(images, coins, torch.bfloat16, channels_last=True)
    assert other.dtype == torch.bfloat16 and other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(other, mirrored.bfloat16())


def test_the_cross_fade_is_progressive_gans():
    images = normalize(noise(2, 3, 8, 8))
    coarse = images.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(cross_fade(images, 0.0), coarse)
    torch.testing.assert_close(cross_fade(images, 0.25), 0.75 * coarse + 0.25 * images)
    assert cross_fade(images, 1.0) is images
