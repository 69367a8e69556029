"""What spectral norm's benchmark poses: the networks with their floors, their weights, and what is right."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvae_fast.models.autogan import Critic, Trunk
from harness import MODES, Unavailable

# Of each weight and each gradient, by Frobenius norm.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """A network's normalised layers, whose weights are float32.

    build: makes them, given a number of channels that all widths follow.
    """

    name: str
    build: Callable[[int], list[nn.Module]]
    width: int

    def layers(self) -> list[nn.Module]:
        return self.build(self.width)

    def shrunk(self) -> "Row":
        """For a CPU, which only rehearses."""
        return replace(self, width=self.width // 16)

    def description(self) -> dict[str, Any]:
        with torch.device("meta"):
            matrices = [weight.flatten(1) for weight in weights_of(self.layers())]
        elements = sum(matrix.numel() for matrix in matrices)
        # W is read for u and, as every row counts in v, once more; then W/σ is written. Backward, G is read for ⟨G, Ŵ⟩
        # together with Ŵ, and once more to write dW. The vectors are next to nothing.
        transfers = {"forward": 3, "forward_backward": 3 + 4}
        return {
            "name": self.name,
            "layers": len(matrices),
            "elements": elements,
            "largest": list(max(matrices, key=Tensor.numel).shape),
            "dtype": "float32",
            "floors": {mode: {"bytes": transfers[mode] * elements * torch.float32.itemsize} for mode in MODES},
        }


def dcvae(width: int) -> list[nn.Module]:
    """DC-VAE's encoder and discriminator for 32×32, updated together."""
    networks = nn.ModuleList([Trunk(3, width, out_features=2 * 128), Critic(3, width, contrast_dim=16)])
    return [layer for layer in networks.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def sngan(width: int) -> list[nn.Module]:
    """The residual discriminator for 128×128 of Miyato et al., without classes."""
    layers: list[nn.Module] = [conv(3, width, 3), conv(width, width, 3), conv(3, width, 1)]
    widths = [width * times for times in (1, 2, 4, 8, 16)]
    for before, after in itertools.pairwise(widths):
        layers += [conv(before, before, 3), conv(before, after, 3), conv(before, after, 1)]
    last = widths[-1]
    return [*layers, conv(last, last, 3), conv(last, last, 3), nn.Linear(last, 1)]


def stylegan2(width: int) -> list[nn.Module]:
    """StyleGAN2's residual discriminator for 256×256; `width` channels where there are most."""
    layers: list[nn.Module] = [conv(3, width // 4, 1)]
    widths = [width // 4, width // 2, *[width] * 5]
    for before, after in itertools.pairwise(widths):
        layers += [conv(before, before, 3), conv(before, after, 3), conv(before, after, 1)]
    # One channel more: the batch's standard deviation.
    return [*layers, conv(width + 1, width, 3), nn.Linear(width * 4 * 4, width), nn.Linear(width, 1)]


def conv(channels: int, out_channels: int, size: int) -> nn.Module:
    return nn.Conv2d(channels, out_channels, size, bias=False)


ROWS = (Row("dcvae", dcvae, 128), Row("sngan", sngan, 64), Row("stylegan2", stylegan2, 512))


def weights_of(layers: list[nn.Module]) -> list[Tensor]:
    return [layer.get_parameter("weight") for layer in layers]


@dataclass(frozen=True)
class Problem:
    """Layers yet to be normalised, and the gradients that arrive at their normalised weights."""

    layers: list[nn.Module]
    gradients: list[Tensor]


def make_problem(row: Row, device: torch.device) -> Problem:
    torch.manual_seed(0)
    with device:
        layers = row.layers()
    return Problem(layers, [torch.randn_like(weight) for weight in weights_of(layers)])


def reference(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], gradients: list[Tensor], updates: int, u_first: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """After some updates from these u and v: W/σ and the gradients in W, in float64.

    Args:
        u_first: an update finds u from v, then v from that u; else v from u first.
    """
    normalized, found = [], []
    for weight, u, v, gradient in zip(weights, us, vs, gradients, strict=True):
        matrix, u, v, arrived = (
            weight.detach().flatten(1).double(),
            u.double(),
            v.double(),
            gradient.flatten(1).double(),
        )
        for _ in range(updates):
            if u_first:
                u = F.normalize(matrix @ v, dim=0)
            v = F.normalize(matrix.mT @ u, dim=0)
            if not u_first:
                u = F.normalize(matrix @ v, dim=0)
        sigma = u @ matrix @ v
        normalized.append((matrix / sigma).view_as(weight))
        along = (arrived * matrix).sum() / sigma
        found.append(((arrived - along * torch.outer(u, v)) / sigma).view_as(weight))
    return normalized, found


def errors(outputs: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> dict[str, float]:
    """How far W/σ, and its gradients unless there are none, are from the reference: the worst layer.

    Raises:
        Unavailable: further than rounding explains, or not of the right shape.
    """
    found = {}
    for what, some, exact in zip(("weight", "gradient"), outputs, expected, strict=True):
        if what == "gradient" and not some:
            continue
        if [x.shape for x in some] != [y.shape for y in exact]:
            raise Unavailable(f"its {what}s are not of the layers' shapes")
        relative = [((x.detach().double() - y).norm() / y.norm()) for x, y in zip(some, exact, strict=True)]
        worst = torch.stack(relative).max().item()  # NaN if one is
        if not worst <= TOLERANCE:
            raise Unavailable(f"its {what}s are wrong by {worst:.3%}")
        found[f"{what}_error"] = float(f"{worst:.3g}")
    return found
