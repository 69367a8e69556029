"""Who normalises weights. Each function takes layers, changes them, and returns the network whose call updates them.

The network computes nothing but its layers' normalised weights, so that the update is all there is to time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as older_spectral_norm

from dcvae_kernels import spectral_norm
from harness import Unavailable


class Network(nn.Module):
    """What the layers are called after normalising them, and in which order an update finds u and v."""

    u_first = True
    names = ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v")

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # type: ignore[misc]

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """W, u and v of each layer: the tensors themselves."""
        weight, u, v = self.names
        layers = list(self.layers)
        return (
            [layer.get_parameter(weight) for layer in layers],
            [layer.get_buffer(u) for layer in layers],
            [layer.get_buffer(v) for layer in layers],
        )


class OlderNetwork(Network):
    """Of the older hook: a layer's weight is set before its forward pass."""

    u_first = False
    names = ("weight_orig", "weight_u", "weight_v")

    def forward(self) -> list[Tensor]:
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        return super().forward()


def ours(layers: list[nn.Module]) -> Network:
    return spectral_norm(Network(layers))


def eager(layers: list[nn.Module]) -> Network:
    return Network([parametrizations.spectral_norm(layer) for layer in layers])


def older(layers: list[nn.Module]) -> Network:
    return OlderNetwork([older_spectral_norm(layer) for layer in layers])


def compiled(peer: Callable[[list[nn.Module]], Network]) -> Callable[[list[nn.Module]], Network]:
    def compile_(layers: list[nn.Module]) -> Network:
        if not layers[0].get_parameter("weight").is_cuda:
            raise Unavailable("left out on a CPU, where compiling needs a C++ compiler and most of the time")
        torch.compiler.reset()  # what was compiled for another row is of no use
        network: Any = peer(layers)
        network.compile(dynamic=False)
        return network

    return compile_


# Those that are compiled last: that takes longer than all else, and what there is no time for is left out.
PEERS: dict[str, Callable[[list[nn.Module]], Network]] = {
    "ours": ours,
    "eager": eager,
    "older hook": older,
    "torch.compile": compiled(eager),
    "older compiled": compiled(older),
}
