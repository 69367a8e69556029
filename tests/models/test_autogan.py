"""The 32×32 networks: sizes, FLOPs and initialisation, compared with the paper's Figure 15."""

import pytest
import torch
from torch import nn

from dcvae_fast.models.autogan import Decoder, Discriminator, Encoder, init_normalized_layers
from dcvae_fast.models.layers import copy_buffers, frozen, update_ema
from dcvae_fast.training.plan import count_parameters, forward_flops


@pytest.mark.parametrize(
    ("network", "parameters", "gflop", "shape"),
    [
        (Decoder, 4_405_251, 3.530, (1, 128)),
        (Encoder, 1_086_464, 0.544, (1, 3, 32, 32)),
        (Discriminator, 1_063_445, 0.544, (1, 3, 32, 32)),
    ],
)
def test_parameters_and_flops(network, parameters, gflop, shape):
    net = network()
    assert count_parameters(net) == parameters
    assert forward_flops(net, torch.zeros(shape)) / 1e9 == pytest.approx(gflop, abs=5e-4)


def test_shapes_follow_the_configuration():
    images = Decoder(latent_dim=7, width=12, image_channels=1)(torch.randn(2, 7))
    assert images.shape == (2, 1, 32, 32)
    assert images.abs().max() <= 1
    mean, logvar = Encoder(latent_dim=7, width=6, image_channels=1)(images)
    assert mean.shape == logvar.shape == (2, 7)
    discriminator = Discriminator(width=6, image_channels=1, contrast_dim=5)
    critique = discriminator(images)
    assert critique.score.shape == (2,)
    assert {name: tuple(f.shape) for name, f in critique.features.items()} == {
        "b1": (2, 6, 16, 16),
        "b2": (2, 6, 8, 8),
        "b3": (2, 6, 8, 8),
        "b4": (2, 6, 8, 8),
        "final": (2, 5),
    }
    assert discriminator.embed(critique, ["b1", "final", "b4"]).shape == (3, 2, 5)


def test_only_trunk_and_score_are_spectrally_normalised():
    torch.manual_seed(0)
    discriminator = Discriminator(width=6)
    normalised = {name.removesuffix(".original") for name, _ in discriminator.named_parameters() if "original" in name}
    assert len(normalised) == 12  # ten convolutions of the blocks, two linear layers
    assert all(name.startswith("critic.") for name in normalised)
    spectral = [
        torch.linalg.matrix_norm(module.weight.flatten(1), 2)
        for module in discriminator.critic.eval().modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    assert len(spectral) == 12
    torch.testing.assert_close(torch.stack(spectral), torch.ones(12), rtol=0.1, atol=0)


def test_initialisation():
    torch.manual_seed(0)
    decoder = Decoder().requires_grad_(False)
    weight = decoder.cell1.conv1.weight
    bound = (6 / (2 * 256 * 9)) ** 0.5  # Xavier uniform
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert decoder.norm.weight.mean() == pytest.approx(1, abs=0.01)
    assert decoder.norm.weight.std() == pytest.approx(0.02, rel=0.2)
    original = dict(Encoder().requires_grad_(False).named_parameters())[
        "trunk.b3.conv1.parametrizations.weight.original"
    ]
    assert original.abs().max() == pytest.approx((6 / (2 * 128 * 9)) ** 0.5, rel=1e-3)


def test_official_initialisation_of_normalised_layers():
    """They keep torch's default; see `init_normalized_layers`. u and v are random, without power iterations."""
    torch.manual_seed(0)
    discriminator = Discriminator().requires_grad_(False)
    unchanged = {name: p.clone() for name, p in discriminator.named_parameters() if "original" not in name}
    vectors = [buffer.clone() for buffer in discriminator.buffers()]
    init_normalized_layers(discriminator)
    for name, weight in discriminator.named_parameters():
        if "original" not in name:
            assert torch.equal(weight, unchanged[name]), name
            continue
        bound = weight[0].numel() ** -0.5
        assert weight.abs().max() <= bound, name
        if weight.numel() > 10_000:
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02), name
            norm, matrix = name.removesuffix("original") + "0.", weight.flatten(1)
            u, v = discriminator.get_buffer(f"{norm}_u"), discriminator.get_buffer(f"{norm}_v")
            assert abs(u @ matrix @ v) < 0.5 * torch.linalg.matrix_norm(matrix, 2), name
    for old, new in zip(vectors, discriminator.buffers(), strict=True):
        assert new.norm() == pytest.approx(1)
        assert len(new) < 100 or abs(old @ new) < 0.5


def test_frozen_passes_gradients_to_the_input_only():
    discriminator = Discriminator(width=4)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    with frozen(discriminator):
        score = discriminator(images).score
    score.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator.parameters())


def test_ema_of_parameters_and_copy_of_buffers():
    ema, network = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(network.weight, 3.0)
    assert ema.running_mean is not None and network.running_mean is not None
    network.running_mean.fill_(5.0)
    update_ema(ema, network, decay=0.75)
    assert ema.weight.tolist() == [1.5, 1.5]  # 0.75 · 1 + 0.25 · 3
    assert ema.running_mean.tolist() == [0, 0]
    copy_buffers(ema, network)
    assert ema.running_mean.tolist() == [5, 5]
