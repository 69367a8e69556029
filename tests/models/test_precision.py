"""Networks entirely in bfloat16, float16 or float64, compared with the same weights in float64."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dcvae_fast import DCVAE, Posterior
from dcvae_fast.config import ContrastConfig, ModelConfig
from dcvae_fast.contrast import InstanceContrast
from dcvae_fast.evaluation.images import Noise, reconstructions, samples
from dcvae_fast.evaluation.latent import interpolate
from dcvae_fast.evaluation.perceptual import path_lengths
from dcvae_fast.evaluation.pretrained import Extractor
from dcvae_fast.evaluation.probe import posterior_means
from dcvae_fast.losses import (
    autoencoder_loss,
    discriminator_loss,
    feature_loss,
    gradient_norm,
    kl_divergence,
    pixel_loss,
)
from dcvae_fast.models.build import build_discriminator
from dcvae_fast.models.layers import BatchNorm2d
from dcvae_fast.models.progressive import Phase, image_stddev, minibatch_stddev, pixel_norm, set_phase
from dcvae_pipelines import ImageSet
from dcvae_pipelines.pixels import normalize

AUTOGAN = ModelConfig(latent_dim=6, decoder_width=8, encoder_width=8, discriminator_width=8, contrast_dim=5)
# With fewer channels, pixel norm would amplify rounding errors.
PROGRESSIVE = ModelConfig(
    architecture="progressive", resolution=16, latent_dim=6, base_channels=512, max_channels=32, contrast_dim=5
)
CONFIGS = {"autogan": AUTOGAN, "progressive": PROGRESSIVE, "port": replace(PROGRESSIVE, variant="port")}
HALF = (torch.bfloat16, torch.float16)

over_dtypes = pytest.mark.parametrize("dtype", (*HALF, torch.float64), ids=lambda dtype: str(dtype)[6:])
over_half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
over_architectures = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
over_modes = pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def converted(network: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return copies of a network in `dtype` and in float64, with the same weights."""
    network = deepcopy(network).to(dtype)
    return network, deepcopy(network).double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_rounded(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Check the dtype, and that values equal those of float64 up to the rounding errors of a few dozen layers."""
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < 20 * torch.finfo(dtype).eps


def discriminator(config: ModelConfig) -> Any:
    network = build_discriminator(config)
    if config.grows:
        set_phase(network, Phase(config.resolution, config.alpha))
    return network


def stages(config: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the configurations of all stages of growth, and of two of the port's."""
    if not config.grows:
        yield config
        return
    if config.variant == "port":
        yield from (replace(config, resolution=4), replace(config, alpha=0.3))
        return
    yield replace(config, resolution=4)
    for resolution in (8, 16):
        for alpha in (0.0, 0.3, 1.0):
            yield replace(config, resolution=resolution, alpha=alpha)


STAGES = [stage for config in CONFIGS.values() for stage in stages(config)]
over_stages = pytest.mark.parametrize(
    "config", STAGES, ids=lambda c: f"{c.architecture}-{c.variant}-{c.resolution}-{c.alpha}"
)


def image_batch(config: ModelConfig, count: int) -> Tensor:
    return noise(count, config.image_channels, config.resolution, config.resolution)


# --- the model ---


@over_dtypes
@over_modes
@over_stages
def test_posterior_is_that_of_float64(config: ModelConfig, training: bool, dtype: torch.dtype):
    model, exact = converted(DCVAE(config).train(training), dtype)
    for count in (1, 2, 6):
        images = image_batch(config, count).to(dtype)
        posterior, expected = model.encode(images), exact.encode(images.double())
        assert_rounded(posterior.mean, expected.mean, dtype)
        assert_rounded(posterior.logvar, expected.logvar, dtype)


@over_dtypes
@over_modes
@over_stages
def test_decoded_images_are_those_of_float64(config: ModelConfig, training: bool, dtype: torch.dtype):
    model, exact = converted(DCVAE(config).train(training), dtype)
    latents = noise(6, config.latent_dim).to(dtype)
    assert_rounded(model.decode(latents), exact.decode(latents.double()), dtype)


@over_dtypes
@over_modes
@over_stages
def test_score_is_that_of_float64(config: ModelConfig, training: bool, dtype: torch.dtype):
    network, exact = converted(discriminator(config).train(training), dtype)
    for count in (2, 6) if config.variant == "port" else (1, 2, 6):  # the port has no deviation of one image
        images = image_batch(config, count).to(dtype)
        assert_rounded(network(images).score, exact(images.double()).score, dtype)


@over_dtypes
@over_modes
@over_stages
def test_contrast_features_are_those_of_float64(config: ModelConfig, training: bool, dtype: torch.dtype):
    network, exact = converted(discriminator(config).train(training), dtype)
    images = image_batch(config, 6).to(dtype)
    critique, expected = (
        net(x, stddev_parts=0, scored=False) for net, x in ((network, images), (exact, images.double()))
    )
    layers = tuple(expected.features)
    assert_rounded(network.embed(critique, layers), exact.embed(expected, layers), dtype)


@over_dtypes
@over_architectures
def test_fade_by_a_tensor_takes_the_dtype_of_the_networks(config: ModelConfig, dtype: torch.dtype):
    network, exact = converted(DCVAE(config), dtype)
    for net in (network, exact):
        set_phase(net, Phase(config.resolution, torch.tensor(0.3)))
    images = image_batch(config, 4).to(dtype)
    assert_rounded(network(images), exact(images.double()), dtype)


@over_dtypes
@over_modes
@over_architectures
def test_gradients_of_parameters_are_those_of_float64(config: ModelConfig, training: bool, dtype: torch.dtype):
    images = image_batch(config, 4).to(dtype)
    gradients = []
    for network in (DCVAE(config), discriminator(config)):
        for net in converted(network.train(training), dtype):
            x = images.to(next(net.parameters()).dtype)
            out = net(x) if isinstance(net, DCVAE) else net(x).score
            upcast_out = out.double() if dtype == torch.float64 else out.float()
            upcast_out.square().mean().backward()
            gradients.append(torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None]))
    # Rounding moves the inputs of a fraction ε of the (leaky) ReLUs across 0, so the norm of the error grows as √ε.
    for actual, expected in (gradients[:2], gradients[2:]):
        assert relative_error(actual, expected) < 4 * torch.finfo(dtype).eps ** 0.5


@over_dtypes
@over_modes
@over_architectures
def test_gradient_norms_of_the_score_are_those_of_float64(config: ModelConfig, training: bool, dtype: torch.dtype):
    norms = []
    for network in converted(discriminator(config).train(training), dtype):
        images = image_batch(config, 4).to(dtype).to(next(network.parameters()).dtype).requires_grad_()
        norms.append(gradient_norm(network(images).score, images))
        norms[-1].square().mean().backward()
    assert relative_error(*norms) < 4 * torch.finfo(dtype).eps ** 0.5


# --- noise and inputs ---


@over_dtypes
@over_architectures
def test_a_seed_samples_the_same_images_in_every_dtype(config: ModelConfig, dtype: torch.dtype):
    model, exact = converted(DCVAE(config).eval(), dtype)
    latents = torch.randn(4, config.latent_dim, generator=generator(), dtype=torch.float32)
    assert_rounded(model.sample(4, generator=generator()), exact.decode(latents), dtype)


@over_dtypes
def test_a_seed_draws_the_same_posterior_noise_in_every_dtype(dtype: torch.dtype):
    mean, logvar = noise(5, 6).to(dtype), noise(5, 6, seed=2).to(dtype)
    drawn = Posterior(mean, logvar).sample(generator())
    expected = Posterior(mean.double(), logvar.double()).at(torch.randn(5, 6, generator=generator()))
    assert_rounded(drawn, expected, dtype)


@over_dtypes
@over_architectures
def test_reconstructions_from_the_posterior_have_the_dtype_of_the_model(config: ModelConfig, dtype: torch.dtype):
    model, exact = converted(DCVAE(config).eval(), dtype)
    images = image_batch(config, 4).to(dtype)
    reconstructed = model.reconstruct(images, sample_posterior=True, generator=generator())
    expected = exact.reconstruct(images.double(), sample_posterior=True, generator=generator())
    assert_rounded(reconstructed, expected, dtype)


@over_dtypes
@over_architectures
def test_images_and_latents_of_another_dtype_are_converted(config: ModelConfig, dtype: torch.dtype):
    model = DCVAE(config).to(dtype).eval()
    images, latents = image_batch(config, 2), noise(2, config.latent_dim)
    assert torch.equal(model.encode(images).mean, model.encode(images.to(dtype)).mean)
    assert torch.equal(model.decode(latents), model.decode(latents.to(dtype)))


def test_gradients_reach_images_of_another_dtype():
    images = image_batch(AUTOGAN, 2).requires_grad_()
    DCVAE(AUTOGAN).bfloat16().encode(images).mean.sum().backward()
    assert images.grad is not None and images.grad.dtype == torch.float32 and images.grad.abs().sum() > 0


def test_integer_latents_are_rejected():
    with pytest.raises(ValueError, match=r"latents have dtype torch\.int64; this model expects floating-point values"):
        DCVAE(AUTOGAN).decode(torch.zeros(2, AUTOGAN.latent_dim, dtype=torch.int64))


# --- saved models ---


@over_dtypes
@over_architectures
def test_a_saved_model_keeps_its_dtype(config: ModelConfig, dtype: torch.dtype, tmp_path):
    model = DCVAE(config).to(dtype).eval()
    model.save_pretrained(tmp_path)
    loaded = DCVAE.from_pretrained(tmp_path)
    assert loaded.dtype == dtype and loaded.config == config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and loaded.state_dict()[name].dtype == value.dtype


def test_a_saved_model_keeps_mixed_dtypes(tmp_path):
    model = DCVAE(AUTOGAN).bfloat16().eval()
    model.decoder.norm.float()
    model.save_pretrained(tmp_path)
    loaded = DCVAE.from_pretrained(tmp_path)
    assert {n: v.dtype for n, v in loaded.state_dict().items()} == {n: v.dtype for n, v in model.state_dict().items()}


# --- statistics ---


@over_half
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 3e4])
def test_minibatch_stddev_neither_overflows_nor_underflows(dtype: torch.dtype, scale: float):
    x = (noise(8, 3, 4, 4) * scale).to(dtype)
    assert_rounded(minibatch_stddev(x, 2, 4), minibatch_stddev(x.double(), 2, 4), dtype)
    assert_rounded(image_stddev(x, 2), image_stddev(x.double(), 2), dtype)


@over_half
def test_minibatch_stddev_of_equal_images_has_a_finite_gradient(dtype: torch.dtype):
    for stddev in (partial(minibatch_stddev, group=4), image_stddev):
        x = torch.ones(4, 3, 4, 4, dtype=dtype, requires_grad=True)
        stddev(x, 1).sum().backward()
        assert x.grad is not None and not x.grad.any()


@over_half
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4])
def test_pixel_norm_neither_overflows_nor_underflows(dtype: torch.dtype, scale: float):
    x = (noise(2, 8, 4, 4) * scale).to(dtype)
    assert_rounded(pixel_norm(x), pixel_norm(x.double()), dtype)


@over_dtypes
def test_batch_norm_over_ranks_updates_statistics_of_any_dtype(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.mul_(2))  # two ranks with the same images
    norm, exact = converted(BatchNorm2d(3), dtype)
    x = noise(4, 3, 5, 5).to(dtype)
    assert_rounded(norm(x), exact(x.double()), dtype)
    assert_rounded(norm.running_mean, exact.running_mean, dtype)
    assert_rounded(norm.running_var, exact.running_var, dtype)


# --- losses and contrast ---


@pytest.mark.parametrize("kind", ["hinge", "log", "wgan_gp", "logistic_r1"])
@over_half
def test_adversarial_losses_of_large_scores_do_not_overflow(kind: Any, dtype: torch.dtype):
    real, fake, rec = (noise(4, seed=s).mul(1000).to(dtype) for s in range(3))
    expected = discriminator_loss(real.double(), fake.double(), rec.double(), kind)
    assert discriminator_loss(real, fake, rec, kind).item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-3)
    expected = autoencoder_loss(fake.double(), rec.double(), kind)
    assert autoencoder_loss(fake, rec, kind).item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-3)


@over_half
def test_kl_divergence_of_large_variances_does_not_overflow(dtype: torch.dtype):
    mean, logvar = (noise(4, 6) * 300).to(dtype), (noise(4, 6, seed=2) * 15).to(dtype)
    expected = kl_divergence(mean.double(), logvar.double()).item()
    assert kl_divergence(mean, logvar).item() == pytest.approx(expected, rel=1e-5)


@over_half
@pytest.mark.parametrize("scale", [1e-5, 1e3])
def test_squared_errors_neither_overflow_nor_underflow(dtype: torch.dtype, scale: float):
    x, y = (noise(2, 3, 4, 4) * scale).to(dtype), (noise(2, 3, 4, 4, seed=2) * scale).to(dtype)
    expected = pixel_loss(x.double(), y.double()).item()
    assert pixel_loss(x, y).item() == pytest.approx(expected, rel=1e-5)
    assert feature_loss({"b1": x}, {"b1": y}, ("b1",)).item() == pytest.approx(expected, rel=1e-5)


@over_dtypes
@over_architectures
def test_contrastive_loss_is_that_of_float64(config: ModelConfig, dtype: torch.dtype):
    layers = ("low", "final") if config.grows else ("b1", "final")
    losses = []
    images, ids = image_batch(config, 4).to(dtype), torch.arange(4)
    for network in converted(discriminator(config).eval(), dtype):
        contrast = InstanceContrast(network, ContrastConfig(layers=layers, negatives=20), config.contrast_dim, 8, 0)
        contrast.queue.enqueue(noise(2, 20, config.contrast_dim), ids.new_full((20,), -1))
        x = images.to(next(network.parameters()).dtype)
        loss, _ = contrast.loss(network, x.flip(3), contrast.keys(x), ids)
        loss.backward()
        losses.append(loss.detach())
    assert relative_error(*losses) < 20 * torch.finfo(dtype).eps


def test_a_restarted_queue_keeps_keys_in_float64():
    contrast = InstanceContrast(
        discriminator(AUTOGAN), ContrastConfig(layers=("final",), negatives=4), 5, 8, 0
    ).double()
    contrast.restart(("b1",), ())
    assert contrast.queue.keys.dtype == torch.float64


# --- evaluation ---


@over_dtypes
def test_interpolations_are_those_of_float64(dtype: torch.dtype):
    model, exact = converted(DCVAE(PROGRESSIVE).eval(), dtype)
    images = image_batch(PROGRESSIVE, 2).to(dtype)
    between = interpolate(model, images[:1], images[1:], steps=3)
    assert_rounded(between, interpolate(exact, images[:1].double(), images[1:].double(), steps=3), dtype)


@over_dtypes
def test_images_to_evaluate_are_float32(dtype: torch.dtype):
    model, exact = converted(DCVAE(AUTOGAN).eval(), dtype)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator())
    limit = 20 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    (sampled,) = samples(model, 3, 8, seed=0, clamp=None)
    ((real, reconstructed),) = reconstructions(model, [ImageSet("images", pixels, None)], 8, seed=0)
    assert sampled.dtype == real.dtype == reconstructed.dtype == torch.float32
    assert relative_error(sampled, exact.decode(Noise(6, 0).take(3))) < limit
    assert relative_error(reconstructed, exact.decode(exact.encode(normalize(pixels)).at(Noise(6, 0).take(3)))) < limit


@over_dtypes
def test_latents_for_the_probe_are_float32(dtype: torch.dtype):
    model = DCVAE(AUTOGAN).to(dtype).eval()
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator())
    means, _ = posterior_means(model, [ImageSet("images", pixels, torch.arange(3))], 8)
    assert torch.equal(means, model.encode(normalize(pixels)).mean.float())


@over_dtypes
def test_images_for_path_lengths_are_float32(dtype: torch.dtype):
    dtypes = set()

    def distances(begin: Tensor, end: Tensor) -> Tensor:
        dtypes.update({begin.dtype, end.dtype})
        return (end - begin).square().mean((1, 2, 3))

    network: Any = distances
    list(path_lengths(DCVAE(AUTOGAN).to(dtype).eval(), Extractor("distances", network), pairs=2, batch=2, seed=0))
    assert dtypes == {torch.float32}
