"""Spectral norm of whole networks: ours compared with torch's own implementations.

eager is `torch.nn.utils.parametrizations.spectral_norm`, the older hook `torch.nn.utils.spectral_norm`; all are also
compiled, eager as torch.compile. A call updates u and v and computes all weights W/σ, in training mode. Forward runs
without autograd; forward_backward computes the gradients in the weights from fixed gradients in W/σ. The outputs of
every implementation are first compared with the same update in float64.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as older_spectral_norm

import harness
from dcvae_fast.models.autogan import Critic, Trunk
from dcvae_kernels import spectral_norm
from harness import MODES, Check, Outputs, make_call, relative_errors
from results import Document, Target

TOLERANCE = 1e-4  # of each weight and each gradient, by Frobenius norm

# --- problems ---


@dataclass(frozen=True)
class Row:
    """Normalised layers of a network, with float32 weights.

    Attributes:
        build: makes the layers, given a number of channels to which all widths are proportional
    """

    name: str
    build: Callable[[int], list[nn.Module]]
    width: int
    targets: tuple[Target, ...] = ()

    def layers(self) -> list[nn.Module]:
        return self.build(self.width)

    def shrunk(self) -> "Row":
        return replace(self, width=self.width // 16)

    def description(self) -> Document:
        with torch.device("meta"):
            matrices = [weight.flatten(1) for weight in weights_of(self.layers())]
        elements = sum(matrix.numel() for matrix in matrices)
        # W is read for u and, because every row counts in v, again; then W/σ is written. Backward, G and Ŵ are read
        # for ⟨G, Ŵ⟩, then G again, and dW is written. The vectors are negligible.
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
    widths = [width * times for times in (1, 2, 4, 8, 16)]
    last = widths[-1]
    stem = [conv(3, width, 3), conv(width, width, 3), conv(3, width, 1)]
    return [*stem, *blocks(widths), conv(last, last, 3), conv(last, last, 3), nn.Linear(last, 1)]


def stylegan2(width: int) -> list[nn.Module]:
    """StyleGAN2's residual discriminator for 256×256, at most `width` channels wide."""
    layers = [conv(3, width // 4, 1), *blocks([width // 4, width // 2, *[width] * 5])]
    # The last convolution has one more input channel: the standard deviation of the minibatch.
    return [*layers, conv(width + 1, width, 3), nn.Linear(width * 4 * 4, width), nn.Linear(width, 1)]


def blocks(widths: list[int]) -> list[nn.Module]:
    pairs = itertools.pairwise(widths)
    return [layer for a, b in pairs for layer in (conv(a, a, 3), conv(a, b, 3), conv(a, b, 1))]


def conv(channels: int, out_channels: int, size: int) -> nn.Module:
    return nn.Conv2d(channels, out_channels, size, bias=False)


TARGETS = (
    Target("times faster than eager, called from Python", 10),
    Target("times faster than torch.compile, called from Python", 3, against="torch.compile"),
    Target(
        "times faster than torch.compile, compiled too, replayed",
        1.3,
        against="torch.compile",
        timing="graph",
        ours="ours compiled",
    ),
    Target("share of the measured copy rate, forward, replayed", 0.5, "rate", "copy", "graph", "forward"),
)
ROWS = (Row("dcvae", dcvae, 128, TARGETS), Row("sngan", sngan, 64), Row("stylegan2", stylegan2, 512))


def weights_of(layers: list[nn.Module]) -> list[Tensor]:
    return [layer.get_parameter("weight") for layer in layers]


def make_problem(row: Row, device: torch.device) -> tuple[list[nn.Module], list[Tensor]]:
    """Return layers that are not normalised yet, and gradients in their normalised weights."""
    torch.manual_seed(0)
    with device:
        layers = row.layers()
    return layers, [torch.randn_like(weight) for weight in weights_of(layers)]


def reference(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], gradients: list[Tensor], u_first: bool
) -> Outputs:
    """Return W/σ and the gradients in W after an update of these u and v, in float64.

    Args:
        u_first: an update computes u from v, then v from the new u; otherwise v first.
    """
    normalized, weight_gradients = [], []
    for tensors in zip(weights, us, vs, gradients, strict=True):
        matrix, u, v, gradient = (x.detach().double() for x in tensors)
        shape, matrix, gradient = matrix.shape, matrix.flatten(1), gradient.flatten(1)
        if u_first:
            u = F.normalize(matrix @ v, dim=0)
        v = F.normalize(matrix.mT @ u, dim=0)
        if not u_first:
            u = F.normalize(matrix @ v, dim=0)
        sigma = u @ matrix @ v
        normalized.append((matrix / sigma).view(shape))
        along = (gradient * matrix).sum() / sigma
        weight_gradients.append(((gradient - along * torch.outer(u, v)) / sigma).view(shape))
    return normalized, weight_gradients


# --- implementations: each takes layers, normalises them, and returns the network whose call updates them ---


class Network(nn.Module):
    """Compute nothing but the layers' normalised weights, so that only the update is timed."""

    u_first = True
    names = ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v")

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # type: ignore[misc]

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return W, u and v of each layer, not copied."""
        weight, *vectors = self.names
        us, vs = ([layer.get_buffer(name) for layer in self.layers] for name in vectors)
        return [layer.get_parameter(weight) for layer in self.layers], us, vs


class OlderNetwork(Network):
    """Network with the older hook, which sets a layer's weight before the layer's forward pass."""

    u_first = False
    names = ("weight_orig", "weight_u", "weight_v")

    def forward(self) -> list[Tensor]:
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        return super().forward()


Peer = Callable[[list[nn.Module]], Network]


def ours(layers: list[nn.Module]) -> Network:
    return spectral_norm(Network(layers))


def eager(layers: list[nn.Module]) -> Network:
    return Network([parametrizations.spectral_norm(layer) for layer in layers])


def older(layers: list[nn.Module]) -> Network:
    return OlderNetwork([older_spectral_norm(layer) for layer in layers])


def compiled(peer: Peer, layers: list[nn.Module]) -> Network:
    harness.require_gpu("left out on a CPU, where compiling needs a C++ compiler and most of the time")
    torch.compiler.reset()  # forget other rows
    network: Any = peer(layers)
    network.compile(dynamic=False, fullgraph=peer is ours)
    return network


# The compiled ones come last: compiling takes longer than everything else.
PEERS: dict[str, Peer] = {
    "ours": ours,
    "eager": eager,
    "older hook": older,
    "ours compiled": functools.partial(compiled, ours),
    "torch.compile": functools.partial(compiled, eager),
    "older compiled": functools.partial(compiled, older),
}


# --- the benchmark ---

pytestmark = harness.timed(0.3, 0.01, 5)
BENCHMARK = harness.Benchmark("spectral_norm", ROWS, PEERS)


@harness.cases((row, peer, mode) for peer in PEERS for mode in reversed(MODES) for row in ROWS)
def test_spectral_norm(row: Row, peer: str, mode: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, measure)


def measure(cell: Document, benchmark: Any, row: Row, peer: str, mode: str) -> None:
    harness.free_memory()
    call, check = prepared(row, peer, mode)
    harness.measure_op(cell, benchmark, call, check)


def prepared(row: Row, peer: str, mode: str) -> tuple[Callable[[], Outputs], Check]:
    """Return the call that is timed, and the check of its outputs."""
    layers, gradients = make_problem(row, harness.DEVICE)
    network = PEERS[peer](layers)
    weights, us, vs = network.tensors()

    def check(run: Callable[[], Outputs]) -> Document:
        # After many updates, u and v hardly change; from random ones, a run without an update is wrong.
        for vector in (*us, *vs):
            vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
        expected = reference(weights, us, vs, gradients, network.u_first)
        return relative_errors("weight", run(), expected, (TOLERANCE, TOLERANCE))

    return make_call(mode, network, weights, gradients), check
