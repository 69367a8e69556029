"""Distances and path lengths, compared with plain loops."""

import numpy as np
import pytest
import torch
from torch import nn

from dcvae_fast import DCVAE
from dcvae_fast.config import ModelConfig
from dcvae_fast.evaluation import evaluate, perceptual
from dcvae_fast.evaluation.perceptual import face, load_vgg16, path_lengths, slerp, trimmed_mean


def values(measurements):
    return {m.metric: m.value for m in measurements}


@torch.no_grad()
def pairs(model, data):
    for pixels in data.test.images:
        real = (pixels.double() / 127.5 - 1).float()[None]
        yield real[0].double(), model.decode(model.encode(real).mean)[0].double()


def test_pixel_distances_in_all_three_units(model, data):
    distances = values(evaluate(model, data, ["pixel"], batch=8))
    squares = [(x - y).square() for x, y in pairs(model, data)]
    bytes_ = [((x + 1) * 127.5 - (y + 1) * 127.5).square().mean() for x, y in pairs(model, data)]
    units = [((x + 1) / 2 - (y + 1) / 2).square().sum() for x, y in pairs(model, data)]
    assert distances["pixel_mse"] == pytest.approx(torch.stack(squares).mean().item(), rel=1e-5)
    assert distances["pixel_squares"] == pytest.approx(torch.stack(units).mean().item(), rel=1e-5)
    assert distances["pixel_rmse"] == pytest.approx(torch.stack(bytes_).mean().sqrt().item(), rel=1e-5)


def test_official_uses_draws_and_images_limits_the_count(model, data):
    mean, drawn = (values(evaluate(model, data, ["pixel"], protocol=name)) for name in ("paper", "official"))
    assert mean != drawn
    (first, *_) = evaluate(model, data, ["pixel"], images=20)
    assert (first.count, first.subject, first.data) == (20, "reconstructions", "noise: 37 test images")


@torch.no_grad()
def test_perceptual_distances(model, data, vgg16):
    measurements = evaluate(model, data, ["perceptual"], batch=8, vgg16=vgg16)
    assert {m.extractor for m in measurements} == {"random, not VGG16"}
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    caffe = torch.tensor((123.68, 116.779, 103.939))[:, None, None]
    scaled = {
        "perceptual_imagenet": lambda image: ((image + 1) / 2 - mean) / std,
        "perceptual_caffe": lambda image: (image + 1) / 2 * 255 - caffe,
    }
    for name, scale in scaled.items():
        errors = [
            (vgg16.network(scale(x).float()) - vgg16.network(scale(y).float())).square().mean()
            for x, y in pairs(model, data)
        ]
        assert values(measurements)[name] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_vgg16_ends_at_relu4_3(tmp_path, monkeypatch):
    from torchvision.models import vgg16

    with torch.device("meta"):
        layers = vgg16().features
    torch.manual_seed(0)
    weights = {f"features.{name}": torch.randn(value.shape) / 30 for name, value in layers.state_dict().items()}
    torch.save(weights | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "weights.pth")
    monkeypatch.setattr(perceptual, "find_weights", lambda url, folder: tmp_path / "weights.pth")
    extractor = load_vgg16(tmp_path)
    assert extractor.name == "vgg16 relu4_3"
    images = torch.randn(2, 3, 32, 32)
    expected, convolutions = images, 0
    for index, layer in layers.named_children():
        if isinstance(layer, nn.Conv2d):
            kernel, bias = (weights[f"features.{index}.{name}"] for name in ("weight", "bias"))
            expected = torch.relu(torch.conv2d(expected, kernel, bias, padding=1))
            convolutions += 1
        elif isinstance(layer, nn.MaxPool2d):
            expected = torch.max_pool2d(expected, 2)
        if convolutions == 10:  # 2 + 2 + 3 in the first three blocks, and 3 of the fourth
            break
    torch.testing.assert_close(extractor.network(images), expected)
    assert extractor.network(images).shape == (2, 512, 4, 4)


def test_slerp_moves_evenly_on_the_sphere():
    begin, end = torch.tensor([[3.0, 0, 0]]).double(), torch.tensor([[0, 0.5, 0]]).double()
    for t in (0.0, 0.25, 1.0):
        angle = torch.tensor(t * torch.pi / 2).double()
        point = slerp(begin, end, torch.tensor([[t]]).double())
        torch.testing.assert_close(point, torch.stack([angle.cos(), angle.sin(), torch.zeros(())])[None].double())


def test_the_face_is_rows_3_to_7_and_columns_2_to_6_of_8():
    image = torch.zeros(1, 1, 64, 64)
    image[..., 24:56, 16:48] = 1
    assert face(image).shape == (1, 1, 32, 32) and face(image).all()
    large = torch.rand(1, 3, 1024, 1024)
    torch.testing.assert_close(
        face(large), large[..., 384:896, 256:768].unflatten(3, (256, 2)).unflatten(2, (256, 2)).mean((3, 5))
    )


def test_trimmed_mean_ignores_the_tails():
    lengths = torch.randn(1234, generator=torch.Generator().manual_seed(0)).exp()
    low, high = np.percentile(lengths, 1, method="lower"), np.percentile(lengths, 99, method="higher")
    kept = lengths[(lengths >= low) & (lengths <= high)]
    assert len(kept) < 1234
    assert trimmed_mean(lengths) == pytest.approx(kept.double().mean().item())


class LinearDecoder(nn.Module):
    """Latents → images, with path lengths that can be computed analytically."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(size, 3 * 32 * 32)

    def forward(self, latents):
        return self.layer(latents).unflatten(1, (3, 32, 32))


def test_path_length_of_a_linear_decoder_is_analytic(lpips):
    model = DCVAE(ModelConfig(latent_dim=6, decoder_width=4, encoder_width=4)).eval()
    decoder = LinearDecoder(6)
    model.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
    (ppl,) = evaluate(model, None, ["ppl"], images=60, batch=16, seed=3, lpips=lpips)
    assert (ppl.metric, ppl.subject, ppl.count, ppl.extractor) == ("ppl", "samples", 120, "squared distance, not LPIPS")
    lengths = torch.cat(list(path_lengths(model, lpips, 120, 16, 3)))
    assert ppl.value == pytest.approx(trimmed_mean(lengths))
    assert torch.cat(list(path_lengths(model, lpips, 120, 7, 3))) == pytest.approx(lengths, rel=1e-2)

    weight = decoder.layer.weight.detach().double().unflatten(0, (3, 32, 32))[:, 12:28, 8:24].flatten(0, 2) / 2
    rows = torch.randn(1024, 13, generator=torch.Generator().manual_seed(3))[:120].double()
    for row, length in zip(rows, lengths, strict=True):
        begin, end = row[:6] / row[:6].norm(), row[6:12] / row[6:12].norm()
        angle, t = (begin @ end).acos(), 0.5 * (1 + torch.erf(row[12] / 2**0.5))
        # The derivative of sin((1 − t)θ)/sin θ · a + sin(tθ)/sin θ · b, on a sphere of radius √Z.
        speed = angle / angle.sin() * (((t * angle).cos() * end) - ((1 - t) * angle).cos() * begin) * 6**0.5
        assert length.item() == pytest.approx((weight @ speed).square().sum().item(), rel=2e-2)
