"""One training iteration as in the paper and the authors' code, in plain PyTorch: the baseline of our times.

Eager, float32, NCHW. Order and economy are the authors': prior samples are detached in the discriminator's step, the
reconstruction is not, and gradients of networks that are not stepped are cleared before their next use. Each step makes
its own reconstruction, and each kind of image has its own pass through the discriminator. Given the same seed, the
baseline draws the same noise as `TrainStep`; with the networks that grow, it computes the same.
"""

import math
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dcvae_fast.config import Config, ModelConfig
from dcvae_fast.models import autogan
from dcvae_fast.models.build import learning_rate_scales
from dcvae_fast.models.layers import ContrastHead
from dcvae_fast.training.schedule import ScheduleState, schedule_at
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.step import Networks

LOW = 16  # resolution of the feature map of the contrastive head `low`


# --- the networks that grow: functions of modules that only hold the parameters ---


def conv(layer: Any, x: Tensor, gain: float = math.sqrt(2)) -> Tensor:
    """Convolution with equalised learning rate: a weight of N(0, 1), scaled by gain / √fan-in in each call."""
    weight = layer.weight
    return F.conv2d(x, weight * (gain / math.sqrt(weight[0].numel())), layer.bias, padding=weight.shape[2] // 2)


def linear(layer: Any, x: Tensor, gain: float = math.sqrt(2)) -> Tensor:
    return F.linear(x, layer.weight * (gain / math.sqrt(layer.weight.shape[1])), layer.bias)


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def pixel_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-8)


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def minibatch_stddev(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, 1, H, W], in groups of 4 or of the largest smaller number that divides the batch."""
    batch, channels, height, width = x.shape
    size = next(n for n in (4, 3, 2, 1) if batch % n == 0)
    groups = x.reshape(-1, size, channels, height, width)
    deviation = torch.sqrt(groups.var(1, unbiased=False) + 1e-8).mean((1, 2, 3))
    return deviation.repeat_interleave(size).view(batch, 1, 1, 1).expand(batch, 1, height, width)


def generate(net: Any, z: Tensor, resolution: int, alpha: float) -> Tensor:
    """Latents [B, Z] → images [B, C, R, R]."""
    x = linear(net.linear, pixel_norm(z), gain=math.sqrt(2) / 4).view(len(z), -1, 4, 4)
    x = pixel_norm(act(x + net.linear_bias.view(1, -1, 1, 1)))
    x = previous = pixel_norm(act(conv(net.conv, x)))
    r = 8
    while r <= resolution:
        previous = x
        x = pixel_norm(act(conv(net.ups[str(r)], upsample(x))))
        x = pixel_norm(act(conv(net.convs[str(r)], x)))
        r *= 2
    images = conv(net.to_images[str(resolution)], x, gain=1)
    if alpha < 1:
        coarse = upsample(conv(net.to_images[str(resolution // 2)], previous, gain=1))
        images = alpha * images + (1 - alpha) * coarse
    return images


def features_of(
    net: Any, images: Tensor, resolution: int, alpha: float, stddev: bool | None = None
) -> dict[str, Tensor]:
    """Images [B, C, R, R] → features `low` [B, W, 16, 16] from 16×16 on, and `final` [B, W].

    Args:
        stddev: append the minibatch's standard deviation (True), zeros instead (False), or nothing
    """
    features = {}
    x = act(conv(net.from_images[str(resolution)], images))
    r = resolution
    while r > 4:
        if r == LOW:
            features["low"] = x
        x = act(conv(net.convs[str(r)], x))
        x = act(F.avg_pool2d(conv(net.downs[str(r)], x), 2))
        if r == resolution and alpha < 1:
            coarse = act(conv(net.from_images[str(r // 2)], F.avg_pool2d(images, 2)))
            x = alpha * x + (1 - alpha) * coarse
        r //= 2
    if stddev is not None:
        x = torch.cat([x, minibatch_stddev(x) if stddev else torch.zeros_like(x[:, :1])], dim=1)
    features["final"] = act(linear(net.linear, act(conv(net.conv, x)).flatten(1)))
    return features


# --- the networks at 32×32: our layers, which are plain, with PyTorch's spectral norm ---


def with_spectral_norm(network: nn.Module) -> nn.Module:
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrizations.spectral_norm(layer)
    return network


def small_networks(m: ModelConfig) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return encoder, decoder and discriminator at 32×32. The discriminator has no statistics of the minibatch."""
    encoder = with_spectral_norm(autogan.Trunk(m.image_channels, m.encoder_width, 2 * m.latent_dim))
    critic = with_spectral_norm(autogan.Critic(m.image_channels, m.discriminator_width, m.contrast_dim))
    widths = autogan.POSITIONS.items()
    heads = {name: ContrastHead(m.discriminator_width, n, m.contrast_dim) for name, n in widths}
    decoder = autogan.Decoder(m.latent_dim, m.decoder_width, m.image_channels)
    return nn.ModuleDict({"trunk": encoder}), decoder, nn.ModuleDict({"critic": critic, "heads": nn.ModuleDict(heads)})


def unfolded(ours: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of one of our networks, divided by the scale of the equalised learning rate."""
    scales = learning_rate_scales(ours)
    values = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    return {name: value.detach() / scales[value] if value in scales else value for name, value in values.items()}


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
        ValueError: the config has an objective other than dc_vae, the joint order, or another adversarial loss.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        loss = config.loss
        known = loss.adversarial in ("hinge", "wgan_gp", "logistic_r1")
        if loss.objective != "dc_vae" or loss.order != "sequential" or not known:
            raise ValueError(
                f"loss.objective is {loss.objective!r}, loss.order {loss.order!r} and loss.adversarial "
                f"{loss.adversarial!r}; the baseline does dc_vae, sequential, with hinge, wgan_gp or logistic_r1."
            )
        self.config, self.device = config, torch.device(device)
        self.grows, ours = config.model.grows, Networks(config)
        sources = ours.encoder, ours.decoder, ours.discriminator
        networks: Any = deepcopy(sources) if self.grows else small_networks(config.model)
        for network, source in zip(networks, sources, strict=True):
            network.load_state_dict(unfolded(source))
            network.to(self.device).train()
        self.encoder, self.decoder, self.discriminator = networks
        self.momentum = deepcopy(self.discriminator).requires_grad_(False)
        self.decoder_ema = deepcopy(self.decoder).requires_grad_(False)
        critic = self.discriminator.critic
        groups = {"encoder": self.encoder, "decoder": self.decoder, "trunk": critic.trunk, "score": critic.score}
        groups["heads"] = self.discriminator.heads
        self.groups = {name: list(group.parameters()) for name, group in groups.items()}
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device)
        self.images = self.iterations = 0
        self.grow(self.schedule)

    @property
    def schedule(self) -> ScheduleState:
        return schedule_at(self.config, self.images)

    def grow(self, to: ScheduleState) -> None:
        """Start with new Adam moments and a new queue."""
        self.resolution, self.alpha = to.resolution, to.alpha
        optim, contrast, seed = self.config.optim, self.config.contrast, self.config.train.seed
        self.adam = {
            name: torch.optim.Adam(group, to.lr, optim.betas, optim.eps) for name, group in self.groups.items()
        }
        low = not self.grows or to.resolution >= LOW
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
        self.resolution, self.alpha = now.resolution, now.alpha
        self.generator.manual_seed(derive_seed(config.train.seed, self.images))
        x = self._faded(images)
        noise = self._noise(len(x))
        losses = self._discriminator_step(x, noise)
        if self.iterations % config.train.n_critic == 0:
            losses |= self._autoencoder_step(x, noise)
            losses |= self._contrastive_step(x, ids)
            update_ema(self.decoder_ema, self.decoder, config.train.ema_decay)
        for ema, value in zip(self.decoder_ema.buffers(), self.decoder.buffers(), strict=True):
            ema.copy_(value)
        self.images += len(x)
        self.iterations += 1
        return losses

    def _discriminator_step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        loss, losses = self.config.loss, {}
        rec, _ = self._reconstruct(x, noise)
        fake = self._decode(self._noise(len(x))).detach()
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

    def _autoencoder_step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """With the noise of the discriminator's step, because ours reuses that step's reconstruction."""
        loss = self.config.loss
        rec, kl = self._reconstruct(x, noise)
        fake = self._decode(self._noise(self.config.train.sampled_batch or len(x)))
        adversarial = adversarial_loss(self._score(fake), self._score(rec), loss.adversarial)
        self._step(adversarial + loss.kl_weight * kl, "encoder", "decoder")
        return {"loss/adversarial": adversarial.detach()}

    def _contrastive_step(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        contrast = self.config.contrast
        rec, kl = self._reconstruct(x, self._noise(len(x)))
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
        losses = {"loss/contrast": info_nce.detach(), "loss/kl": kl.detach()}
        rank = (negatives.detach() > positive.detach()).sum(2)
        for i, layer in enumerate(self.layers):
            losses[f"contrast/top1_{layer}"] = (rank[i] < 1).float().mean()
            losses[f"contrast/top5_{layer}"] = (rank[i] < 5).float().mean()
        self._step(info_nce + self.config.loss.kl_weight * kl, "encoder", "decoder", "trunk", "heads")
        self._enqueue(keys, ids)
        return losses

    def _step(self, loss: Tensor, *groups: str) -> None:
        for name in groups:
            self.adam[name].zero_grad()
        loss.backward()
        for name in groups:
            self.adam[name].step()

    def _reconstruct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return G(z) of z from q(z|x), and KL: the sum over the latent, the mean over the batch."""
        if self.grows:
            features = features_of(self.encoder.trunk, x, self.resolution, self.alpha)["final"]
            posterior = linear(self.encoder.linear, features, gain=1)
        else:
            posterior = self.encoder.trunk(x)["final"]
        mean, logvar = posterior.chunk(2, dim=1)
        kl = -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1).mean()
        return self._decode(mean + torch.exp(0.5 * logvar) * noise), kl

    def _decode(self, z: Tensor) -> Tensor:
        return generate(self.decoder, z, self.resolution, self.alpha) if self.grows else self.decoder(z)

    def _discriminate(self, network: Any, images: Tensor, stddev: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return scores [B] and features by layer; without `stddev`, zeros are the statistics of the minibatch."""
        if not self.grows:
            return network.critic(images)
        features = features_of(network.critic.trunk, images, self.resolution, self.alpha, stddev)
        return linear(network.critic.score, features["final"], gain=1).squeeze(1), features

    def _score(self, images: Tensor) -> Tensor:
        return self._discriminate(self.discriminator, images, stddev=True)[0]

    def _embeddings(self, network: Any, images: Tensor) -> Tensor:
        """Return normalised queries or keys [S, B, D] of the contrasted layers."""
        _, features = self._discriminate(network, images, stddev=False)
        heads = network.heads
        embeddings = [heads[layer](features[layer]) if layer in heads else features[layer] for layer in self.layers]
        return F.normalize(torch.stack(embeddings), dim=2)

    def _enqueue(self, keys: Tensor, ids: Tensor) -> None:
        size, n = self.config.contrast.negatives, len(ids)
        slots = torch.arange(self.cursor, self.cursor + n, device=self.device) % size
        self.keys[:, slots], self.ids[slots] = keys, ids
        self.cursor, self.filled = (self.cursor + n) % size, min(self.filled + n, size)

    def _noise(self, n: int) -> Tensor:
        return torch.randn(n, self.config.model.latent_dim, device=self.device, generator=self.generator)

    def _faded(self, images: Tensor) -> Tensor:
        """Real images fade in with the networks."""
        if self.alpha == 1:
            return images
        return self.alpha * images + (1 - self.alpha) * upsample(F.avg_pool2d(images, 2))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    for average, value in zip(ema.parameters(), network.parameters(), strict=True):
        average.mul_(decay).add_(value, alpha=1 - decay)
