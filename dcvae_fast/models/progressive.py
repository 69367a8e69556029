"""Networks that grow from 4×4 to 1024×1024 pixels, after Progressive GAN; the paper uses them from 64×64 on.

All layers up to the final resolution exist from the start. `Phase` sets the current resolution and the fade of its
layers; layers of higher resolutions are not used and keep their initial values.

The variant `pggan` has the networks of Progressive GAN. The authors of DC-VAE credit a PyTorch port of it,
https://github.com/rosinality/progressive-gan-pytorch. The variant `port` has its networks, without labels:
- pixel norm before, not after, the leaky ReLU;
- layers from and to images, and the last linear layers, without equalised learning rate and with torch's
  initialisation; no activation after the layers from images;
- in each block of the trunk, the first convolution changes the number of channels, and average pooling follows the
  activation of the second;
- minibatch standard deviation of the images, not of features, over the whole batch.

Shapes: B batch, C image channels, Z latent dimension, D contrastive dimension, R resolution.
Images are [B, C, R, R]; real images are in [-1, 1].
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcvae_fast.config import Variant, Widths, group_size
from dcvae_fast.models.layers import ContrastHead, Critique, no_autocast, upcast

BOTTOM = 4  # lowest resolution
LOW = 16  # resolution of the input of the contrastive head `low`: fixed, so that the head is kept during growth
# Resolutions of the discriminator's feature maps, by name: for contrast, and for local patch contrast.
FEATURE_MAPS = {"low": LOW, "8x8": 8, "16x16": 16, "32x32": 32}
SLOPE = 0.2  # negative slope of the leaky ReLUs


class Phase(NamedTuple):
    """Point in the growth of the networks.

    Attributes:
        resolution: current resolution
        alpha: blending weight of this resolution's layers against those of half the resolution; a tensor of shape []
            can change without a new phase
    """

    resolution: int
    alpha: float | Tensor = 1.0

    @property
    def fades(self) -> bool:
        return self.resolution > BOTTOM and (isinstance(self.alpha, Tensor) or self.alpha < 1)


PAPER_WIDTHS = Widths()


def resolutions(last: int, first: int = BOTTOM) -> list[int]:
    """Return [first, 2·first, …, last]."""
    return [2**i for i in range(first.bit_length() - 1, last.bit_length())]


class EqualizedConv2d(nn.Conv2d):
    """Convolution with equalised learning rate, by scaling Adam's settings instead of the weight.

    Progressive GAN stores a weight from N(0, 1) and multiplies it by c = gain / √fan-in in every forward pass. This
    layer stores the product. Adam's steps are equivalent with lr · c and ε / c, where c is `scale`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, gain: float = math.sqrt(2)):
        self.scale = gain / math.sqrt(in_channels * kernel_size**2)
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class EqualizedLinear(nn.Linear):
    """Linear layer with equalised learning rate."""

    def __init__(self, in_features: int, out_features: int, gain: float = math.sqrt(2), bias: bool = True):
        self.scale = gain / math.sqrt(in_features)
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class OutputLinear(nn.Linear):
    """Last linear layer of a network: computed in at least float32, also under autocast, in the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        with no_autocast(input.device):
            return F.linear(upcast(input), upcast(self.weight), upcast(self.bias)).to(self.weight.dtype)


class EqualizedOutputLinear(EqualizedLinear, OutputLinear):
    """`OutputLinear` with equalised learning rate."""


class UpConv2d(EqualizedConv2d):
    """Nearest-neighbour upsampling by 2 fused with the convolution: [B, C, R, R] → [B, C', 2R, 2R].

    Taps of the 3×3 kernel that read the same input pixel are summed first.
    """

    def forward(self, input: Tensor) -> Tensor:
        w = F.pad(self.weight, (1, 1, 1, 1))
        w = w[..., 1:, 1:] + w[..., :-1, 1:] + w[..., 1:, :-1] + w[..., :-1, :-1]
        return F.conv_transpose2d(input, w.transpose(0, 1).flip(2, 3), self.bias, stride=2, padding=1)


class DownConv2d(EqualizedConv2d):
    """Convolution fused with 2×2 average pooling: [B, C, 2R, 2R] → [B, C', R, R]."""

    def forward(self, input: Tensor) -> Tensor:
        w = F.pad(self.weight, (1, 1, 1, 1)) / 4
        w = w[..., 1:, 1:] + w[..., :-1, 1:] + w[..., 1:, :-1] + w[..., :-1, :-1]
        return F.conv2d(input, w, self.bias, stride=2, padding=1)


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def blend(coarse: Tensor, fine: Tensor, alpha: float | Tensor) -> Tensor:
    """Return (1 − alpha) · coarse + alpha · fine."""
    return torch.lerp(coarse, fine, alpha.to(fine) if isinstance(alpha, Tensor) else alpha)


def pixel_norm(x: Tensor) -> Tensor:
    """Divide the channels (dim 1) of each position by their root mean square.

    Computed in at least float32, where squares do not overflow; the result has the dtype of `x`.
    """
    h = upcast(x)
    return (h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-8)).to(x.dtype)


def minibatch_stddev(x: Tensor, parts: int, group: int) -> Tensor:
    """Return the mean standard deviation of features over each group of images, [B, C, H, W] → [B, 1, 1, 1].

    The batch is cut into `parts`, and each part into groups of neighbours; see `group_size`. Computed in at least
    float32, because squares overflow in float16; the result has the dtype of `x`.
    """
    size = group_size(len(x) // parts, group)
    groups = upcast(x).unflatten(0, (-1, size))
    deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return deviation.repeat_interleave(size)[:, None, None, None].to(x.dtype)


def image_stddev(images: Tensor, parts: int) -> Tensor:
    """Return the mean standard deviation of pixels over each part of the batch, [B, C, R, R] → [B, 1, 1, 1]; `port`.

    The variance is the unbiased one. Computed in at least float32; the result has the dtype of `images`.
    """
    variance = upcast(images).unflatten(0, (parts, -1)).var(1)
    positive = variance > 0  # pixels that are equal in all images have deviation 0 and, unlike with √, gradient 0
    deviation = (torch.where(positive, variance, 1.0).sqrt() * positive).mean((1, 2, 3))
    return deviation.repeat_interleave(len(images) // parts)[:, None, None, None].to(images.dtype)


def image_conv(in_channels: int, out_channels: int, variant: Variant, gain: float = math.sqrt(2)) -> nn.Conv2d:
    """Return a 1×1 convolution from or to images."""
    if variant == "port":
        return nn.Conv2d(in_channels, out_channels, 1)
    return EqualizedConv2d(in_channels, out_channels, 1, gain)


def output_linear(in_features: int, out_features: int, variant: Variant) -> OutputLinear:
    """Return the last linear layer of a network."""
    if variant == "port":
        return OutputLinear(in_features, out_features)
    return EqualizedOutputLinear(in_features, out_features, gain=1)


class Generator(nn.Module):
    """Decoder G: latents [B, Z] → images [B, C, R, R]."""

    def __init__(
        self,
        resolution: int,
        latent_dim: int = 512,
        widths: Widths = PAPER_WIDTHS,
        image_channels: int = 3,
        variant: Variant = "pggan",
    ):
        super().__init__()
        self.phase, self.checkpoints_activations = Phase(resolution), False
        self.variant = variant
        self.bottom_width = widths.at(BOTTOM)
        # One bias per channel, as after a convolution.
        self.linear = EqualizedLinear(latent_dim, self.bottom_width * BOTTOM**2, gain=math.sqrt(2) / 4, bias=False)
        self.linear_bias = nn.Parameter(torch.zeros(self.bottom_width))
        self.conv = EqualizedConv2d(self.bottom_width, self.bottom_width, 3)
        self.ups, self.convs, self.to_images = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for r in resolutions(resolution):
            width = widths.at(r)
            if r > BOTTOM:
                self.ups[str(r)] = UpConv2d(widths.at(r // 2), width, 3)
                self.convs[str(r)] = EqualizedConv2d(width, width, 3)
            self.to_images[str(r)] = image_conv(width, image_channels, variant, gain=1)

    def forward(self, latents: Tensor) -> Tensor:
        resolution = self.phase.resolution
        x = self.linear(pixel_norm(latents)).unflatten(1, (self.bottom_width, BOTTOM, BOTTOM))
        x = self._activate(x + self.linear_bias[:, None, None])
        x = previous = self._activate(self.conv(x))
        for r in resolutions(resolution, first=2 * BOTTOM):
            previous = x
            x = checkpointed(self._block, x, r) if self.checkpoints_activations else self._block(x, r)
        images = self.to_images[str(resolution)](x)
        if self.phase.fades:
            coarse = self.to_images[str(resolution // 2)](previous)
            images = blend(F.interpolate(coarse, scale_factor=2.0), images, self.phase.alpha)
        return images

    def _block(self, x: Tensor, r: int) -> Tensor:
        x = self._activate(self.ups[str(r)](x))
        return self._activate(self.convs[str(r)](x))

    def _activate(self, x: Tensor) -> Tensor:
        return act(pixel_norm(x)) if self.variant == "port" else pixel_norm(act(x))


class Trunk(nn.Module):
    """Architecture of discriminator and encoder: images [B, C, R, R] → feature maps, and features of the last layer."""

    def __init__(
        self, resolution: int, widths: Widths, image_channels: int, variant: Variant, stddev_group: int | None = None
    ):
        """
        Args:
            stddev_group: group size of the minibatch standard deviation, see `minibatch_stddev`; None without it.
        """
        super().__init__()
        self.phase, self.checkpoints_activations = Phase(resolution), False
        self.variant, self.stddev_group = variant, stddev_group
        self.from_images, self.convs, self.downs = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for r in resolutions(resolution):
            width = widths.at(r)
            self.from_images[str(r)] = image_conv(image_channels, width, variant)
            if r > BOTTOM:
                coarse_width = widths.at(r // 2)
                if variant == "port":
                    self.convs[str(r)] = EqualizedConv2d(width, coarse_width, 3)
                    self.downs[str(r)] = EqualizedConv2d(coarse_width, coarse_width, 3)
                else:
                    self.convs[str(r)] = EqualizedConv2d(width, width, 3)
                    self.downs[str(r)] = DownConv2d(width, coarse_width, 3)
        width = widths.at(BOTTOM)
        self.conv = EqualizedConv2d(width + (stddev_group is not None), width, 3)
        self.linear = EqualizedLinear(width * BOTTOM**2, width)

    def forward(self, images: Tensor, stddev_parts: int = 1, layers: Sequence[str] = ("final",)) -> dict[str, Tensor]:
        """
        Args:
            images: [B, C, R, R].
            stddev_parts: number of parts of the batch for the minibatch standard deviation; 0 replaces it by zeros.
            layers: names in `FEATURE_MAPS`, from their resolution on, or `final`; later layers are not computed.

        Returns:
            Features by layer: feature maps [B, W, H, H], and `final` [B, W].
        """
        resolution = self.phase.resolution
        x = self._from_images(images, resolution)
        features = {}
        for r in reversed(resolutions(resolution)):
            features |= {name: x for name in layers if FEATURE_MAPS.get(name) == r}
            if len(features) == len(set(layers)):
                return features
            if r == BOTTOM:
                break
            x = checkpointed(self._block, x, r) if self.checkpoints_activations else self._block(x, r)
            if r == resolution and self.phase.fades:
                coarse = self._from_images(F.avg_pool2d(images, 2), r // 2)
                x = blend(coarse, x, self.phase.alpha)
        if self.stddev_group is not None:
            if not stddev_parts:
                stddev = x.new_zeros(())
            elif self.variant == "port":
                stddev = image_stddev(images, stddev_parts).to(x.dtype)
            else:
                stddev = minibatch_stddev(x, stddev_parts, self.stddev_group)
            x = torch.cat([x, stddev.expand(len(x), 1, *x.shape[2:])], dim=1)
        features["final"] = act(self.linear(act(self.conv(x)).flatten(1)))
        return features

    def _from_images(self, images: Tensor, r: int) -> Tensor:
        x = self.from_images[str(r)](images)
        return x if self.variant == "port" else act(x)

    def _block(self, x: Tensor, r: int) -> Tensor:
        x = act(self.downs[str(r)](act(self.convs[str(r)](x))))
        return F.avg_pool2d(x, 2) if self.variant == "port" else x  # pggan: in the convolution


class Encoder(nn.Module):
    """Encoder E: images [B, C, R, R] → mean and log-variance of the posterior q(z|x), each [B, Z]."""

    def __init__(
        self,
        resolution: int,
        latent_dim: int = 512,
        widths: Widths = PAPER_WIDTHS,
        image_channels: int = 3,
        variant: Variant = "pggan",
    ):
        super().__init__()
        self.trunk = Trunk(resolution, widths, image_channels, variant)
        self.linear = output_linear(widths.at(BOTTOM), 2 * latent_dim, variant)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.linear(self.trunk(images)["final"]).chunk(2, dim=1)
        return mean, logvar


class Critic(nn.Module):
    """Part of the discriminator that the adversarial loss trains: trunk and score head."""

    def __init__(self, resolution: int, widths: Widths, image_channels: int, variant: Variant, stddev_group: int):
        super().__init__()
        self.trunk = Trunk(resolution, widths, image_channels, variant, stddev_group)
        self.score = output_linear(widths.at(BOTTOM), 1, variant)

    def forward(self, images: Tensor, stddev_parts: int, layers: tuple[str, ...], scored: bool) -> Critique:
        features = self.trunk(images, stddev_parts, (*layers, "final") if scored else layers)
        score = self.score(features["final"]).squeeze(1) if scored else images.new_empty(0)
        return Critique(score, {name: features[name] for name in layers})


class Discriminator(nn.Module):
    """Discriminator C, the "dual encoder": a real/fake score, and embeddings for contrast at two depths.

    `critic.trunk`, `critic.score` and `heads` are trained in different steps.
    """

    def __init__(
        self,
        resolution: int,
        widths: Widths = PAPER_WIDTHS,
        image_channels: int = 3,
        contrast_dim: int = 16,
        variant: Variant = "pggan",
        stddev_group: int = 16,
    ):
        super().__init__()
        self.critic = Critic(resolution, widths, image_channels, variant, stddev_group)
        self.heads = nn.ModuleDict({"final": nn.Linear(widths.at(BOTTOM), contrast_dim, bias=False)})
        if resolution >= LOW:
            self.heads["low"] = ContrastHead(widths.at(LOW), LOW**2, contrast_dim)

    def forward(
        self, images: Tensor, stddev_parts: int = 1, layers: tuple[str, ...] | None = None, scored: bool = True
    ) -> Critique:
        """
        Args:
            images: [B, C, R, R].
            stddev_parts: number of parts of the batch for the minibatch standard deviation. 0 replaces it by zeros, for
                contrast: statistics of the batch would reveal which reconstruction belongs to which image.
            layers: layers whose features are returned: names in `FEATURE_MAPS`, from their resolution on, or `final`;
                None for `low`, if it exists, and `final`.
            scored: whether to compute the score.
        """
        if layers is None:
            layers = ("low", "final") if self.critic.trunk.phase.resolution >= LOW else ("final",)
        return self.critic(images, stddev_parts, layers, scored)

    def embed(self, critique: Critique, layers: Sequence[str]) -> Tensor:
        """Return queries or keys [S, B, D]: the features of S layers through their heads."""
        return torch.stack([self.heads[name](critique.features[name]) for name in layers])


def checkpointed(block: Callable[[Tensor, int], Tensor], x: Tensor, r: int) -> Tensor:
    """Run the block with activation checkpointing."""
    return checkpoint(block, x, r, use_reentrant=False, preserve_rng_state=False)


def checkpoint_activations(network: nn.Module) -> None:
    """Enable activation checkpointing in all blocks of a network."""
    for module in network.modules():
        if isinstance(module, Generator | Trunk):
            module.checkpoints_activations = True


def set_phase(network: nn.Module, phase: Phase) -> None:
    """Set the phase of all parts of a network."""
    for module in network.modules():
        if isinstance(module, Generator | Trunk):
            module.phase = phase
