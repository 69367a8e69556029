"""Spectral normalisation (Miyato et al., 2018) of a whole network, with one update per forward pass."""

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
    """Divide the weight of every Conv2d, ConvTranspose2d and Linear in `module` by its largest singular value σ.

    σ = uᵀWv comes from power iterations on the weight as a matrix [output channels, rest]: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖.
    Each forward pass of `module` starts with one update of all layers in training mode, and the layers use the same
    weights throughout that pass. In evaluation mode, and if a weight is read outside such a pass, the weight is W/σ for
    the current u and v. Frozen weights are iterated too. A zero weight stays zero. σ is computed in the dtype of the
    weight, also under autocast.

    Each layer is equivalent to `torch.nn.utils.parametrizations.spectral_norm` and has the same `state_dict` keys.
    Checkpoints of the older `torch.nn.utils.spectral_norm` load too. Parameters remain the same objects, so existing
    optimizers stay valid. `deepcopy` gives an independent copy.

    Args:
        module: modified in place. A layer with two names is normalised once.
        n_power_iterations: number of power iterations per forward pass, at least 1.
        eps: lower bound of the norms that the power iteration divides by, positive.
        impl: "triton" updates all layers in three kernel launches, plus two per further power iteration, and computes
            the gradient in two, on an NVIDIA GPU of compute capability 8.0 or newer. "torch" uses PyTorch operations.
            "auto" uses "triton" if possible. More than 256 layers, float64, mixed dtypes or devices,
            and unusual strides always use "torch".

    Returns:
        module.

    Raises:
        TypeError: a weight is not floating point.
        ValueError: module has no layer to normalise, a layer is normalised already, a weight has no elements,
            n_power_iterations is below 1, eps is not positive, or impl is unknown or cannot run on the device of the
            weights. `module` is then unchanged.
    """
    check_impl(impl)
    if n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be at least 1; it is {n_power_iterations}")
    if not eps > 0:
        raise ValueError(f"eps must be positive; it is {eps}")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
    if not layers:
        raise ValueError(f"{type(module).__name__} has no Conv2d, ConvTranspose2d or Linear to normalise")
    for name, layer in layers.items():
        _check(name or type(layer).__name__, layer)
        obstacle = obstacle_to_triton(layer.weight.device) if impl == "triton" else None
        if obstacle is not None:
            raise ValueError(f'impl="triton" cannot be used for layer {name!r}: {obstacle}; use impl="torch"')
    for layer in layers.values():
        dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        parametrize.register_parametrization(layer, "weight", _SpectralNorm(layer.weight, dim, eps))
    module._spectral_norm = _Group(module, list(layers.values()), n_power_iterations, eps, impl)  # type: ignore[assignment]
    return module


def remove_spectral_norm(module: M) -> M:
    """Undo `spectral_norm(module)`. Every weight becomes the W/σ of evaluation mode.

    Raises:
        ValueError: `module` is neither a module passed to `spectral_norm` nor a copy of one.
    """
    group = getattr(module, "_spectral_norm", None)
    if not isinstance(group, _Group):
        raise ValueError(f"spectral_norm was not called with this {type(module).__name__}")
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
    """Parametrization of one weight. The buffer names give the `state_dict` keys of torch's own parametrization."""

    _u: Tensor
    _v: Tensor

    @torch.no_grad()
    def __init__(self, weight: Tensor, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.normalized: Tensor | None = None  # W/σ of the current forward pass
        rows, columns = as_matrix(weight, dim).shape
        for name, size in (("_u", rows), ("_v", columns)):
            self.register_buffer(name, nn.functional.normalize(weight.new_empty(size).normal_(), dim=0, eps=eps))
        if not weight.is_meta:  # a meta tensor, on which models are often built first, has no values to iterate on
            spectral_norm_update(Layers([weight], [self._u], [self._v], [dim]), 15, eps)

    def forward(self, weight: Tensor) -> Tensor:
        if self.normalized is not None:
            return self.normalized
        return spectral_norm_update(Layers([weight], [self._u], [self._v], [self.dim]), 0, self.eps)[0]

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that `layer.weight = value` stores."""
        return value


class _Group:
    """Layers and hooks of one wrapped module.

    The hooks are bound methods, so that `deepcopy` of the module creates a group that refers to the copied layers.
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
            # torch deletes the property `weight` from the class, which a layer shares with its deepcopies.
            cls = type(layer)
            layer.__class__ = cast(type[nn.Module], type(cls.__name__, cls.__bases__, dict(vars(cls))))
            parametrize.remove_parametrizations(layer, "weight")


def _rename_older_keys(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for older, newer in OLDER_KEYS.items():
        if prefix + older in state_dict:
            state_dict[f"{prefix}parametrizations.weight.{newer}"] = state_dict.pop(prefix + older)
