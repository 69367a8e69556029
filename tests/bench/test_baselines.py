"""Tests that TrainStep and the plain baseline agree: losses, weights, EMAs and queue, given the same noise."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import test_graphs
from baselines import Baseline, with_plain_layers
from dcvae_fast.config import Config, ContrastConfig, GrowthConfig, LossConfig, ModelConfig, OptimConfig
from dcvae_fast.models.build import build_autoencoder, build_discriminator, learning_rate_scales
from dcvae_fast.training.step import Metrics, TrainStep
from dcvae_pipelines import Batch

# Iterations: 2 at 4×4; 4 that fade in 8×8 and 4 at it; 3 that fade in 16×16 and 3 at it. Three kinds of minibatches:
# two groups of four, one group of four, the whole batch of six.
GROWING = replace(
    test_graphs.GROWING,
    growth=GrowthConfig(fade_images=16, stable_images=16, batch={4: 8, 8: 4, 16: 6}, stddev_group=4, lr={16: 5e-3}),
    # A drift, a KL and an ε as large as here are missed when they are wrong.
    loss=LossConfig(drift=0.1, kl_weight=0.01, penalty_every=2),
    contrast=ContrastConfig(negatives=10, layers=("low", "final"), momentum=0.9),
    optim=OptimConfig(lr=1e-2, betas=(0.3, 0.9), eps=1e-3),
)
SMALL = replace(
    test_graphs.SMALL,
    contrast=ContrastConfig(negatives=10, momentum=0.9),
    optim=OptimConfig(lr=1e-3, eps=1e-3),
)
ITERATIONS = 300  # of spectral norms at 32×32, enough for double precision


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_batch(seed: int, n: int, resolution: int) -> Batch:
    """Few different ids: some of an image's own older keys are in the queue."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, resolution, resolution, generator=generator) * 2 - 1
    return Batch(images, torch.randint(12, (n,), generator=generator))


def unfolded(ours: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of one of our networks, divided by the scale of the equalised learning rate."""
    scales = learning_rate_scales(ours)
    return {name: value.detach() / scales.get(value, 1) for name, value in ours.named_parameters()}


def assert_same_metrics(ours: Metrics, plain: dict[str, Tensor], rtol: float) -> None:
    for name in ("loss/penalty", "loss/contrast"):
        assert (name in ours) == (name in plain), name
    for name, expected in plain.items():
        assert ours[name].item() == pytest.approx(expected.item(), rel=rtol, abs=1e-12), name


def assert_same_state(ours: TrainStep, plain: Baseline, rtol: float = 1e-8) -> None:
    networks, contrast = ours.networks, ours.networks.contrast
    assert contrast is not None
    for our_network, plain_network in (
        (networks.encoder, plain.encoder),
        (networks.decoder, plain.decoder),
        (networks.discriminator, plain.discriminator),
        (contrast.momentum, plain.momentum),
        (networks.decoder_ema, plain.decoder_ema),
    ):
        values = unfolded(our_network)
        for name, expected in plain_network.named_parameters():
            torch.testing.assert_close(values[name], expected, rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    # Running means are not compared with the baseline's, whose decoder sees each batch twice.
    for name, buffer in networks.decoder_ema.named_buffers():
        assert torch.equal(buffer, networks.decoder.get_buffer(name)), name
    assert (int(contrast.queue.valid), int(contrast.queue.cursor)) == (plain.filled, plain.cursor)
    filled = F.normalize(contrast.queue.keys, dim=2)[:, : plain.filled]
    torch.testing.assert_close(filled, plain.keys[:, : plain.filled], rtol=rtol, atol=1e-9)
    assert torch.equal(contrast.queue.ids, plain.ids)


@pytest.mark.parametrize(
    ("adversarial", "order"),
    [("wgan_gp", "sequential"), ("hinge", "sequential"), ("logistic_r1", "sequential"), ("wgan_gp", "joint")],
)
def test_growing_iterations_agree(adversarial, order):
    config = replace(GROWING, loss=replace(GROWING.loss, adversarial=adversarial, order=order))
    ours, plain = TrainStep(config), Baseline(config)
    assert_same_state(ours, plain)
    phases = []
    for i in range(16):
        now = ours.schedule
        if now.resolution != ours.resolution:
            fresh = [make_batch(100 * i + j, 4, now.resolution) for j in range(3)]  # the last one wraps around
            ours.grow(now)
            ours.refill(fresh)
            plain.grow(plain.schedule)
            for batch in fresh:
                plain.refill(batch.images, batch.ids)
        batch = make_batch(i, now.batch, now.resolution)
        assert_same_metrics(ours(batch), plain.iterate(batch.images, batch.ids), rtol=1e-8)
        assert_same_state(ours, plain)
        phases.append(tuple(plain.phase))
    fades = [*((8, n / 4) for n in range(4)), *[(8, 1.0)] * 4, (16, 0.0), (16, 0.375), (16, 0.75), *[(16, 1.0)] * 3]
    assert phases == [(4, 1.0), (4, 1.0), *fades]


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_iterations_at_32_agree_if_spectral_norms_converge(order):
    """TrainStep updates spectral norms less often; here each pass iterates until they converge."""
    config = replace(SMALL, loss=replace(SMALL.loss, order=order))
    ours, plain = TrainStep(config), Baseline(config)
    contrast = ours.networks.contrast
    assert contrast is not None
    for network in (ours.networks, contrast.momentum, plain.encoder, plain.discriminator, plain.momentum):
        for module in network.modules():
            norm: Any = getattr(module, "_spectral_norms", {}).get("weight", module)
            if hasattr(norm, "n_power_iterations"):
                norm.n_power_iterations = ITERATIONS
    for i in range(3):  # two autoencoder steps
        batch = make_batch(i, 4, 32)
        assert_same_metrics(ours(batch), plain.iterate(batch.images, batch.ids), rtol=1e-8)
        assert_same_state(ours, plain)


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_separate_passes_at_32_agree(order):
    """Also the buffers: running statistics of BatchNorm, and u and v of spectral norm after each single pass."""
    config = replace(
        SMALL,
        loss=replace(SMALL.loss, order=order, passes="separate"),
        train=replace(SMALL.train, initialization="official"),
    )
    ours, plain = TrainStep(config), Baseline(config)
    contrast = ours.networks.contrast
    assert contrast is not None
    for i in range(5):  # three autoencoder steps
        batch = make_batch(i, 4, 32)
        assert_same_metrics(ours(batch), plain.iterate(batch.images, batch.ids), rtol=1e-8)
        assert_same_state(ours, plain)
        for our_network, plain_network in (
            (ours.networks.encoder, plain.encoder),
            (ours.networks.decoder, plain.decoder),
            (ours.networks.discriminator, plain.discriminator),
            (contrast.momentum, plain.momentum),
        ):
            for name, expected in plain_network.named_buffers():
                torch.testing.assert_close(our_network.get_buffer(name), expected, rtol=1e-8, atol=1e-9, msg=name)
    decodings = 1 if order == "joint" else 2  # of reconstructions in an autoencoder step, next to one of samples
    assert ours.networks.decoder.get_buffer("norm.num_batches_tracked") == 5 * 2 + 3 * (1 + decodings)


def test_flops_of_the_authors_iteration_at_32():
    """20.65 GFLOP an image in the discriminator's step, and 2.00 TFLOP for 64 images with the 1-in-5 steps
    averaged in."""
    torch.set_default_dtype(torch.float32)
    plain = Baseline(Config(), "meta")
    images, ids = torch.empty(64, 3, 32, 32, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    flops = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            plain.iterate(images, ids)
        flops.append(counter.get_total_flops())
    assert flops[1] / 64 / 1e9 == pytest.approx(20.65, abs=0.05)
    assert (flops[0] + 4 * flops[1]) / 5 / 1e12 == pytest.approx(2.00, abs=0.01)


def test_objectives_without_a_baseline_are_rejected():
    with pytest.raises(ValueError, match="'vae'"):
        Baseline(replace(SMALL, loss=replace(SMALL.loss, objective="vae")))
    with pytest.raises(ValueError, match=r"growth\.blend_real False"):
        Baseline(replace(GROWING, growth=replace(GROWING.growth, blend_real=False)))


@pytest.mark.parametrize(("resolution", "gflop"), [(64, 27.3), (128, 41.8), (256, 56.3), (512, 70.8)])
def test_flops_of_plain_networks(resolution: int, gflop: float):
    """A forward pass, resampling apart from the convolutions; ours costs 18.4, 27.5, 36.7 and 45.8."""
    torch.set_default_dtype(torch.float32)
    model = ModelConfig(architecture="progressive", resolution=resolution, latent_dim=512)
    with torch.device("meta"):
        images, latents = torch.empty(2, 3, resolution, resolution), torch.empty(2, 512)
        networks = *build_autoencoder(model), build_discriminator(model).critic.trunk
    for network, given in zip(networks, (images, latents, images), strict=True):
        plain = with_plain_layers(network)
        with FlopCounterMode(display=False) as counter:
            plain(given)
        assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(gflop, abs=0.06)
