"""The iteration against one written out from the method's definition, and what it must leave alone."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dcvae_pipelines import Batch
from torch.utils.flop_counter import FlopCounterMode

from dcvae_fast.config import Config, ContrastConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.step import TrainStep

B, SAMPLED, Z, D = 4, 6, 5, 3
CONFIG = Config(
    model=ModelConfig(1, Z, decoder_width=8, encoder_width=4, discriminator_width=4, contrast_dim=D),
    contrast=ContrastConfig(negatives=10, layers=("b2", "final"), momentum=0.9),
    optim=OptimConfig(lr=1e-3),
    train=TrainConfig(batch=B, sampled_batch=SAMPLED, n_critic=2, average=0.9),
)


def with_loss(config: Config = CONFIG, **settings) -> Config:
    return replace(config, loss=replace(config.loss, **settings))


def batches(n: int, channels: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [Batch(torch.rand(B, channels, 32, 32, generator=generator) * 2 - 1, torch.arange(B) + B * i) for i in range(n)]


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
        self.adam = {
            name: torch.optim.Adam(group.parameters(), config.optim.lr, config.optim.betas, foreach=False, fused=False)
            for name, group in self.groups.items()
        }
        self.images = 0

    def step(self, loss: torch.Tensor, *groups: str) -> None:
        for optimizer in self.adam.values():
            optimizer.zero_grad()
        loss.backward()
        for name in groups:
            self.adam[name].step()

    def reconstruct(self, images, generator):
        mean, logvar = self.encoder(images)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        return self.decoder(z), (-0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())) * 1e-6 * 64 / len(images)

    def iterate(self, batch: Batch) -> dict[str, float]:
        generator = torch.Generator().manual_seed(derive_seed(self.config.train.seed, 0, self.images))
        joint = self.config.loss.order == "joint"
        x = batch.images
        rec, kl = self.reconstruct(x, generator)
        fake = self.decoder(torch.randn(B, Z, generator=generator))
        real_score, fake_score, rec_score = self.discriminator(torch.cat([x, fake, rec])).score.chunk(3)
        d_loss = F.relu(1 - real_score).mean() + 0.5 * F.relu(1 + fake_score).mean() + 0.5 * F.relu(1 + rec_score).mean()
        self.step(d_loss, "trunk", "score")
        losses = {"loss/discriminator": d_loss.item()}
        if self.images // B % self.config.train.n_critic == 0:
            if not joint:
                g_loss = self.generator_loss(fake_score, rec, generator)
                self.step(g_loss + kl, "encoder", "decoder")
                rec, kl = self.reconstruct(x, generator)
                contrast = self.contrast(rec, x)
                self.step(contrast + kl, "encoder", "decoder", "trunk", "heads")
            else:
                # One sum of gradients, of which the discriminator's trunk takes only InfoNCE's.
                rec, kl = self.repeat(x)
                g_loss = self.generator_loss(fake_score, rec, generator)
                contrast = self.contrast(rec, x)
                modules = [self.discriminator.critic.trunk, self.discriminator.heads]
                dual = [p for module in modules for p in module.parameters()]
                dual_grads = torch.autograd.grad(contrast, dual, retain_graph=True, allow_unused=True)
                self.step(g_loss + contrast + kl)
                for p, grad in zip(dual, dual_grads, strict=True):
                    p.grad = grad
                for name in ("encoder", "decoder", "trunk", "heads"):
                    self.adam[name].step()
            losses |= {"loss/adversarial": g_loss.item(), "loss/contrast": contrast.item()}
            decay = self.config.train.average
            self.average = [decay * a + (1 - decay) * p.detach() for a, p in zip(self.average, self.decoder.parameters(), strict=True)]
        self.images += B
        return losses

    def repeat(self, x):
        """The reconstruction of this iteration's beginning, once more: batch statistics move as for one pass."""
        state = deepcopy(self.decoder.state_dict()), deepcopy(self.encoder.state_dict())
        generator = torch.Generator().manual_seed(derive_seed(self.config.train.seed, 0, self.images))
        self.encoder.load_state_dict(self.encoder_before)
        out = self.reconstruct(x, generator)
        with torch.no_grad():
            for name, buffer in self.decoder.named_buffers():
                buffer.copy_(state[0][name])
            for name, buffer in self.encoder.named_buffers():
                buffer.copy_(state[1][name])
        return out

    def generator_loss(self, _, rec, generator):
        gen = self.decoder(torch.randn(SAMPLED, Z, generator=generator))
        score = self.discriminator(torch.cat([gen, rec])).score
        return -(score[:SAMPLED].mean() * 0.5 + score[SAMPLED:].mean() * 0.5)

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
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(ours.networks.decoder_average.parameters(), plain.average, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    contrast = ours.networks.contrast
    assert contrast is not None
    for mine, theirs in zip(contrast.momentum.parameters(), plain.momentum.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    queued = F.normalize(contrast.queue.keys, dim=2)
    oldest = int(contrast.queue.cursor) if int(contrast.queue.valid) == CONFIG.contrast.negatives else 0
    queued = queued.roll(-oldest, dims=1)[:, : int(contrast.queue.valid)]
    torch.testing.assert_close(queued, torch.stack(plain.queue, dim=1), rtol=1e-3, atol=1e-4)


def test_sequential_iterations_are_the_method_written_out():
    ours, plain = TrainStep(CONFIG), Plain(CONFIG)
    for batch in batches(7):  # four autoencoder steps: the queue of ten wraps around
        metrics, expected = ours(batch), plain.iterate(batch)
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert_same(ours, plain)
