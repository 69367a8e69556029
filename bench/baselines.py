"""One training iteration as in the paper and the authors' code, in plain PyTorch: the baseline of our times.

Eager, float32, NCHW. Order and economy are the authors': prior samples are detached in the discriminator's step, the
reconstruction is not, and gradients of networks that are not stepped are cleared before their next use. Each step makes
its own reconstruction, and each kind of image has its own pass through the discriminator. Given the same seed, the
baseline draws the same noise as `TrainStep`. It computes the same with the networks that grow, and at 32×32 if
`loss.passes` is separate.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dcvae_fast.config import Config, ModelConfig
from dcvae_fast.models import autogan
from dcvae_fast.models.progressive import LOW, DownConv2d, EqualizedConv2d, EqualizedLinear, Phase, UpConv2d, set_phase
from dcvae_fast.training.schedule import ScheduleState, schedule_at
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.step import Networks

# --- our networks, with plain layers ---


class EqualizedLayer(nn.Module):
    """Layer with equalised learning rate: a weight of N(0, 1), scaled in each call. Resampling is not folded in."""

    def __init__(self, ours: EqualizedConv2d | EqualizedLinear):
        super().__init__()
        self.weight, self.bias = nn.Parameter(ours.weight.detach() / ours.scale), ours.bias
        self.scale, self.up, self.down = ours.scale, isinstance(ours, UpConv2d), isinstance(ours, DownConv2d)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        if weight.ndim == 2:
            return F.linear(x, weight, self.bias)
        x = F.interpolate(x, scale_factor=2, mode="nearest") if self.up else x
        x = F.conv2d(x, weight, self.bias, padding=weight.shape[2] // 2)
        return F.avg_pool2d(x, 2) if self.down else x


def with_plain_layers(network: nn.Module) -> nn.Module:
    """Return a copy of one of our growing networks in which nothing is folded into a weight."""
    network = deepcopy(network)
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, EqualizedConv2d | EqualizedLinear):
                module.add_module(name, EqualizedLayer(layer))
    return network


def with_plain_spectral_norm(m: ModelConfig, ours: Networks) -> tuple[nn.Module, ...]:
    """Return copies of E, G, C and C′ at 32×32 whose spectral norms are updated in every call."""
    encoder = autogan.Encoder(m.latent_dim, m.encoder_width, m.image_channels)
    encoder.trunk = autogan.Trunk(m.image_channels, m.encoder_width, 2 * m.latent_dim)
    discriminator = autogan.Discriminator(m.discriminator_width, m.image_channels, m.contrast_dim)
    discriminator.critic = autogan.Critic(m.image_channels, m.discriminator_width, m.contrast_dim)
    for layer in [*encoder.trunk.modules(), *discriminator.critic.modules()]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrizations.spectral_norm(layer)
    encoder.load_state_dict(ours.encoder.state_dict())
    discriminator.load_state_dict(ours.discriminator.state_dict())
    momentum = deepcopy(discriminator)
    assert ours.contrast is not None
    momentum.load_state_dict(ours.contrast.momentum.state_dict())
    return encoder, deepcopy(ours.decoder), discriminator, momentum


# --- losses ---


def discriminator_loss(real: Tensor, fake: Tensor, rec: Tensor, kind: str, drift: float) -> Tensor:
    if kind == "hinge":
        return F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean() + 0.5 * F.relu(1 + rec).mean()
    if kind == "wgan_gp":
        return -real.mean() + 0.5 * fake.mean() + 0.5 * rec.mean() + drift * real.pow(2).mean()
    return F.softplus(-real).mean() + 0.5 * F.softplus(fake).mean() + 0.5 * F.softplus(rec).mean()


def adversarial_loss(fake: Tensor, rec: Tensor, kind: str) -> Tensor:
    if kind == "logistic_r1":
        return 0.5 * F.softplus(-fake).mean() + 0.5 * F.softplus(-rec).mean()
    return -0.5 * fake.mean() - 0.5 * rec.mean()


def image_gradient(images: Tensor, scores: Tensor) -> Tensor:
    """∂(sum of scores)/∂images, [B, C·R·R], differentiable."""
    return torch.autograd.grad(scores.sum(), images, create_graph=True)[0].flatten(1)


# --- the iteration ---


class Baseline:
    """Train on a batch in each call of `iterate`, from the initial weights of `TrainStep` with the same config.

    As with `TrainStep`, call `grow` and `refill` first if `schedule` has another resolution.

    Raises:
        ValueError: the config has an objective other than dc_vae, another adversarial loss, local patch contrast, or
            growth without restarts of Adam or with real images that do not fade in.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        loss = config.loss
        known = loss.adversarial in ("hinge", "wgan_gp", "logistic_r1")
        if loss.objective != "dc_vae" or not known:
            raise ValueError(
                f"loss.objective is {loss.objective!r} and loss.adversarial {loss.adversarial!r}; "
                f"the baseline does dc_vae with hinge, wgan_gp or logistic_r1."
            )
        growth, local_start = config.growth, config.contrast.local_start_images
        if local_start is not None or (config.model.grows and not (growth.reset_adam and growth.blend_real)):
            raise ValueError(
                f"contrast.local_start_images is {local_start}, growth.reset_adam {growth.reset_adam} and "
                f"growth.blend_real {growth.blend_real}; the baseline does only None, True and True."
            )
        self.config, self.device = config, torch.device(device)
        ours = Networks(config)
        assert ours.contrast is not None
        networks: Any = ours.encoder, ours.decoder, ours.discriminator, ours.contrast.momentum
        if config.model.grows:
            networks = map(with_plain_layers, networks)
        else:
            networks = with_plain_spectral_norm(config.model, ours)
        self.encoder, self.decoder, self.discriminator, self.momentum = (n.to(self.device) for n in networks)
        self.momentum.requires_grad_(False)
        self.decoder_ema = deepcopy(self.decoder).requires_grad_(False)
        critic = self.discriminator.critic
        groups = {"encoder": self.encoder, "decoder": self.decoder, "trunk": critic.trunk, "score": critic.score}
        groups["heads"] = self.discriminator.heads
        self.groups = {name: list(group.parameters()) for name, group in groups.items()}
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device)
        self.images = self.iterations = 0
        self.phase = Phase(self.schedule.resolution)
        self.grow(self.schedule)

    @property
    def schedule(self) -> ScheduleState:
        return schedule_at(self.config, self.images)

    def grow(self, to: ScheduleState) -> None:
        """Start with new Adam moments and a new queue."""
        self._set_phase(to)
        self._reset_adam(to.lr)
        contrast, seed = self.config.contrast, self.config.train.seed
        low = not self.config.model.grows or to.resolution >= LOW
        self.layers = [layer for layer in contrast.layers if low or layer != "low"]
        shape = (len(self.layers), contrast.negatives, self.config.model.contrast_dim)
        self.keys, self.filled, self.cursor = torch.zeros(shape), 0, 0
        if contrast.queue_start == "noise":
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, "queue")))
            self.keys, self.filled = F.normalize(noise, dim=2), contrast.negatives
        self.keys = self.keys.to(self.device)
        self.ids = torch.full((contrast.negatives,), -1, device=self.device)

    @torch.no_grad()
    def refill(self, images: Tensor, ids: Tensor) -> None:
        """Put the keys of new images into the queue."""
        self._enqueue(self._embeddings(self.momentum, self._faded(images)), ids)

    def iterate(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Train on images [B, C, R, R] of the present resolution with their ids [B]; return losses on the device."""
        config, now = self.config, self.schedule
        if self.phase != Phase(now.resolution, now.alpha):
            self._set_phase(now)
        self.generator.manual_seed(derive_seed(config.train.seed, self.images))
        x = self._faded(images)
        noise = self._noise(len(x))
        losses = self._discriminator_step(x, noise)
        if self.iterations % config.train.n_critic == 0:
            losses |= self._autoencoder_steps(x, noise, ids)
            update_ema(self.decoder_ema, self.decoder, config.train.ema_decay)
        for ema, value in zip(self.decoder_ema.buffers(), self.decoder.buffers(), strict=True):
            ema.copy_(value)
        self.images += len(x)
        self.iterations += 1
        return losses

    def _discriminator_step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        loss, losses = self.config.loss, {}
        fake = self.decoder(self._noise(len(x))).detach()
        rec, _ = self._reconstruct(x, noise)
        penalises_real = loss.adversarial == "logistic_r1" and self.iterations % loss.penalty_every == 0
        real = x.detach().requires_grad_(penalises_real)
        real_score, fake_score, rec_score = self._score(real), self._score(fake), self._score(rec)
        total = discriminator_loss(real_score, fake_score, rec_score, loss.adversarial, loss.drift)
        losses["loss/discriminator"] = total.detach()
        if loss.adversarial == "wgan_gp":
            # The other end is the sample or the reconstruction, chosen at random per image.
            choice, place = torch.rand(2, len(x), 1, 1, 1, device=self.device, generator=self.generator)
            end = torch.where(choice < 0.5, fake, rec.detach())
            between = (x + place * (end - x)).requires_grad_()
            penalty = (image_gradient(between, self._score(between)).norm(2, dim=1) - 1).pow(2).mean()
            losses["loss/penalty"] = penalty.detach()
            total = total + loss.penalty * penalty
        elif penalises_real:
            penalty = 0.5 * image_gradient(real, real_score).pow(2).sum(1).mean()
            losses["loss/penalty"] = penalty.detach()
            total = total + loss.penalty_every * loss.penalty * penalty
        self._step(total, "trunk", "score")
        return losses

    def _autoencoder_steps(self, x: Tensor, noise: Tensor, ids: Tensor) -> dict[str, Tensor]:
        loss = self.config.loss
        fake = self.decoder(self._noise(self.config.train.sampled_batch or len(x)))
        if loss.passes == "separate":  # otherwise ours reuses the reconstruction of the discriminator's step
            noise = self._noise(len(x))
        rec, kl = self._reconstruct(x, noise)
        adversarial = adversarial_loss(self._score(fake), self._score(rec), loss.adversarial)
        if loss.order == "sequential":
            self._step(adversarial + loss.kl_weight * kl, "encoder", "decoder")
            rec, kl = self._reconstruct(x, self._noise(len(x)))
            info_nce, keys, losses = self._contrast(x, rec, ids)
            self._step(info_nce + loss.kl_weight * kl, "encoder", "decoder", "trunk", "heads")
        else:
            info_nce, keys, losses = self._contrast(x, rec, ids)
            # The discriminator is trained by InfoNCE alone, encoder and decoder by the sum.
            discriminator = [*self.groups["trunk"], *self.groups["heads"]]
            gradients = torch.autograd.grad(info_nce, discriminator, retain_graph=True, allow_unused=True)
            self._backward(adversarial + info_nce + loss.kl_weight * kl)
            for parameter, gradient in zip(discriminator, gradients, strict=True):
                parameter.grad = gradient
            self._update("encoder", "decoder", "trunk", "heads")
        self._enqueue(keys, ids)
        return {**losses, "loss/adversarial": adversarial.detach(), "loss/kl": kl.detach()}

    def _contrast(self, x: Tensor, rec: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return InfoNCE, the keys and metrics."""
        contrast = self.config.contrast
        update_ema(self.momentum, self.discriminator, contrast.momentum)
        queries = self._embeddings(self.discriminator, rec)
        with torch.no_grad():
            keys = self._embeddings(self.momentum, x)
        positive = (queries * keys).sum(2, keepdim=True)
        negatives = queries @ self.keys[:, : self.filled].mT
        if contrast.exclude_same_image:
            negatives = negatives.masked_fill(ids[:, None] == self.ids[: self.filled], -torch.inf)
        logits = torch.cat([positive, negatives], dim=2) / contrast.temperature
        target = torch.zeros(logits.shape[:2], dtype=torch.long, device=self.device)
        info_nce = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        losses = {"loss/contrast": info_nce.detach()}
        rank = (negatives.detach() > positive.detach()).sum(2)
        for i, layer in enumerate(self.layers):
            losses[f"contrast/top1_{layer}"] = (rank[i] < 1).float().mean()
            losses[f"contrast/top5_{layer}"] = (rank[i] < 5).float().mean()
        return info_nce, keys, losses

    def _step(self, loss: Tensor, *groups: str) -> None:
        self._backward(loss)
        self._update(*groups)

    def _backward(self, loss: Tensor) -> None:
        for optimizer in self.adam.values():
            optimizer.zero_grad()
        loss.backward()

    def _update(self, *groups: str) -> None:
        for name in groups:
            self.adam[name].step()

    def _reconstruct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return G(z) of z from q(z|x), and KL: the sum over the latent, the mean over the batch."""
        mean, logvar = self.encoder(x)
        kl = -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1).mean()
        return self.decoder(mean + torch.exp(0.5 * logvar) * noise), kl

    def _score(self, images: Tensor) -> Tensor:
        return self.discriminator(images).score

    def _embeddings(self, network: Any, images: Tensor) -> Tensor:
        """Return normalised queries or keys [S, B, D] of the contrasted layers."""
        critique = network(images, stddev_parts=0)
        return F.normalize(network.embed(critique, self.layers), dim=2)

    def _enqueue(self, keys: Tensor, ids: Tensor) -> None:
        size, n = self.config.contrast.negatives, len(ids)
        slots = torch.arange(self.cursor, self.cursor + n, device=self.device) % size
        self.keys[:, slots], self.ids[slots] = keys, ids
        self.cursor, self.filled = (self.cursor + n) % size, min(self.filled + n, size)

    def _noise(self, n: int) -> Tensor:
        return torch.randn(n, self.config.model.latent_dim, device=self.device, generator=self.generator)

    def _reset_adam(self, lr: float) -> None:
        optim = self.config.optim
        self.adam = {name: torch.optim.Adam(group, lr, optim.betas, optim.eps) for name, group in self.groups.items()}

    def _set_phase(self, to: ScheduleState) -> None:
        faded = self.phase.alpha < 1
        self.phase = Phase(to.resolution, to.alpha)
        if faded and not self.phase.fades:
            self._reset_adam(to.lr)
        for network in (self.encoder, self.decoder, self.discriminator, self.momentum):
            set_phase(network, self.phase)

    def _faded(self, images: Tensor) -> Tensor:
        """Real images fade in with the networks."""
        alpha = self.phase.alpha
        if alpha == 1:
            return images
        return alpha * images + (1 - alpha) * F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    for average, value in zip(ema.parameters(), network.parameters(), strict=True):
        average.mul_(decay).add_(value, alpha=1 - decay)
