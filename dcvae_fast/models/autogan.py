"""The networks for 32×32 (Figure 15 of the paper), based on AutoGAN.

Shapes: B batch, C image channels, W width, Z latent dimension, D contrastive dimension.
Images are [B, C, 32, 32] in [-1, 1].
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvae_fast.models.layers import BatchNorm2d, ContrastHead, Critique, init_weights, upsample
from dcvae_kernels import spectral_norm

BOTTOM = 4  # height and width of the decoder's first feature map

# Number of positions of the feature map after each residual block.
POSITIONS = {"b1": 16 * 16, "b2": 8 * 8, "b3": 8 * 8, "b4": 8 * 8}
LAYERS = (*POSITIONS, "final")


class Cell(nn.Module):
    """AutoGAN cell: doubles the resolution, and adds skip connections from the first convolutions of earlier cells."""

    def __init__(self, width: int, mode: str, skips: int, shortcut: bool):
        super().__init__()
        self.mode = mode
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1) if shortcut else None
        self.skips = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(skips))

    def forward(self, x: Tensor, earlier: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the output and the skip features for later cells, each [B, W, 2H, 2H].

        Args:
            x: [B, W, H, H].
            earlier: skip features of the earlier cells, in order.
        """
        size = 2 * x.shape[-1]
        h = self.conv1(upsample(F.relu(x), size, self.mode))
        for conv, feature in zip(self.skips, earlier, strict=True):
            h = h + conv(upsample(feature, size, self.mode))
        out = self.conv2(F.relu(h))
        if self.shortcut is not None:
            out = out + self.shortcut(upsample(x, size, self.mode))
        return out, h


class Decoder(nn.Module):
    """Decoder G: latents [B, Z] → images [B, C, 32, 32]."""

    def __init__(self, latent_dim: int = 128, width: int = 256, image_channels: int = 3):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(latent_dim, BOTTOM * BOTTOM * width)
        self.cell1 = Cell(width, "nearest", skips=0, shortcut=True)
        self.cell2 = Cell(width, "bilinear", skips=1, shortcut=True)
        self.cell3 = Cell(width, "nearest", skips=2, shortcut=False)
        self.norm = BatchNorm2d(width)
        self.to_image = nn.Conv2d(width, image_channels, 3, padding=1)
        init_weights(self)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.linear(latents).view(-1, self.width, BOTTOM, BOTTOM)
        h, skip1 = self.cell1(h, [])
        h, skip2 = self.cell2(h, [skip1])
        h, _ = self.cell3(h, [skip1, skip2])
        return torch.tanh(self.to_image(F.relu(self.norm(h))))


class FirstBlock(nn.Module):
    """First residual block, on the image: no activation at the input; halves the resolution."""

    def __init__(self, image_channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(image_channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x)))
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


class Block(nn.Module):
    """Pre-activation residual block; with `down` it halves the resolution and has a learned shortcut."""

    def __init__(self, width: int, down: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1) if down else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        if self.shortcut is None:
            return x + h
        return F.avg_pool2d(self.shortcut(x), 2) + F.avg_pool2d(h, 2)


class Trunk(nn.Module):
    """Architecture of encoder and discriminator: four residual blocks, a sum over positions, a linear layer."""

    def __init__(self, image_channels: int, width: int, out_features: int):
        super().__init__()
        self.b1 = FirstBlock(image_channels, width)
        self.b2 = Block(width, down=True)
        self.b3 = Block(width, down=False)
        self.b4 = Block(width, down=False)
        self.linear = nn.Linear(width, out_features, bias=False)
        init_weights(self)

    def forward(self, images: Tensor, layers: Sequence[str] = LAYERS) -> dict[str, Tensor]:
        """Return the features of the given layers; later layers are not computed.

        Feature maps are `b1` [B, W, 16, 16] and `b2` to `b4` [B, W, 8, 8]; `final` is [B, out_features].
        """
        features, h = {}, images
        for name in LAYERS[: 1 + max(map(LAYERS.index, layers))]:
            h = self.linear(F.relu(h).sum((2, 3))) if name == "final" else self.get_submodule(name)(h)
            features[name] = h
        return {name: features[name] for name in layers}


class Encoder(nn.Module):
    """Encoder E: images → mean and log-variance of the posterior q(z|x), each [B, Z]."""

    def __init__(self, latent_dim: int = 128, width: int = 128, image_channels: int = 3):
        super().__init__()
        self.trunk = spectral_norm(Trunk(image_channels, width, 2 * latent_dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.trunk(images, ("final",))["final"].chunk(2, dim=1)
        return mean, logvar


class Critic(nn.Module):
    """Spectrally normalised part of the discriminator: trunk and score head, normalised as one group."""

    def __init__(self, image_channels: int, width: int, contrast_dim: int):
        super().__init__()
        self.trunk = Trunk(image_channels, width, contrast_dim)
        self.score = nn.Linear(contrast_dim, 1)

    def forward(self, images: Tensor, layers: tuple[str, ...] = LAYERS, scored: bool = True) -> Critique:
        features = self.trunk(images, (*layers, "final") if scored else layers)
        score = self.score(features["final"]).squeeze(1) if scored else images.new_empty(0)
        return Critique(score, {name: features[name] for name in layers})


class Discriminator(nn.Module):
    """Discriminator C, the "dual encoder": a real/fake score, and embeddings for contrast at several depths.

    `critic.trunk`, `critic.score` and `heads` are trained in different steps; only `critic` is spectrally normalised.
    """

    def __init__(self, width: int = 128, image_channels: int = 3, contrast_dim: int = 16):
        super().__init__()
        self.critic = spectral_norm(Critic(image_channels, width, contrast_dim))
        self.heads = nn.ModuleDict({b: ContrastHead(width, n, contrast_dim) for b, n in POSITIONS.items()})

    def forward(
        self, images: Tensor, stddev_parts: int = 1, layers: tuple[str, ...] = LAYERS, scored: bool = True
    ) -> Critique:
        """
        Args:
            images: [B, C, 32, 32].
            stddev_parts: ignored; only progressive networks use minibatch statistics.
            layers: layers whose features are returned.
            scored: whether to compute the score.
        """
        return self.critic(images, layers, scored)

    def embed(self, critique: Critique, layers: Sequence[str]) -> Tensor:
        """Return queries or keys [S, B, D] of S layers: block features through their heads, `final` unchanged."""
        f = critique.features
        return torch.stack([f["final"] if name == "final" else self.heads[name](f[name]) for name in layers])


def init_normalized_layers(network: nn.Module) -> None:
    """Initialise the layers with spectral norm as the authors' code does in effect.

    The authors move the networks to the GPU first. Xavier's initialisation then reaches only a copy of a convolution's
    weight, which keeps torch's default.
    """
    for name, weight in network.named_parameters():
        if name.endswith("parametrizations.weight.original") and weight.ndim == 4:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    init_vectors(network)


@torch.no_grad()
def init_vectors(network: nn.Module) -> None:
    """Set u and v of spectral norm, which must be the only buffers, to random unit vectors, without power iterations.

    torch's older spectral norm, which the authors use, starts like this.
    """
    for vector in network.buffers():
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
