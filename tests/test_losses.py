"""Loss values against numbers calculated by hand."""

import math

import pytest
import torch

from dcvae_fast.losses import autoencoder_loss, discriminator_loss, feature_loss, kl_divergence, pixel_loss

REAL, FAKE, REC = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0, 1.0, 1.0]), torch.tensor([-0.5, 0.5])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_hinge():
    # real: (0 + 0.5)/2; fake: ½ (0 + 1 + 2 + 2)/4; reconstruction: ½ (0.5 + 1.5)/2
    assert discriminator_loss(REAL, FAKE, REC).item() == pytest.approx(0.25 + 0.625 + 0.5)
    assert autoencoder_loss(FAKE, REC).item() == pytest.approx(0.0)
    assert autoencoder_loss(FAKE + 2, REC + 4).item() == pytest.approx(-1 - 2)


def test_log_is_equation_4():
    real = sum(softplus(-x) for x in REAL.tolist()) / 2  # −log D(x)
    fake = sum(softplus(x) for x in FAKE.tolist()) / 4  # −log(1 − D(G(z)))
    rec = sum(softplus(x) for x in REC.tolist()) / 2
    assert discriminator_loss(REAL, FAKE, REC, "log").item() == pytest.approx(real + fake + rec)
    fooled = sum(softplus(-x) for x in FAKE.tolist()) / 4 + sum(softplus(-x) for x in REC.tolist()) / 2
    assert autoencoder_loss(FAKE, REC, "log").item() == pytest.approx(fooled)


def test_kl_matches_torch_distributions_and_is_independent_of_the_batch_size():
    mean, logvar = torch.randn(5, 3), torch.randn(5, 3)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    torch.testing.assert_close(kl_divergence(mean.repeat(4, 1), logvar.repeat(4, 1)), expected)
    # The authors' weight of 1e-6 for the sum over a batch of 64 equals 6.4e-5 for the mean.
    mean, logvar = torch.randn(64, 128), torch.randn(64, 128)
    official = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp()) * 1e-6
    torch.testing.assert_close(6.4e-5 * kl_divergence(mean, logvar), official)


def test_reconstruction_losses():
    images = torch.tensor([[[[1.0, -1.0]]], [[[0.0, 0.0]]]])
    assert pixel_loss(images, torch.zeros_like(images)).item() == pytest.approx(0.5)
    real = {"b2": torch.ones(2, 3, 1, 1, requires_grad=True), "final": torch.zeros(2, 4), "b1": torch.full((1,), 99.0)}
    rec = {"b2": torch.full((2, 3, 1, 1), 3.0, requires_grad=True), "final": torch.ones(2, 4), "b1": torch.zeros(1)}
    loss = feature_loss(real, rec, ("b2", "final"))
    assert loss.item() == pytest.approx((4 + 1) / 2)
    loss.backward()
    assert real["b2"].grad is None
    assert rec["b2"].grad is not None
