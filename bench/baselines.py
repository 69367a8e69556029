"""One training iteration as the paper and the authors' code have it, in plain PyTorch: what ours is timed against.

Eager, float32, NCHW. The order and the economy are the authors': prior samples are detached in the discriminator's
step, the reconstruction is not, and what flows into networks that are not stepped is cleared before it could be used.
Each step makes its own reconstruction, and each kind of image its own pass through the discriminator. Given the same
seed it draws the same noise as `TrainStep`, and with the networks that grow it computes the same.
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

LOW = 16  # of the feature map that the contrastive head `low` sees


# --- the networks that grow ---


class EqualConv2d(nn.Module):
    """Equalised learning rate at run time: a weight of N(0, 1), scaled by gain / √fan-in each time."""

    def __init__(self, in_channels: int, out_channels: int, size: int, gain: float = math.sqrt(2)):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale, self.padding = gain / math.sqrt(in_channels * size**2), size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class EqualLinear(nn.Module):
    """The same of a linear layer."""

    def __init__(self, in_features: int, out_features: int, gain: float = math.sqrt(2), bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.scale = gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def pixel_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-8)


def minibatch_stddev(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, 1, H, W], in groups of 4 or of what smaller number divides the batch."""
    batch, channels, height, width = x.shape
    size = next(n for n in (4, 3, 2, 1) if batch % n == 0)
    groups = x.reshape(-1, size, channels, height, width)
    deviation = torch.sqrt(groups.var(1, unbiased=False) + 1e-8).mean((1, 2, 3))
    return deviation.repeat_interleave(size).view(batch, 1, 1, 1).expand(batch, 1, height, width)


def widths(m: ModelConfig) -> dict[int, int]:
    """Channels by resolution, from 4 up."""
    resolutions = [2**i for i in range(2, m.resolution.bit_length())]
    return {r: min(m.base_channels // r, m.max_channels) for r in resolutions}


class Generator(nn.Module):
    """G: latents [B, Z] → images [B, C, R, R]."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.width = widths(m)
        bottom = self.width[4]
        self.linear = EqualLinear(m.latent_dim, bottom * 16, gain=math.sqrt(2) / 4, bias=False)
        self.linear_bias = nn.Parameter(torch.zeros(bottom))
        self.conv = EqualConv2d(bottom, bottom, 3)
        self.ups, self.convs, self.to_images = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for r, width in self.width.items():
            if r > 4:
                self.ups[str(r)] = EqualConv2d(self.width[r // 2], width, 3)
                self.convs[str(r)] = EqualConv2d(width, width, 3)
            self.to_images[str(r)] = EqualConv2d(width, m.image_channels, 1, gain=1)

    def forward(self, z: Tensor, resolution: int, alpha: float) -> Tensor:
        x = self.linear(pixel_norm(z)).view(len(z), -1, 4, 4) + self.linear_bias.view(1, -1, 1, 1)
        x = pixel_norm(act(x))
        x = previous = pixel_norm(act(self.conv(x)))
        r = 8
        while r <= resolution:
            previous = x
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = pixel_norm(act(self.ups[str(r)](x)))
            x = pixel_norm(act(self.convs[str(r)](x)))
            r *= 2
        images = self.to_images[str(resolution)](x)
        if alpha < 1:
            coarse = F.interpolate(self.to_images[str(resolution // 2)](previous), scale_factor=2, mode="nearest")
            images = alpha * images + (1 - alpha) * coarse
        return images


class Trunk(nn.Module):
    """Images [B, C, R, R] → features `low` [B, W, 16, 16] from 16×16 on, and `final` [B, W]."""

    def __init__(self, m: ModelConfig, stddev: bool):
        super().__init__()
        self.has_stddev = stddev
        width = widths(m)
        self.from_images, self.convs, self.downs = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for r in width:
            self.from_images[str(r)] = EqualConv2d(m.image_channels, width[r], 1)
            if r > 4:
                self.convs[str(r)] = EqualConv2d(width[r], width[r], 3)
                self.downs[str(r)] = EqualConv2d(width[r], width[r // 2], 3)
        self.conv = EqualConv2d(width[4] + stddev, width[4], 3)
        self.linear = EqualLinear(width[4] * 16, width[4])

    def forward(self, images: Tensor, resolution: int, alpha: float, stddev: bool = True) -> dict[str, Tensor]:
        features = {}
        x = act(self.from_images[str(resolution)](images))
        r = resolution
        while r > 4:
            if r == LOW:
                features["low"] = x
            x = act(self.convs[str(r)](x))
            x = act(F.avg_pool2d(self.downs[str(r)](x), 2))
            if r == resolution and alpha < 1:
                coarse = act(self.from_images[str(r // 2)](F.avg_pool2d(images, 2)))
                x = alpha * x + (1 - alpha) * coarse
            r //= 2
        if self.has_stddev:
            x = torch.cat([x, minibatch_stddev(x) if stddev else torch.zeros_like(x[:, :1])], dim=1)
        features["final"] = act(self.linear(act(self.conv(x)).flatten(1)))
        return features


class Encoder(nn.Module):
    """E: images → mean and log-variance, each [B, Z]."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.trunk = Trunk(m, stddev=False)
        self.linear = EqualLinear(widths(m)[4], 2 * m.latent_dim, gain=1)

    def forward(self, images: Tensor, resolution: int, alpha: float) -> tuple[Tensor, ...]:
        return self.linear(self.trunk(images, resolution, alpha)["final"]).chunk(2, dim=1)


class Discriminator(nn.Module):
    """C: images → scores [B] and features; `stddev=False` puts zeros for the statistics of the minibatch."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        width = widths(m)
        self.critic = nn.ModuleDict({"trunk": Trunk(m, stddev=True), "score": EqualLinear(width[4], 1, gain=1)})
        self.heads = nn.ModuleDict({"final": nn.Linear(width[4], m.contrast_dim, bias=False)})
        if m.resolution >= LOW:
            self.heads["low"] = ContrastHead(width[LOW], LOW**2, m.contrast_dim)

    def forward(
        self, images: Tensor, resolution: int, alpha: float, stddev: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.critic["trunk"](images, resolution, alpha, stddev)
        return self.critic["score"](features["final"]).squeeze(1), features

    def embed(self, features: dict[str, Tensor], layer: str) -> Tensor:
        return self.heads[layer](features[layer])


# --- the networks at 32×32: the layers of ours, which are plain, with PyTorch's spectral norm ---


def with_spectral_norm(network: Any) -> Any:
    """Each layer iterates whenever it is called, by itself."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrizations.spectral_norm(layer)
    return network


class SmallEncoder(nn.Module):
    """E at 32×32."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.trunk = with_spectral_norm(autogan.Trunk(m.image_channels, m.encoder_width, 2 * m.latent_dim))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.trunk(images)["final"].chunk(2, dim=1)


class SmallDiscriminator(nn.Module):
    """C at 32×32; it has no statistics of the minibatch."""

    def __init__(self, m: ModelConfig):
        super().__init__()
        width = m.discriminator_width
        self.critic = with_spectral_norm(autogan.Critic(m.image_channels, width, m.contrast_dim))
        self.heads = nn.ModuleDict({b: ContrastHead(width, n, m.contrast_dim) for b, n in autogan.POSITIONS.items()})

    def forward(self, images: Tensor, stddev: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        score, features = self.critic(images)
        return score, features

    def embed(self, features: dict[str, Tensor], layer: str) -> Tensor:
        return features["final"] if layer == "final" else self.heads[layer](features[layer])


def unfolded(ours: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of one of our networks as they are here: without the equalised learning rate's scale."""
    scales = learning_rate_scales(ours)
    values = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    return {name: value.detach() / scales[value] if value in scales else value for name, value in values.items()}


# --- losses ---


def discriminator_loss(real: Tensor, fake: Tensor, rec: Tensor, kind: str, drift: float) -> Tensor:
    match kind:
        case "hinge":
            return F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean() + 0.5 * F.relu(1 + rec).mean()
        case "wgan_gp":
            return -real.mean() + 0.5 * fake.mean() + 0.5 * rec.mean() + drift * real.pow(2).mean()
        case "logistic_r1":
            return F.softplus(-real).mean() + 0.5 * F.softplus(fake).mean() + 0.5 * F.softplus(rec).mean()
    raise ValueError(f"loss.adversarial is {kind!r}; there is a baseline for hinge, wgan_gp and logistic_r1.")


def adversarial_loss(fake: Tensor, rec: Tensor, kind: str) -> Tensor:
    if kind == "logistic_r1":
        return 0.5 * F.softplus(-fake).mean() + 0.5 * F.softplus(-rec).mean()
    return -0.5 * fake.mean() - 0.5 * rec.mean()


def gradient_in(images: Tensor, scores: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.flatten(1)


# --- the iteration ---


class Baseline:
    """Trains on a batch at each call of `iterate`, from the initial weights that `TrainStep` has of the same config.

    As with `TrainStep`, `grow` and `refill` come first where `point` has another resolution.

    Raises:
        ValueError: an objective other than dc_vae, or the joint order.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        if config.loss.objective != "dc_vae" or config.loss.order != "sequential":
            raise ValueError(
                f"loss.objective is {config.loss.objective!r} and loss.order {config.loss.order!r}; "
                "the baseline does dc_vae, sequential."
            )
        self.config, self.device = config, torch.device(device)
        m, ours = config.model, Networks(config)
        if m.grows:
            networks = Encoder(m), Generator(m), Discriminator(m)
        else:
            decoder = autogan.Decoder(m.latent_dim, m.decoder_width, m.image_channels)
            networks = SmallEncoder(m), decoder, SmallDiscriminator(m)
        for network, source in zip(networks, (ours.encoder, ours.decoder, ours.discriminator), strict=True):
            network.load_state_dict(unfolded(source))
            network.to(self.device).train()
        self.encoder, self.decoder, self.discriminator = networks
        self.momentum = deepcopy(self.discriminator).requires_grad_(False)
        self.average = deepcopy(self.decoder).requires_grad_(False)
        critic: Any = self.discriminator.critic
        self.groups = {
            "encoder": [*self.encoder.parameters()],
            "decoder": [*self.decoder.parameters()],
            "trunk": [*(critic["trunk"] if m.grows else critic.trunk).parameters()],
            "score": [*(critic["score"] if m.grows else critic.score).parameters()],
            "heads": [*self.discriminator.heads.parameters()],
        }
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device)
        self.images = self.iterations = 0
        self.grow(self.schedule)

    @property
    def schedule(self) -> ScheduleState:
        return schedule_at(self.config, self.images)

    def grow(self, to: ScheduleState) -> None:
        """Adam without moments, and a queue that starts anew."""
        self._set_phase(to)
        optim, contrast, seed = self.config.optim, self.config.contrast, self.config.train.seed
        self.adam = {
            name: torch.optim.Adam(group, to.lr, optim.betas, optim.eps) for name, group in self.groups.items()
        }
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
        """Put the keys of fresh images into the queue."""
        self._enqueue(self._embeddings(self.momentum, self._faded(images)), ids)

    def iterate(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Train on images [B, C, R, R] of the present resolution, with their ids [B]; returns losses on the device."""
        config = self.config
        self._set_phase(self.schedule)
        self.generator.manual_seed(derive_seed(config.train.seed, self.images))
        x = self._faded(images)
        noise = self._noise(len(x))
        losses = self._discriminator_step(x, noise)
        if self.iterations % config.train.n_critic == 0:
            losses |= self._autoencoder_step(x, noise)
            losses |= self._contrastive_step(x, ids)
            update_ema(self.average, self.decoder, config.train.ema_decay)
        for mine, live in zip(self.average.buffers(), self.decoder.buffers(), strict=True):
            mine.copy_(live)
        self.images += len(x)
        self.iterations += 1
        return losses

    def _discriminator_step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        loss, losses = self.config.loss, {}
        rec, _ = self._reconstruct(x, noise)
        fake = self.decoder(self._noise(len(x)), *self.phase).detach()
        penalises_real = loss.adversarial == "logistic_r1" and self.iterations % loss.penalty_every == 0
        real = x.detach().requires_grad_(penalises_real)
        real_score, fake_score, rec_score = self._score(real), self._score(fake), self._score(rec)
        total = discriminator_loss(real_score, fake_score, rec_score, loss.adversarial, loss.drift)
        losses["loss/discriminator"] = total.detach()
        if loss.adversarial == "wgan_gp":
            # One coin for each image says whether the other end is its sample or its reconstruction.
            coin, place = torch.rand(2, len(x), 1, 1, 1, device=self.device, generator=self.generator)
            end = torch.where(coin < 0.5, fake, rec.detach())
            between = (x + place * (end - x)).requires_grad_()
            penalty = (gradient_in(between, self._score(between)).norm(2, dim=1) - 1).pow(2).mean()
            losses["loss/penalty"] = penalty.detach()
            total = total + loss.penalty * penalty
        elif penalises_real:
            penalty = 0.5 * gradient_in(real, real_score).pow(2).sum(1).mean()
            losses["loss/penalty"] = penalty.detach()
            total = total + loss.penalty_every * loss.penalty * penalty
        self._step(total, "trunk", "score")
        return losses

    def _autoencoder_step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """With the noise of the discriminator's step, for ours has the reconstruction from there."""
        loss = self.config.loss
        rec, kl = self._reconstruct(x, noise)
        fake = self.decoder(self._noise(self.config.train.sampled_batch or len(x)), *self.phase)
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
        """G(z) of z from q(z|x), and KL: the sum over the latent, the mean over the batch."""
        mean, logvar = self.encoder(x, *self.phase)
        kl = -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1).mean()
        return self.decoder(mean + torch.exp(0.5 * logvar) * noise, *self.phase), kl

    def _score(self, images: Tensor) -> Tensor:
        return self.discriminator(images, *self.phase)[0]

    def _embeddings(self, discriminator: Any, images: Tensor) -> Tensor:
        """Normalised queries or keys [S, B, D] of the contrasted layers."""
        _, features = discriminator(images, *self.phase, stddev=False)
        return F.normalize(torch.stack([discriminator.embed(features, layer) for layer in self.layers]), dim=2)

    def _enqueue(self, keys: Tensor, ids: Tensor) -> None:
        size, n = self.config.contrast.negatives, len(ids)
        slots = torch.arange(self.cursor, self.cursor + n, device=self.device) % size
        self.keys[:, slots], self.ids[slots] = keys, ids
        self.cursor, self.filled = (self.cursor + n) % size, min(self.filled + n, size)

    def _noise(self, n: int) -> Tensor:
        return torch.randn(n, self.config.model.latent_dim, device=self.device, generator=self.generator)

    def _set_phase(self, to: ScheduleState) -> None:
        self.resolution, self.alpha = to.resolution, to.alpha
        # What the networks that grow take besides their input; those at 32×32 take nothing.
        self.phase = (to.resolution, to.alpha) if self.config.model.grows else ()

    def _faded(self, images: Tensor) -> Tensor:
        """Real images fade in as the networks do."""
        if self.alpha == 1:
            return images
        coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
        return self.alpha * images + (1 - self.alpha) * coarse


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    for mine, live in zip(average.parameters(), network.parameters(), strict=True):
        mine.mul_(decay).add_(live, alpha=1 - decay)
