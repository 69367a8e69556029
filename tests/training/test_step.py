"""Training iterations: objectives, and the state that each of them changes.

tests/bench/test_baselines.py compares whole iterations with a plain implementation of the method.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcvae_fast.config import Config, ContrastConfig
from dcvae_fast.distributed import SINGLE
from dcvae_fast.training.noise import NoiseSource, StepVariant
from dcvae_fast.training.objectives import (
    Inputs,
    adversarial_objective,
    discriminator_objective,
    instance_objective,
    reconstruct,
)
from dcvae_fast.training.schedule import ScheduleState
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch
from test_graphs import MICRO, SMALL

B, Z = SMALL.train.batch, SMALL.model.latent_dim
# With the default ε, Adam makes full steps from gradients that are rounding errors (of a bias before BatchNorm).
CONFIG = replace(SMALL, contrast=replace(SMALL.contrast, negatives=10), optim=replace(SMALL.optim, eps=1e-3))


def with_loss(config: Config = CONFIG, **settings) -> Config:
    return replace(config, loss=replace(config.loss, **settings))


def batches(n: int, channels: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        Batch(torch.rand(B, channels, 32, 32, generator=generator) * 2 - 1, torch.arange(B) + B * i) for i in range(n)
    ]


def assert_close(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.fixture
def double() -> Iterator[None]:
    """Use float64, because adversarial training amplifies rounding errors."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def changed_groups(before: dict[str, list[torch.Tensor]], step: TrainStep) -> set[str]:
    return {
        name
        for name, group in step.engine.groups.items()
        if any(not torch.equal(x, y) for x, y in zip(before[name], group, strict=True))
    }


@pytest.mark.parametrize(
    ("objective", "groups", "loss"),
    [
        ("vae", {"encoder", "decoder"}, "loss/pixel"),
        ("vae_gan", {"encoder", "decoder", "trunk", "score"}, "loss/feature"),
        ("vae_contrastive", {"encoder", "decoder", "trunk", "heads"}, "loss/contrast"),
        ("dc_vae", {"encoder", "decoder", "trunk", "score", "heads"}, "loss/contrast"),
    ],
)
def test_each_objective_trains_the_right_networks(objective, groups, loss):
    contrast = replace(CONFIG.contrast, queue_start="noise")  # with an empty queue the first InfoNCE loss is 0
    step = TrainStep(with_loss(replace(CONFIG, contrast=contrast), objective=objective))
    before = {name: [p.detach().clone() for p in group] for name, group in step.engine.groups.items()}
    metrics = step(batches(1)[0])
    assert changed_groups(before, step) == groups
    assert ("loss/discriminator" in metrics) == ("gan" in objective or objective == "dc_vae")
    assert ("loss/adversarial" in metrics) == ("gan" in objective or objective == "dc_vae")
    assert {name for name in metrics if name in ("loss/pixel", "loss/feature", "loss/contrast")} == {loss}
    # Objectives without a GAN loss update encoder and decoder in every iteration.
    metrics = step(batches(2)[1])
    assert (loss in metrics) == (objective in ("vae", "vae_contrastive"))


@pytest.mark.usefixtures("double")
def test_vae_minimises_pixel_error_and_kl():
    step, optim = TrainStep(with_loss(objective="vae", kl_weight=0.5)), CONFIG.optim
    networks = TrainStep(with_loss(objective="vae")).networks
    parameters = [*networks.encoder.parameters(), *networks.decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, optim.lr, optim.betas, optim.eps)
    for i, batch in enumerate(batches(3)):
        step(batch)
        generator = torch.Generator().manual_seed(derive_seed(0, i * B))
        mean, logvar = networks.encoder(batch.images)
        rec = networks.decoder(mean + torch.exp(0.5 * logvar) * torch.randn(B, Z, generator=generator))
        q = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum() / B
        optimizer.zero_grad()
        ((rec - batch.images).square().mean() + 0.5 * kl).backward()
        optimizer.step()
    assert_close(step.networks.decoder.parameters(), networks.decoder.parameters())


@pytest.mark.usefixtures("double")
def test_vae_gan_compares_features_and_does_not_train_the_discriminator_with_them():
    config = with_loss(objective="vae_gan", kl_weight=0.0)
    step, reference = TrainStep(config), TrainStep(config)
    batch = batches(1)[0]
    metrics = step(batch)
    # Advance the reference to the instance objective: one step of the discriminator and one of encoder and decoder.
    networks, variant = reference.networks, StepVariant(autoencoder=True, r1=False, local=False)
    noise = NoiseSource(config, torch.device("cpu"), SINGLE).draw(B, variant, shown=0)
    assert noise.second_posterior is not None
    inputs = Inputs(batch.images, batch.ids, noise.posterior)
    inputs = inputs._replace(reconstruction=reconstruct(networks, inputs))
    for objective, prior, groups in (
        (discriminator_objective, noise.prior, ("trunk", "score")),
        (adversarial_objective, noise.generated, ("encoder", "decoder")),
    ):
        reference.engine.backward(objective(networks, inputs._replace(prior=prior), config.loss)[0], groups)
        reference.engine.step()
    mean, logvar = networks.encoder(batch.images)
    rec = networks.decoder(mean + torch.exp(0.5 * logvar) * noise.second_posterior)
    real, fake = networks.discriminator(batch.images).features, networks.discriminator(rec).features
    loss = (real["b2"].detach() - fake["b2"]).square().mean() / 2 + (
        real["final"].detach() - fake["final"]
    ).square().mean() / 2
    assert metrics["loss/feature"].item() == pytest.approx(loss.item(), rel=1e-10)
    reference.engine.backward(loss, ("encoder", "decoder"))
    reference.engine.step()
    for name, group in step.engine.groups.items():
        assert_close(group, reference.engine.groups[name])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("objective", ["vae", "vae_gan", "dc_vae"])
def test_mean_over_micro_batches_equals_the_objective_of_the_batch(objective):
    """Uses growing networks, because BatchNorm in the fixed ones depends on the whole batch."""
    contrast = replace(MICRO.contrast, local_layers=("8x8",), local_start_images=0)
    config = replace(MICRO, loss=replace(MICRO.loss, objective=objective, order="joint"), contrast=contrast)
    step = TrainStep(config)
    step.grow(ScheduleState(16, 1.0, 8, 1e-3))
    generator = torch.Generator().manual_seed(0)
    images, prior, noise = (torch.randn(8, *shape, generator=generator) for shape in ((1, 16, 16), (6,), (6,)))
    inputs = Inputs(images, torch.arange(8), noise, prior if config.loss.has_gan else None)
    if step.networks.contrast is not None:
        location = torch.tensor([0.3])
        step.networks.contrast.enqueue(step.networks.contrast.keys(-images, location), torch.arange(8, 16))
        inputs = inputs._replace(keys=step.networks.contrast.keys(images, location))
    expected, metrics = instance_objective(step.networks, inputs, config.loss)
    results = [instance_objective(step.networks, part, config.loss) for part in inputs.micro_batches(4)]
    torch.testing.assert_close(torch.stack([loss for loss, _ in results]).mean(), expected)
    assert ("loss/contrast_local" in metrics) == (objective == "dc_vae")
    for name, value in metrics.items():
        torch.testing.assert_close(torch.stack([part_metrics[name] for _, part_metrics in results]).mean(), value)
    assert len(inputs.micro_batches(3)) == 3 and inputs.micro_batches(None) == [inputs] == inputs.micro_batches(8)


def test_untrained_parameters_keep_moments_and_step_counts():
    step = TrainStep(replace(CONFIG, train=replace(CONFIG.train, n_critic=3)))
    first, second, third = batches(3)
    step(first)

    def counts() -> dict[str, set[int]]:
        moments = step.engine.moments()
        return {name: {moments[p].step for p in group if p in moments} for name, group in step.engine.groups.items()}

    # Two steps for encoder and decoder; two for the trunk, by the discriminator and the instance objective.
    assert counts() == {"encoder": {2}, "decoder": {2}, "trunk": {2}, "score": {1}, "heads": {1}}
    moments = step.engine.moments()
    heads = step.networks.discriminator.heads.named_parameters()
    assert {name.split(".")[0] for name, p in heads if p in moments} == {"b2"}  # b1, b3, b4 are not contrasted
    saved = deepcopy(step.engine.state_dict()["moments"])
    step(second)
    step(third)
    assert counts() == {"encoder": {2}, "decoder": {2}, "trunk": {4}, "score": {3}, "heads": {1}}
    current = step.engine.state_dict()["moments"]
    for name in saved:
        if name.startswith("discriminator.critic"):
            continue
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(saved[name][moment], current[name][moment]), (name, moment)
    assert all(p.grad is None for group in step.engine.groups.values() for p in group)


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("adversarial", ["hinge", "log"])
def test_options_train_with_finite_metrics(order, adversarial):
    contrast = ContrastConfig(
        negatives=6,
        layers=("b1", "b3", "final"),
        queue_start="noise",
        local_layers=("b1", "b2"),
        local_start_images=2 * B,
    )
    step = TrainStep(with_loss(replace(CONFIG, contrast=contrast), order=order, adversarial=adversarial))
    history = [step(batch) for batch in batches(5)]
    assert all(value.isfinite() for metrics in history for value in metrics.values())
    assert ["loss/contrast_local" in metrics for metrics in history] == [False, False, True, False, True]
    contrast = step.networks.contrast
    assert contrast is not None and contrast.local_queue is not None
    assert int(contrast.queue.valid) == 6
    assert set(contrast.local_queue.ids.tolist()) <= {-1, *range(2 * B, 5 * B)}


def test_runs_with_the_same_seed_are_bitwise_equal():
    def weights(seed: int) -> torch.Tensor:
        step = TrainStep(replace(CONFIG, train=replace(CONFIG.train, seed=seed)))
        for batch in batches(3):
            step(batch)
        return torch.cat([value.double().flatten() for value in step.networks.state_dict().values()])

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)  # the global generator has no effect
    assert torch.equal(first, weights(0))
    assert not torch.allclose(first, weights(3))


def test_the_official_initialisation_reaches_encoder_discriminator_and_momentum_discriminator():
    networks = TrainStep(replace(CONFIG, train=replace(CONFIG.train, initialization="official"))).networks
    assert networks.contrast is not None
    for network in (networks.encoder, networks.discriminator):
        for name, weight in network.named_parameters():
            if name.endswith("original") and weight.ndim == 4:
                assert weight.abs().max() <= weight[0].numel() ** -0.5, name  # not Xavier
    for (name, ours), momentum in zip(
        networks.discriminator.named_parameters(), networks.contrast.momentum.parameters(), strict=True
    ):
        assert torch.equal(ours, momentum), name
    for (name, ours), momentum in zip(
        networks.discriminator.named_buffers(), networks.contrast.momentum.buffers(), strict=True
    ):
        assert len(ours) == 1 or (ours - momentum).abs().max() > 0.1, name


def test_training_resumes_bitwise():
    uninterrupted, stopped = TrainStep(CONFIG), TrainStep(CONFIG)
    first, second, third = batches(3)
    for step in (uninterrupted, stopped):
        step(first)
        step(second)
    resumed = TrainStep(CONFIG)
    resumed.load_state_dict(deepcopy(stopped.state_dict()))
    uninterrupted(third)
    resumed(third)
    expected = uninterrupted.networks.state_dict()
    for name, value in resumed.networks.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_flops_of_an_iteration():
    """1.400 TFLOP for 64 images, averaged over 5 iterations with one autoencoder update; 2.00 in the authors' code."""
    step = TrainStep(Config(), "meta")
    batch = Batch(torch.empty(64, 3, 32, 32, device="meta"), torch.empty(64, dtype=torch.int64, device="meta"))
    flops = []
    for _ in range(5):
        with FlopCounterMode(display=False) as counter:
            step(batch)
        flops.append(counter.get_total_flops())
    assert flops[1] == flops[2] == flops[3] == flops[4]
    assert flops[1] / 64 / 1e9 == pytest.approx(12.50, abs=0.03)
    assert sum(flops) / 5 / 1e12 == pytest.approx(1.400, abs=5e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["vae", "vae_gan", "vae_contrastive", "dc_vae"])
def test_an_iteration_does_not_wait_for_the_device(objective):
    contrast = replace(CONFIG.contrast, local_start_images=0)
    step = TrainStep(with_loss(replace(CONFIG, contrast=contrast), objective=objective), "cuda")
    first, second, third, fourth = (Batch(batch.images.cuda(), batch.ids.cuda()) for batch in batches(4))
    step(first)
    step(second)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(third)
        step(fourth)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["merged", "separate"])
def test_each_pass_updates_spectral_norm_once(monkeypatch, kind):
    """Power iterations per iteration, by the number of layers: 11 of E, 12 of C or C′."""
    module = import_module("dcvae_kernels.spectral_norm")
    update, passes = module.normalized_weights, []

    def count(layers, iterations, *args):
        passes.append((len(layers.weights), iterations))
        return update(layers, iterations, *args)

    monkeypatch.setattr(module, "normalized_weights", count)
    step = TrainStep(with_loss(passes=kind))
    encoder, discriminator = (11, 1), (12, 1)
    first, second = batches(2)
    step(first)  # C; E and G; keys by C′; a new reconstruction and its features
    contrast = [discriminator, encoder, discriminator]
    if kind == "merged":
        assert passes == [encoder, discriminator, discriminator, *contrast]
    else:
        assert passes == [encoder, *[discriminator] * 3, encoder, *[discriminator] * 2, *contrast]
    passes.clear()
    step(second)  # C alone
    assert passes == [encoder, *[discriminator] * (1 if kind == "merged" else 3)]
