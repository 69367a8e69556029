"""The iteration against one written out from the method's definition, and what it must leave alone."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dcvae_fast.config import Config, ContrastConfig
from dcvae_fast.distributed import SINGLE
from dcvae_fast.models.autogan import Decoder
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
from test_graphs import GROWING, SMALL

B, SAMPLED, Z, D = SMALL.train.batch, 6, SMALL.model.latent_dim, SMALL.model.contrast_dim
# With the default ε, Adam makes full steps from gradients that are rounding errors (of a bias before BatchNorm).
CONFIG = replace(SMALL, contrast=replace(SMALL.contrast, negatives=10), optim=replace(SMALL.optim, eps=1e-3))


def with_loss(config: Config = CONFIG, **settings) -> Config:
    return replace(config, loss=replace(config.loss, **settings))


def batches(n: int, channels: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        Batch(torch.rand(B, channels, 32, 32, generator=generator) * 2 - 1, torch.arange(B) + B * i) for i in range(n)
    ]


class Plain:
    """The iteration, sequential or joint, with nothing clever: whole graphs, plain Adam, cross-entropy on logits."""

    def __init__(self, config: Config):
        self.config = config
        networks = TrainStep(config).networks  # for the initial weights
        self.encoder, self.decoder = networks.encoder, networks.decoder
        self.discriminator, self.momentum = networks.discriminator, deepcopy(networks.discriminator)
        self.average = [p.detach().clone() for p in self.decoder.parameters()]
        self.queue: list[torch.Tensor] = []  # [S, D] for each key, oldest first
        critic = self.discriminator.critic
        self.groups = {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "trunk": critic.trunk,
            "score": critic.score,
            "heads": self.discriminator.heads,
        }
        optim = config.optim
        self.adam = {
            name: torch.optim.Adam(group.parameters(), optim.lr, optim.betas, optim.eps, foreach=False, fused=False)
            for name, group in self.groups.items()
        }
        self.images = 0

    def step(self, loss: torch.Tensor, *groups: str) -> None:
        self.backward(loss)
        for name in groups:
            self.adam[name].step()

    def backward(self, loss: torch.Tensor) -> None:
        for optimizer in self.adam.values():
            optimizer.zero_grad()
        loss.backward()

    def reconstruct(self, images, generator):
        mean, logvar = self.encoder(images)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        return self.decoder(z), (-0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())) * 1e-6 * 64 / len(images)

    def iterate(self, batch: Batch) -> dict[str, float]:
        generator = torch.Generator().manual_seed(derive_seed(self.config.train.seed, self.images))
        x = batch.images
        rec, kl = self.reconstruct(x, generator)
        with torch.no_grad():
            fake = self.decoder(torch.randn(B, Z, generator=generator))
        real_score, fake_score, rec_score = self.discriminator(torch.cat([x, fake, rec.detach()])).score.chunk(3)
        d_loss = (
            F.relu(1 - real_score).mean() + 0.5 * F.relu(1 + fake_score).mean() + 0.5 * F.relu(1 + rec_score).mean()
        )
        self.step(d_loss, "trunk", "score")
        losses = {"loss/discriminator": d_loss}
        if self.images // B % self.config.train.n_critic == 0:
            generated = self.decoder(torch.randn(SAMPLED, Z, generator=generator))
            score = self.discriminator(torch.cat([generated, rec])).score
            g_loss = -(score[:SAMPLED].mean() * 0.5 + score[SAMPLED:].mean() * 0.5)
            if self.config.loss.order == "sequential":
                self.step(g_loss + kl, "encoder", "decoder")
                rec, kl = self.reconstruct(x, generator)
                contrast = self.contrast(rec, x)
                self.step(contrast + kl, "encoder", "decoder", "trunk", "heads")
            else:
                contrast = self.contrast(rec, x)
                # The discriminator takes InfoNCE's gradient alone, the autoencoder the sum.
                dual = [*self.groups["trunk"].parameters(), *self.groups["heads"].parameters()]
                dual_grads = torch.autograd.grad(contrast, dual, retain_graph=True, allow_unused=True)
                self.backward(g_loss + contrast + kl)
                for parameter, grad in zip(dual, dual_grads, strict=True):
                    parameter.grad = grad
                for name in ("encoder", "decoder", "trunk", "heads"):
                    self.adam[name].step()
            losses |= {"loss/adversarial": g_loss, "loss/contrast": contrast}
            decay, live = self.config.train.ema_decay, self.decoder.parameters()
            self.average = [decay * a + (1 - decay) * p.detach() for a, p in zip(self.average, live, strict=True)]
        self.images += B
        return {name: loss.item() for name, loss in losses.items()}

    def contrast(self, rec, x):
        layers = self.config.contrast.layers
        with torch.no_grad():
            for p, m in zip(self.discriminator.parameters(), self.momentum.parameters(), strict=True):
                m.copy_(m * self.config.contrast.momentum + p * (1 - self.config.contrast.momentum))
            keys = F.normalize(self.momentum.embed(self.momentum(x), layers), dim=2)
        queries = F.normalize(self.discriminator.embed(self.discriminator(rec), layers), dim=2)
        total = torch.zeros(())
        for s in range(len(layers)):
            negatives = torch.stack(self.queue)[:, s] if self.queue else torch.zeros(0, D)
            positive = (queries[s] * keys[s]).sum(1, keepdim=True)
            logits = torch.cat([positive, queries[s] @ negatives.T], dim=1) / self.config.contrast.temperature
            total = total + F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)) / len(layers)
        self.queue = [*self.queue, *keys.unbind(1)][-self.config.contrast.negatives :]
        return total


def assert_same(ours: TrainStep, plain: Plain) -> None:
    for name, group in plain.groups.items():
        for mine, theirs in zip(ours.engine.groups[name], group.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(ours.networks.decoder_ema.parameters(), plain.average, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for mine, live in zip(ours.networks.decoder_ema.buffers(), ours.networks.decoder.buffers(), strict=True):
        assert torch.equal(mine, live)
    average = ours.networks.decoder_ema
    assert isinstance(average, Decoder)
    moved = average.norm.running_mean
    assert moved is not None and moved.abs().min() > 0
    contrast = ours.networks.contrast
    assert contrast is not None
    for mine, theirs in zip(contrast.momentum.parameters(), plain.momentum.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    queued = F.normalize(contrast.queue.keys, dim=2)
    oldest = int(contrast.queue.cursor) if int(contrast.queue.valid) == CONFIG.contrast.negatives else 0
    queued = queued.roll(-oldest, dims=1)[:, : int(contrast.queue.valid)]
    torch.testing.assert_close(queued, torch.stack(plain.queue, dim=1), rtol=1e-10, atol=1e-12)


@pytest.fixture
def double() -> Iterator[None]:
    """Use float64, because adversarial training amplifies rounding errors."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_iterations_are_the_method_written_out(order):
    config = with_loss(order=order)
    ours, plain = TrainStep(config), Plain(config)
    for batch in batches(7):  # four autoencoder steps: the queue of ten wraps around
        metrics, expected = ours(batch), plain.iterate(batch)
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-10), name
        assert ("loss/contrast" in metrics) == ("loss/contrast" in expected)
    assert_same(ours, plain)


def changed(before: dict[str, list[torch.Tensor]], step: TrainStep) -> set[str]:
    return {
        name
        for name, group in step.engine.groups.items()
        if any(not torch.equal(was, now) for was, now in zip(before[name], group, strict=True))
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
def test_each_objective_trains_its_networks(objective, groups, loss):
    noise = replace(CONFIG.contrast, queue_start="noise")  # with an empty queue the first InfoNCE is 0
    step = TrainStep(with_loss(replace(CONFIG, contrast=noise), objective=objective))
    before = {name: [p.detach().clone() for p in group] for name, group in step.engine.groups.items()}
    metrics = step(batches(1)[0])
    assert changed(before, step) == groups
    assert ("loss/discriminator" in metrics) == ("gan" in objective or objective == "dc_vae")
    assert ("loss/adversarial" in metrics) == ("gan" in objective or objective == "dc_vae")
    assert {name for name in metrics if name in ("loss/pixel", "loss/feature", "loss/contrast")} == {loss}
    # Without a discriminator's step, which happens in every iteration, there is nothing to wait for.
    metrics = step(batches(2)[1])
    assert (loss in metrics) == (objective in ("vae", "vae_contrastive"))


@pytest.mark.usefixtures("double")
def test_vae_minimises_pixel_error_and_kl():
    step, config = TrainStep(with_loss(objective="vae", kl_weight=0.5)), CONFIG.optim
    plain = TrainStep(with_loss(objective="vae")).networks
    parameters = [*plain.encoder.parameters(), *plain.decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, config.lr, config.betas, config.eps)
    for i, batch in enumerate(batches(3)):
        step(batch)
        generator = torch.Generator().manual_seed(derive_seed(0, i * B))
        mean, logvar = plain.encoder(batch.images)
        rec = plain.decoder(mean + torch.exp(0.5 * logvar) * torch.randn(B, Z, generator=generator))
        q = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum() / B
        optimizer.zero_grad()
        ((rec - batch.images).square().mean() + 0.5 * kl).backward()
        optimizer.step()
    for mine, theirs in zip(step.networks.decoder.parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_vae_gan_compares_features_and_leaves_the_discriminator_alone():
    config = with_loss(objective="vae_gan", kl_weight=0.0)
    step, plain = TrainStep(config), TrainStep(config)
    batch = batches(1)[0]
    metrics = step(batch)
    # The same state just before the instance step: one step of the discriminator and one of the autoencoder later.
    networks, variant = plain.networks, StepVariant(autoencoder=True, r1=False, local=False)
    noise = NoiseSource(config, torch.device("cpu"), SINGLE).draw(B, variant, shown=0)
    assert noise.again is not None
    inputs = Inputs(batch.images, batch.ids, noise.posterior)
    inputs = inputs._replace(reconstruction=reconstruct(networks, inputs))
    for objective, prior, groups in (
        (discriminator_objective, noise.prior, ("trunk", "score")),
        (adversarial_objective, noise.generated, ("encoder", "decoder")),
    ):
        plain.engine.backward(objective(networks, inputs._replace(prior=prior), config.loss)[0], groups)
        plain.engine.step()
    mean, logvar = networks.encoder(batch.images)
    rec = networks.decoder(mean + torch.exp(0.5 * logvar) * noise.again)
    real, fake = networks.discriminator(batch.images).features, networks.discriminator(rec).features
    loss = (real["b2"].detach() - fake["b2"]).square().mean() / 2 + (
        real["final"].detach() - fake["final"]
    ).square().mean() / 2
    assert metrics["loss/feature"].item() == pytest.approx(loss.item(), rel=1e-10)
    plain.engine.backward(loss, ("encoder", "decoder"))
    plain.engine.step()
    for name, group in step.engine.groups.items():
        for mine, theirs in zip(group, plain.engine.groups[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("objective", ["vae", "vae_gan", "dc_vae"])
def test_objectives_of_micro_batches_add_up_to_that_of_the_batch(objective):
    """The networks at 32×32 have statistics of a batch, which do not add up; those that grow are tested here."""
    config = replace(GROWING, loss=replace(GROWING.loss, objective=objective, order="joint"))
    step = TrainStep(config)
    step.grow(ScheduleState(16, 1.0, 8, 1e-3))
    generator = torch.Generator().manual_seed(0)
    images, prior, noise = (torch.randn(8, *shape, generator=generator) for shape in ((1, 16, 16), (6,), (6,)))
    inputs = Inputs(images, torch.arange(8), noise, prior if config.loss.has_gan else None)
    if step.networks.contrast is not None:
        step.networks.contrast.enqueue(step.networks.contrast.keys(-images), torch.arange(8, 16))
        inputs = inputs._replace(keys=step.networks.contrast.keys(images))
    whole, metrics = instance_objective(step.networks, inputs, config.loss)
    parts = [instance_objective(step.networks, part, config.loss) for part in inputs.micro_batches(4)]
    torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).mean(), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(torch.stack([part[name] for _, part in parts]).mean(), value)
    assert len(inputs.micro_batches(3)) == 3 and inputs.micro_batches(None) == [inputs] == inputs.micro_batches(8)


def test_what_a_step_does_not_train_keeps_moments_and_step_counts():
    step = TrainStep(replace(CONFIG, train=replace(CONFIG.train, n_critic=3)))
    first, second, third = batches(3)
    step(first)

    def counts() -> dict[str, set[int]]:
        moments = step.engine.moments()
        return {name: {moments[p].step for p in group if p in moments} for name, group in step.engine.groups.items()}

    # Twice for the autoencoder, and for the trunk: discriminator, then contrast.
    assert counts() == {"encoder": {2}, "decoder": {2}, "trunk": {2}, "score": {1}, "heads": {1}}
    moments = step.engine.moments()
    heads = step.networks.discriminator.heads.named_parameters()
    assert {name.split(".")[0] for name, p in heads if p in moments} == {"b2"}  # b1, b3, b4 are not contrasted
    saved = deepcopy(step.engine.state_dict()["moments"])
    step(second)
    step(third)
    assert counts() == {"encoder": {2}, "decoder": {2}, "trunk": {4}, "score": {3}, "heads": {1}}
    now = step.engine.state_dict()["moments"]
    for name in saved:
        if name.startswith("discriminator.critic"):
            continue
        for average in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(saved[name][average], now[name][average]), (name, average)
    assert all(p.grad is None for group in step.engine.groups.values() for p in group)


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("adversarial", ["hinge", "log"])
def test_options_train_and_stay_finite(order, adversarial):
    contrast = ContrastConfig(
        negatives=6,
        layers=("b1", "b3", "final"),
        queue_start="noise",
        local_layers=("b1", "b2"),
        local_start_images=2 * B,
    )
    step = TrainStep(with_loss(replace(CONFIG, contrast=contrast), order=order, adversarial=adversarial))
    seen = [step(batch) for batch in batches(5)]
    assert all(value.isfinite() for metrics in seen for value in metrics.values())
    assert ["loss/contrast_local" in metrics for metrics in seen] == [False, False, True, False, True]
    contrast = step.networks.contrast
    assert contrast is not None and contrast.local_queue is not None
    assert int(contrast.queue.valid) == 6
    assert set(contrast.local_queue.ids.tolist()) <= {-1, *range(2 * B, 5 * B)}


def test_two_runs_are_bitwise_equal_and_seeds_differ():
    def weights(seed: int) -> torch.Tensor:
        step = TrainStep(replace(CONFIG, train=replace(CONFIG.train, seed=seed)))
        for batch in batches(3):
            step(batch)
        return torch.cat([value.double().flatten() for value in step.networks.state_dict().values()])

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)  # the global generator has no say
    assert torch.equal(first, weights(0))
    assert not torch.allclose(first, weights(3))


def test_state_goes_on_bitwise():
    whole, stopped = TrainStep(CONFIG), TrainStep(CONFIG)
    first, second, third = batches(3)
    for step in (whole, stopped):
        step(first)
        step(second)
    resumed = TrainStep(CONFIG)
    resumed.load_state_dict(deepcopy(stopped.state_dict()))
    whole(third)
    resumed(third)
    for (name, mine), theirs in zip(
        whole.networks.state_dict().items(), resumed.networks.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_an_iteration_does_no_arithmetic_twice():
    """1.400 TFLOP for 64 images with the 1-in-5 steps averaged in, where the authors' code spends 2.00."""
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
def test_nothing_waits_for_the_device(objective):
    contrast = replace(CONFIG.contrast, local_start_images=0)
    step = TrainStep(with_loss(replace(CONFIG, contrast=contrast), objective=objective), "cuda")
    moved = [Batch(batch.images.cuda(), batch.ids.cuda()) for batch in batches(4)]
    step(moved[0])
    step(moved[1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(moved[2])
        step(moved[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
