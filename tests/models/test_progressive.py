"""The progressive networks, compared with plain implementations of Progressive GAN and of its PyTorch port."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvae_fast.config import Variant
from dcvae_fast.models.build import learning_rate_scales
from dcvae_fast.models.progressive import (
    Discriminator,
    DownConv2d,
    Encoder,
    EqualizedConv2d,
    EqualizedLinear,
    Generator,
    Phase,
    UpConv2d,
    Widths,
    image_stddev,
    minibatch_stddev,
    pixel_norm,
    resolutions,
    set_phase,
)
from dcvae_fast.training.plan import count_parameters, forward_flops

NARROW = Widths(64, 8)  # 8 channels up to 8×8, then 4, 2
Z, D = 6, 5


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("resolution", "generator", "critic"),
    [(128, 22_933_394, 22_941_313), (256, 23_044_309, 23_052_353), (512, 23_072_120, 23_080_225)],
)
def test_parameter_counts_match_progressive_gan(resolution: int, generator: int, critic: int):
    with torch.device("meta"):
        assert count_parameters(Generator(resolution)) == generator
        assert count_parameters(Discriminator(resolution).critic) == critic
        if resolution == 512:
            assert count_parameters(Encoder(512)) == 23_600_416


@pytest.mark.parametrize(("resolution", "gflop"), [(64, 18.4), (128, 27.5), (256, 36.7), (512, 45.8)])
def test_flops_of_a_forward_pass(resolution: int, gflop: float):
    with torch.device("meta"):
        networks = {
            Generator(resolution): torch.empty(2, 512),
            Discriminator(resolution): torch.empty(2, 3, resolution, resolution),
            Encoder(resolution): torch.empty(2, 3, resolution, resolution),
        }
    for network, inputs in networks.items():
        assert forward_flops(network, inputs) / 2 / 1e9 == pytest.approx(gflop, abs=0.06)


# --- layers ---


@pytest.mark.parametrize("size", [4, 7])
def test_fused_up_and_downsampling_are_exact(size: int):
    x = noise(2, 3, size, size, dtype=torch.float64)
    up: Any = UpConv2d(3, 5, 3).double()
    nn.init.normal_(up.bias)
    plain = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, up.bias, padding=1)
    torch.testing.assert_close(up(x), plain, rtol=1e-12, atol=1e-12)
    down: Any = DownConv2d(3, 5, 3).double()
    nn.init.normal_(down.bias)
    x = noise(2, 3, 2 * size, 2 * size, dtype=torch.float64)
    plain = F.avg_pool2d(F.conv2d(x, down.weight, padding=1), 2) + down.bias[:, None, None]
    torch.testing.assert_close(down(x), plain, rtol=1e-12, atol=1e-12)


def test_weights_are_standard_normal_times_their_scale():
    for layer, fan_in, gain in (
        (EqualizedConv2d(50, 60, 3), 450, math.sqrt(2)),
        (EqualizedConv2d(60, 50, 1, gain=1), 60, 1),
        (EqualizedLinear(100, 90, gain=0.5), 100, 0.5),
    ):
        assert layer.scale == pytest.approx(gain / math.sqrt(fan_in))
        assert layer.weight.std().item() == pytest.approx(layer.scale, rel=0.05)
        assert layer.bias is not None and not layer.bias.any()
    assert Generator(4, Z, NARROW).linear.scale == pytest.approx(math.sqrt(2) / 4 / math.sqrt(Z))


def test_pixel_norm_gives_unit_mean_square():
    x = noise(2, 6, 3, 3) * 5
    torch.testing.assert_close(pixel_norm(x).square().mean(1), torch.ones(2, 3, 3))
    assert pixel_norm(x.bfloat16()).dtype == torch.bfloat16


def plain_stddev(x: Tensor, group: int) -> Tensor:
    """Progressive GAN's implementation, except that the images of a group are neighbours."""
    n, c, h, w = x.shape
    y = x.reshape(n // group, group, c, h, w).transpose(0, 1)
    y = y - y.mean(0, keepdim=True)
    y = (y.square().mean(0) + 1e-8).sqrt().mean((1, 2, 3), keepdim=True)
    y = y.repeat(group, 1, h, w)
    return y.reshape(group, n // group, 1, h, w).transpose(0, 1).reshape(n, 1, h, w)


def port_stddev(images: Tensor) -> Tensor:
    """The port's implementation: one number for the whole batch, with the unbiased variance and without ε."""
    y = images - images.mean(0)
    deviation = (y.square().sum(0) / (len(images) - 1)).sqrt().mean()
    return deviation.expand(len(images), 1, 4, 4)


@pytest.mark.parametrize(
    ("n", "group", "expected"),
    [(16, 16, 16), (14, 16, 14), (6, 16, 6), (32, 16, 16), (16, 4, 4), (12, 4, 4), (14, 4, 14), (1, 16, 1)],
)
def test_minibatch_stddev_matches_progressive_gan(n: int, group: int, expected: int):
    x = noise(n, 3, 4, 4)
    torch.testing.assert_close(minibatch_stddev(x, 1, group).expand(-1, -1, 4, 4), plain_stddev(x, expected))
    parts = [x, 3 * x + 1, x.flip(0)]
    together = minibatch_stddev(torch.cat(parts), 3, group)
    torch.testing.assert_close(together, torch.cat([plain_stddev(part, expected)[..., :1, :1] for part in parts]))


def test_stddev_of_images_matches_the_port():
    parts = [noise(6, 3, 8, 8), 3 * noise(6, 3, 8, 8, seed=1) + 1]
    expected = torch.cat([port_stddev(part) for part in parts])
    assert expected[0, 0, 0, 0] < 0.5 * expected[6, 0, 0, 0]
    torch.testing.assert_close(image_stddev(torch.cat(parts), 2).expand(-1, -1, 4, 4), expected)


# --- networks ---


def equalized(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a layer as Progressive GAN does: a weight from N(0, 1), multiplied by the scale in the forward pass."""
    runtime = layer.weight / layer.scale
    bias = layer.bias if bias is None else bias
    if isinstance(layer, nn.Linear):
        return F.linear(x, runtime * layer.scale, bias)
    return F.conv2d(x, runtime * layer.scale, bias, padding=layer.padding)


def act(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def plain_generator(g: Any, z: Tensor, resolution: int, alpha: float) -> Tensor:
    x = F.linear(norm(z), g.linear.weight).reshape(len(z), -1, 4, 4)
    x = norm(act(x + g.linear_bias[None, :, None, None]))
    x = norm(act(equalized(g.conv, x)))
    if resolution == 4:
        return equalized(g.to_images["4"], x)
    r = 8
    while True:
        before = x
        x = norm(act(equalized(g.ups[str(r)], F.interpolate(x, scale_factor=2))))
        x = norm(act(equalized(g.convs[str(r)], x)))
        if r == resolution:
            break
        r *= 2
    new = equalized(g.to_images[str(r)], x)
    old = F.interpolate(equalized(g.to_images[str(r // 2)], before), scale_factor=2)
    return alpha * new + (1 - alpha) * old


def plain_trunk(t: Any, images: Tensor, resolution: int, alpha: float, stddev: str | None) -> dict[str, Tensor]:
    """`stddev` is `batch`, `zeros` or, for the encoder, None."""
    features, r = {}, resolution
    x = act(equalized(t.from_images[str(r)], images))
    while r > 4:
        if r == 16:
            features["low"] = x
        x = act(equalized(t.convs[str(r)], x))
        down = F.avg_pool2d(equalized(t.downs[str(r)], x, torch.zeros_like(t.downs[str(r)].bias)), 2)
        x = act(down + t.downs[str(r)].bias[:, None, None])
        if r == resolution:
            old = act(equalized(t.from_images[str(r // 2)], F.avg_pool2d(images, 2)))
            x = alpha * x + (1 - alpha) * old
        r //= 2
    if stddev is not None:
        x = torch.cat([x, plain_stddev(x, len(x)) if stddev == "batch" else torch.zeros_like(x[:, :1])], dim=1)
    x = act(equalized(t.conv, x))
    features["final"] = act(equalized(t.linear, x.flatten(1)))
    return features


def port_conv(layer: Any, x: Tensor, padding: int = 1) -> Tensor:
    """Convolution of the port: its weight from N(0, 1) is multiplied by √(2 / fan-in) in the forward pass."""
    scale = math.sqrt(2 / layer.weight[0].numel())
    return F.conv2d(x, layer.weight / layer.scale * scale, layer.bias, padding=padding)


def port_from_or_to(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias)


def port_generator(g: Any, z: Tensor, resolution: int, alpha: float) -> Tensor:
    """The port's generator, without label embedding. Its first layer is a 4×4 convolution of one pixel."""
    width, scale = len(g.linear_bias), math.sqrt(2 / (z.shape[1] * 16))
    kernel = (g.linear.weight / g.linear.scale * scale).reshape(width, 4, 4, -1).permute(0, 3, 1, 2).flip(2, 3)
    x = act(norm(F.conv2d(norm(z)[:, :, None, None], kernel, g.linear_bias, padding=3)))
    x = up = act(norm(port_conv(g.conv, x)))
    r = 4
    while r < resolution:
        r *= 2
        up = F.interpolate(x, scale_factor=2)
        x = act(norm(port_conv(g.ups[str(r)], up)))
        x = act(norm(port_conv(g.convs[str(r)], x)))
    images = port_from_or_to(g.to_images[str(r)], x)
    if r > 4 and alpha < 1:
        images = (1 - alpha) * port_from_or_to(g.to_images[str(r // 2)], up) + alpha * images
    return images


def port_trunk(t: Any, images: Tensor, resolution: int, alpha: float, stddev: str | None) -> dict[str, Tensor]:
    """The port's discriminator up to its last linear layer, with a 4×4 convolution in place of the linear layer."""
    features, r = {}, resolution
    x = port_from_or_to(t.from_images[str(r)], images)
    while r > 4:
        if r == 16:
            features["low"] = x
        x = act(port_conv(t.convs[str(r)], x))
        x = act(port_conv(t.downs[str(r)], x))
        x = F.avg_pool2d(x, 2)
        if r == resolution and alpha < 1:
            skip = port_from_or_to(t.from_images[str(r // 2)], F.avg_pool2d(images, 2))
            x = (1 - alpha) * skip + alpha * x
        r //= 2
    if stddev is not None:
        x = torch.cat([x, port_stddev(images) if stddev == "batch" else torch.zeros_like(x[:, :1])], dim=1)
    x = act(port_conv(t.conv, x))
    kernel = t.linear.weight / t.linear.scale * math.sqrt(2 / t.linear.in_features)
    x = act(F.conv2d(x, kernel.reshape(len(kernel), -1, 4, 4), t.linear.bias))
    features["final"] = x.squeeze(2).squeeze(2)
    return features


def last_linear(layer: Any, x: Tensor, variant: Variant) -> Tensor:
    return F.linear(x, layer.weight, layer.bias) if variant == "port" else equalized(layer, x)


PLAIN = {"pggan": (plain_generator, plain_trunk), "port": (port_generator, port_trunk)}
over_variants = pytest.mark.parametrize("variant", PLAIN)


def build(resolution: int, variant: Variant, phase: Phase | None = None) -> tuple[Generator, Discriminator, Encoder]:
    """Return narrow networks."""
    networks = (
        Generator(resolution, Z, NARROW, variant=variant),
        Discriminator(resolution, NARROW, 3, D, variant),
        Encoder(resolution, Z, NARROW, variant=variant),
    )
    if phase is not None:
        for network in networks:
            set_phase(network, phase)
    return networks


def assert_equal(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def assert_same_gradients(network: nn.Module, inputs: Tensor, ours: Tensor, expected: Tensor) -> None:
    """Compare the gradients, for parameters and inputs, of a random sum of each output; and those of a penalty on the
    input's gradient."""
    weights, leaves = noise(*ours.shape, seed=3, dtype=ours.dtype), [*network.parameters(), inputs]
    gradients = [
        torch.autograd.grad((weights * output).sum(), leaves, create_graph=True, materialize_grads=True)
        for output in (ours, expected)
    ]
    penalties = [
        torch.autograd.grad(values[-1].square().sum(), leaves[:-1], materialize_grads=True) for values in gradients
    ]
    for pairs, tolerance in ((gradients, 1e-10), (penalties, 1e-8)):
        for actual, plain in zip(*pairs, strict=True):
            scale = max(1.0, plain.abs().max().item())
            torch.testing.assert_close(actual / scale, plain / scale, rtol=10 * tolerance, atol=tolerance)


PHASES = [Phase(4), Phase(8), Phase(8, 0.3), Phase(16, 0.0), Phase(32, torch.tensor(0.75)), Phase(32)]


@over_variants
@pytest.mark.parametrize("phase", PHASES)
def test_networks_match_plain_ones_in_every_phase(variant: Variant, phase: Phase):
    g, c, e = build(32, variant, phase)
    for network in (g, c, e):
        network.double()
        for name, parameter in network.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.1)
    plain_generator, plain_trunk = PLAIN[variant]
    r, alpha = phase.resolution, float(phase.alpha)
    z, images = noise(6, Z, dtype=torch.float64), noise(6, 3, r, r, dtype=torch.float64)
    z.requires_grad_()
    images.requires_grad_()
    generated, expected = g(z), plain_generator(g, z, r, alpha)
    assert_equal(generated, expected)
    assert_same_gradients(g, z, generated, expected)

    trunk = c.critic.trunk
    for parts, stddev in ((1, "batch"), (0, "zeros")):
        critique, expected = c(images, parts), plain_trunk(trunk, images, r, alpha, stddev)
        assert critique.features.keys() == expected.keys() == ({"low", "final"} if r >= 16 else {"final"})
        for name, value in expected.items():
            assert_equal(critique.features[name], value)
        score = last_linear(c.critic.score, expected["final"], variant).squeeze(1)
        assert_equal(critique.score, score)
        assert_same_gradients(c, images, critique.score, score)
    posterior = torch.cat(e(images), 1)
    expected = last_linear(e.linear, plain_trunk(e.trunk, images, r, alpha, None)["final"], variant)
    assert_equal(posterior, expected)
    assert_same_gradients(e, images, posterior, expected)


def test_layers_of_the_port_have_its_shapes_and_initialisation():
    """The shapes at 128×128 as in its model.py, with a latent of 512 and one score."""
    with torch.device("meta"):
        g, c = Generator(128, variant="port"), Discriminator(128, variant="port").critic
    widths = [512, 512, 512, 512, 256, 128]
    blocks = [(512, 256), (256, 128), (512, 512), (512, 512), (512, 512)]
    convs = [size for a, b in blocks for size in ((b, a, 3), (b, b, 3))]
    shapes = sorted((*p.shape[:2], p.shape[2]) for p in g.parameters() if p.ndim == 4)
    assert shapes == sorted([*convs, (512, 512, 3), *((3, width, 1) for width in widths)])
    blocks = [(128, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    convs = [size for a, b in blocks for size in ((b, a, 3), (b, b, 3))]
    shapes = sorted((*p.shape[:2], p.shape[2]) for p in c.parameters() if p.ndim == 4)
    assert shapes == sorted([*convs, (512, 513, 3), *((width, 3, 1) for width in widths)])

    wide = Widths(2048, 512)
    g, c, e = (
        Generator(4, 64, wide, variant="port"),
        Discriminator(4, wide, variant="port"),
        Encoder(4, 64, wide, variant="port"),
    )
    default = [g.to_images["4"], c.critic.trunk.from_images["4"], c.critic.score, e.trunk.from_images["4"], e.linear]
    scaled = {layer.weight for layer in (g.linear, g.conv, c.critic.trunk.conv, e.trunk.linear)}
    scales = {weight: scale for network in (g, c, e) for weight, scale in learning_rate_scales(network).items()}
    assert scales.keys() == scaled | {c.critic.trunk.linear.weight, e.trunk.conv.weight}
    for weight, scale in scales.items():
        fan_in = 16 * 64 if weight is g.linear.weight else weight[0].numel()
        assert scale == pytest.approx(math.sqrt(2 / fan_in))
        assert weight.std().item() == pytest.approx(scale, rel=0.02)
    for layer in default:  # torch's default: uniform in ±1/√fan-in
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert layer.bias is not None and layer.bias.any()
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max().item() <= bound
        if layer.weight.numel() > 1000:
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@over_variants
@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_outputs_do_not_change_when_a_fade_starts(resolution: int, variant: Variant):
    g, c, e = build(32, variant)
    parts = 0 if variant == "port" else 1  # the port's minibatch standard deviation depends on the resolution
    before, after = Phase(resolution // 2), Phase(resolution, 0.0)
    z, images = noise(4, Z), noise(4, 3, resolution, resolution)
    coarse = F.avg_pool2d(images, 2)
    for network in (g, c, e):
        set_phase(network, before)
    generated, score, posterior = g(z), c(coarse, parts).score, e(coarse)
    for network in (g, c, e):
        set_phase(network, after)
    torch.testing.assert_close(g(z), F.interpolate(generated, scale_factor=2))
    torch.testing.assert_close(c(images, parts).score, score)
    torch.testing.assert_close(e(images), posterior)


@over_variants
def test_minibatch_statistics_do_not_cross_parts_and_are_off_for_contrast(variant: Variant):
    _, c, _ = build(16, variant)
    images = noise(12, 3, 16, 16)
    alone, together = c.embed(c(images[:4], 0), ("low", "final")), c.embed(c(images, 0), ("low", "final"))
    torch.testing.assert_close(together[:, :4], alone)
    assert alone.shape == (2, 4, D)
    parts = torch.cat([c(part).score for part in images.split(6)])
    torch.testing.assert_close(c(images, 2).score, parts)
    changed = torch.cat([images[:6], images[6:] * 2])
    assert torch.equal(c(changed, 2).score[:6], c(images, 2).score[:6])
    assert not torch.allclose(c(changed, 1).score[:6], c(images, 1).score[:6])


@over_variants
def test_layers_of_higher_resolutions_get_no_gradient(variant: Variant):
    g, _, _ = build(32, variant, Phase(8, 0.5))
    g(noise(2, Z)).sum().backward()
    without_gradient = {name for name, p in g.named_parameters() if p.grad is None}
    assert without_gradient == {n for n, _ in g.named_parameters() if any(f".{r}." in n for r in ("16", "32"))}


def test_low_head_exists_from_16_on():
    assert set(Discriminator(8, NARROW, 3, D).heads) == {"final"}
    assert set(Discriminator(16, NARROW, 3, D).heads) == {"final", "low"}
    assert resolutions(64) == [4, 8, 16, 32, 64] and resolutions(4) == [4] and resolutions(32, first=8) == [8, 16, 32]


@over_variants
def test_score_and_posterior_stay_float32_under_autocast(variant: Variant):
    g, c, e = build(16, variant)
    z, images = noise(8, Z), noise(8, 3, 16, 16)
    dtypes: dict[str, torch.dtype] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            dtypes[name] = out.dtype

        return hook

    c.critic.trunk.conv.register_forward_hook(record("conv"))
    c.critic.score.register_forward_hook(record("score"))
    e.linear.register_forward_hook(record("posterior"))
    exact = deepcopy((g, c, e))
    with torch.autocast("cpu", torch.bfloat16):
        generated, critique, posterior = g(z), c(images), e(images)
    assert dtypes == {"conv": torch.bfloat16, "score": torch.float32, "posterior": torch.float32}
    assert generated.dtype == torch.bfloat16 and critique.features["final"].dtype == torch.bfloat16
    assert posterior[0].dtype == posterior[1].dtype == torch.float32
    for ours, expected in (
        (generated, exact[0](z)),
        (critique.score, exact[1](images).score),
        (posterior[0], exact[2](images)[0]),
    ):
        assert (ours - expected).abs().mean() < 0.02 * expected.abs().mean() + 0.01
    # Sums of squares neither overflow nor lose more precision than in float32.
    large = torch.full((4, 8, 4, 4), 300.0, dtype=torch.bfloat16) + noise(4, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert minibatch_stddev(large, 1, 4).float()[0, 0, 0, 0].item() == pytest.approx(
            plain_stddev(large.float(), 4)[0, 0, 0, 0].item(), rel=0.01
        )
        torch.testing.assert_close(pixel_norm(large).float(), norm(large.float()), rtol=1e-2, atol=1e-2)
