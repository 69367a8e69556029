"""Spectral normalisation (Miyato et al., 2018) of a whole network, with one update for each forward pass."""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcvae_kernels.dispatch import Impl, check_impl, obstacle_to_triton
from dcvae_kernels.reference import Layers, as_matrix, spectral_norm_update
from dcvae_kernels.spectral_norm_autograd import normalized_weights

M = TypeVar("M", bound=nn.Module)

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
OLDER_KEYS = {"weight_orig": "original", "weight_u": "0._u", "weight_v": "0._v"}


def spectral_norm(module: M, n_power_iterations: int = 1, eps: float = 1e-12, *, impl: Impl = "auto") -> M:
    """Divides the weight of every Conv2d, ConvTranspose2d and Linear in `module` by its largest singular value σ.

    σ = uᵀWv comes from a power iteration on the weight as a matrix [output channels, rest]: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖.
    Each forward pass of `module` begins with one update of all layers in training mode, and the layers use those
    weights throughout it. In evaluation mode, and for whoever reads a layer's weight outside such a pass, the weight is
    W/σ for the u and v there are. Frozen weights are iterated too. A weight of zeros stays zero. σ is computed in the
    weight's dtype, autocast or not.

    Each layer computes what `torch.nn.utils.parametrizations.spectral_norm` computes, and has the same `state_dict`
    keys; those of the older `torch.nn.utils.spectral_norm` are loaded too. Parameters remain the same objects, so
    optimizers made before this call stay right. Copies made by `deepcopy` update themselves.

    Args:
        module: changed in place. A layer reached by two names is normalised once.
        n_power_iterations: for each forward pass, at least 1.
        eps: the least norm to divide by in the power iteration, positive.
        impl: "triton" updates all layers by three kernels (two more for each further iteration; two for the gradient),
            on an NVIDIA GPU of compute capability 8.0 or newer; "torch" by PyTorch's operations; "auto" takes "triton"
            where it can. Weights of float64, of several dtypes or devices, or of unusual strides are always "torch"'s.

    Returns:
        module.

    Raises:
        TypeError: a weight that is not floating point.
        ValueError: no layer to normalise, a layer normalised already, a weight without elements, n_power_iterations
            below 1, eps not positive, or an impl that is none or cannot run where the weights are. `module` is
            unchanged then.
    """
    check_impl(impl)
    if n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be at least 1; it is {n_power_iterations}")
    if not eps > 0:
        raise ValueError(f"eps must be positive; it is {eps}")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no Conv2d, ConvTranspose2d or Linear to normalise")
    for name, layer in layers.items():
        _check(name or type(layer).__name__, layer)
        obstacle = obstacle_to_triton(layer.weight.device) if impl == "triton" else None
        if obstacle is not None:
            raise ValueError(f'impl="triton" cannot be used for layer {name!r}: {obstacle}; impl="torch" can')
    for layer in layers.values():
        dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        parametrize.register_parametrization(layer, "weight", _SpectralNorm(layer.weight, dim, eps))
    module._spectral_norm = _Group(module, list(layers.values()), n_power_iterations, eps, impl)  # type: ignore[assignment]
    return module


def remove_spectral_norm(module: M) -> M:
    """Undoes `spectral_norm(module)`, leaving every weight at the W/σ that evaluation mode uses.

    Raises:
        ValueError: `module` is not what `spectral_norm` was called with, nor a copy of it.
    """
    group = getattr(module, "_spectral_norm", None)
    if not isinstance(group, _Group):
        raise ValueError(f"this {type(module).__name__} was not given to spectral_norm")
    group.remove()
    del module._spectral_norm
    return module


def _check(name: str, layer: nn.Module) -> None:
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise ValueError(f"layer {name!r}: its weight is normalised or parametrized already")
    if not weight.is_floating_point():
        raise TypeError(f"layer {name!r}: its weight must be floating point; it is {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"layer {name!r}: its weight has no elements; it is {list(weight.shape)}")


class _SpectralNorm(nn.Module):
    """The parametrization of one weight. Its names make the `state_dict` keys those of torch's own."""

    _u: Tensor
    _v: Tensor

    @torch.no_grad()
    def __init__(self, weight: Tensor, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.normalized: Tensor | None = None  # the weight of the forward pass that is under way
        rows, columns = as_matrix(weight, dim).shape
        for name, size in (("_u", rows), ("_v", columns)):
            self.register_buffer(name, nn.functional.normalize(weight.new_empty(size).normal_(), dim=0, eps=eps))
        if not weight.is_meta:  # nothing to iterate, and models are often built on the meta device first
            spectral_norm_update(Layers([weight], [self._u], [self._v], [dim]), 15, eps)

    def forward(self, weight: Tensor) -> Tensor:
        if self.normalized is not None:
            return self.normalized
        return spectral_norm_update(Layers([weight], [self._u], [self._v], [self.dim]), 0, self.eps)[0]

    def right_inverse(self, value: Tensor) -> Tensor:
        """What `layer.weight = value` stores."""
        return value


class _Group:
    """The layers of one wrapped module and the hooks on it.

    The hooks are bound methods of an object, so that `deepcopy` of the module gives the copy a group of its own layers.
    """

    def __init__(
        self, module: nn.Module, layers: list[nn.Module], n_power_iterations: int, eps: float, impl: Impl
    ) -> None:
        self.layers = layers
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.impl: Impl = impl
        self.memo: dict[str, Any] = {}
        self.handles = [
            module.register_forward_pre_hook(self.update),
            module.register_forward_hook(self.clear, always_call=True),
            *(layer.register_load_state_dict_pre_hook(_rename_older_keys) for layer in layers),
        ]

    def update(self, *_: Any) -> None:
        weights = [cast(Any, layer).parametrizations.weight for layer in self.layers if layer.training]
        norms = [weight[0] for weight in weights]
        layers = Layers(
            weights=[weight.original for weight in weights],
            us=[norm._u for norm in norms],
            vs=[norm._v for norm in norms],
            dims=[norm.dim for norm in norms],
        )
        normalized = normalized_weights(layers, self.n_power_iterations, self.eps, self.impl, self.memo)
        for norm, weight in zip(norms, normalized, strict=True):
            norm.normalized = weight

    def clear(self, *_: Any) -> None:
        for layer in self.layers:
            cast(Any, layer).parametrizations.weight[0].normalized = None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            # A layer and its deepcopies share the class that holds the property `weight`, which torch deletes.
            cls = type(layer)
            layer.__class__ = cast(type[nn.Module], type(cls.__name__, cls.__bases__, dict(vars(cls))))
            parametrize.remove_parametrizations(layer, "weight")


def _rename_older_keys(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for older, newer in OLDER_KEYS.items():
        if prefix + older in state_dict:
            state_dict[f"{prefix}parametrizations.weight.{newer}"] = state_dict.pop(prefix + older)
