"""Spectral normalisation (Miyato et al., 2018) of a whole network, with one update per forward pass."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcvae_kernels.dispatch import PLAIN_TENSORS, Impl, check_impl, obstacle_to_triton
from dcvae_kernels.reference import Layers, as_matrix, spectral_norm_update
from dcvae_kernels.spectral_norm_autograd import hidden_from_checkpointing, normalized_weights

M = TypeVar("M", bound=nn.Module)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, nn.Bilinear, nn.Embedding)


def spectral_norm(
    module: M,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    name: str = "weight",
    dim: int | None = None,
    impl: Impl = "auto",
) -> M:
    """Divide the weight of every layer in `module` by its largest singular value σ.

    Layers are convolutions and transposed convolutions with 1 to 3 dimensions, Linear, Bilinear and Embedding. `module`
    itself is normalised too if it has such a parameter, also if it has another type.

    σ = uᵀWv comes from power iterations on the weight as a matrix [output channels, rest]: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖.
    Each forward pass of `module` starts with one update of all layers in training mode, and the layers use the same
    weights throughout that pass. In evaluation mode, and if a weight is read outside such a pass, the weight is W/σ for
    the current u and v. A forward pass during a backward pass does not update u and v, because it recomputes
    activations (checkpointing). Frozen weights are iterated too. A zero weight stays zero. σ is computed in the dtype
    of the weight, also under autocast.

    Each layer is equivalent to `torch.nn.utils.parametrizations.spectral_norm` and has the same `state_dict` keys.
    Checkpoints of the older `torch.nn.utils.spectral_norm` load too. Parameters remain the same objects, so existing
    optimizers stay valid. `deepcopy` gives an independent copy.

    Args:
        module: modified in place. A layer with two names is normalised once.
        n_power_iterations: number of power iterations per forward pass, at least 1.
        eps: lower bound of the norms that the power iteration divides by, positive.
        name: name of the parameter to normalise; layers without it are left out.
        dim: dimension of the parameter that becomes the rows of the matrix; None for the output channels, which are
            dimension 1 of transposed convolutions and 0 of all others.
        impl: "triton" updates all layers in two kernel launches, plus one per further power iteration, and computes
            the gradient in two, on an NVIDIA GPU of compute capability 8.0 or newer. "torch" uses PyTorch operations.
            "auto" uses "triton" if possible. More than 256 layers, float64, complex numbers, mixed dtypes or devices,
            and unusual strides always use "torch".

    Returns:
        module.

    Raises:
        TypeError: a weight is neither floating point nor complex.
        ValueError: module has no layer to normalise, a layer is normalised already or has `max_norm`, a weight has
            fewer than two dimensions, no dimension `dim` or no elements, is not initialised, or is sharded by FSDP,
            n_power_iterations is below 1, eps is not positive, or impl is unknown or cannot run on the device of the
            weights. `module` is then unchanged.
    """
    check_impl(impl)
    if n_power_iterations < 1:
        raise ValueError(f"n_power_iterations must be at least 1; it is {n_power_iterations}")
    if not eps > 0:
        raise ValueError(f"eps must be positive; it is {eps}")
    layers = {path: layer for path, layer in module.named_modules() if _has_parameter(layer, name, layer is module)}
    if not layers:
        raise ValueError(f"{type(module).__name__} has no layer with a parameter {name!r} to normalise")
    for path, layer in layers.items():
        path = path or type(layer).__name__
        _check(path, layer, name, dim)
        obstacle = obstacle_to_triton(layer.get_parameter(name).device) if impl == "triton" else None
        if obstacle is not None:
            raise ValueError(f'impl="triton" cannot be used for layer {path!r}: {obstacle}; use impl="torch"')
    forward_pass = _Pass()
    normalized = [_normalize(layer, name, dim, eps, forward_pass, i) for i, layer in enumerate(layers.values())]
    groups = vars(module).setdefault("_spectral_norms", {})
    if name in groups:  # left over from layers whose parametrizations torch removed
        groups[name].remove(module)
    groups[name] = _Group(module, name, normalized, n_power_iterations, eps, impl, forward_pass)
    return module


def remove_spectral_norm(module: M) -> M:
    """Undo all calls of `spectral_norm` with `module`. Every weight becomes the W/σ of evaluation mode.

    Raises:
        ValueError: `module` is neither a module passed to `spectral_norm` nor a copy of one.
    """
    groups = vars(module).get("_spectral_norms")
    if not groups:
        raise ValueError(f"spectral_norm was not called with this {type(module).__name__}")
    for group in [*groups.values()]:
        group.remove(module)
    return module


def _has_parameter(layer: nn.Module, name: str, is_root: bool) -> bool:
    """Whether `layer` has a parameter `name` to normalise, or that is normalised or parametrized already."""
    parameter = layer._parameters.get(name)
    if parameter is None and not parametrize.is_parametrized(layer, name) and f"{name}_orig" not in layer._parameters:
        return False
    return isinstance(layer, LAYERS) or (is_root and (parameter is None or parameter.ndim > 1))


def _check(path: str, layer: nn.Module, name: str, dim: int | None) -> None:
    weight = layer._parameters.get(name)
    if weight is None:
        raise ValueError(
            f"layer {path!r}: its {name} is normalised or parametrized already; remove that first, or call "
            "spectral_norm once with the outermost module"
        )
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"layer {path!r}: its {name} is not initialised; run a forward pass before spectral_norm")
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(f"layer {path!r}: max_norm would change W/σ in place; use max_norm=None")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"layer {path!r}: its {name} must be floating point or complex; it is {weight.dtype}")
    if type(weight).__name__ == "DTensor":
        raise ValueError(f"layer {path!r}: its {name} is sharded already; call spectral_norm before fully_shard")
    if weight.ndim < 2:
        raise ValueError(f"layer {path!r}: its {name} must have at least two dimensions; it is {list(weight.shape)}")
    if dim is not None and not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"layer {path!r}: dim must be a dimension of its {name}, {list(weight.shape)}; it is {dim}")
    if weight.numel() == 0:
        raise ValueError(f"layer {path!r}: its {name} has no elements; it is {list(weight.shape)}")


@dataclass
class _Pass:
    """State of the current forward pass of a wrapped module.

    Attributes:
        normalized: W/σ by index of the layer; empty outside a forward pass.
        n_power_iterations: 0 outside a forward pass, and if u and v must not be updated.
    """

    normalized: dict[int, Tensor] = field(default_factory=dict)
    n_power_iterations: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Pass":
        return memo.setdefault(id(self), _Pass())


class _SpectralNorm(nn.Module):
    """Parametrization of one weight. The buffer names give the `state_dict` keys of torch's own parametrization.

    Attributes:
        forward_pass: shared by all layers of the wrapped module.
        index: position of this layer among them.
    """

    _u: Tensor
    _v: Tensor

    @torch.no_grad()
    def __init__(self, weight: Tensor, dim: int, eps: float, forward_pass: _Pass, index: int) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.forward_pass = forward_pass
        self.index = index
        rows, columns = as_matrix(weight, dim).shape
        for name, size in (("_u", rows), ("_v", columns)):
            self.register_buffer(name, nn.functional.normalize(weight.new_empty(size).normal_(), dim=0, eps=eps))
        if not weight.is_meta:  # a meta tensor has no values
            self.update(weight, 15)

    def update(self, weight: Tensor, n_power_iterations: int) -> Tensor:
        layers = Layers([weight], [self._u], [self._v], [self.dim])
        return spectral_norm_update(layers, n_power_iterations, self.eps)[0]

    def forward(self, weight: Tensor) -> Tensor:
        normalized = self.forward_pass.normalized
        if self.index in normalized:
            return normalized[self.index]
        with hidden_from_checkpointing():
            if self.training and self.forward_pass.n_power_iterations:  # FSDP shards this layer
                normalized[self.index] = self.update(weight, self.forward_pass.n_power_iterations)
                return normalized[self.index]
            return self.update(weight, 0)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that `layer.weight = value` stores."""
        return value


class _Layer(NamedTuple):
    """A normalised layer, with the dictionaries that hold its tensors; they are faster to read than attributes.

    Attributes:
        parametrizations: parametrizations of the module, by parameter name.
        parametrization: the entry of `parametrizations` that contains this spectral norm.
        parameters, buffers: dictionaries with W ("original"), and with u and v.
    """

    module: nn.Module
    index: int
    dim: int
    parametrizations: dict[str, Any]
    parametrization: nn.Module
    parameters: dict[str, Any]
    buffers: dict[str, Any]


def _normalize(layer: nn.Module, name: str, dim: int | None, eps: float, forward_pass: _Pass, index: int) -> _Layer:
    weight = layer.get_parameter(name)
    if dim is None:
        dim = 1 if isinstance(layer, TRANSPOSED) else 0
    norm = _SpectralNorm(weight, dim % weight.ndim, eps, forward_pass, index)
    parametrize.register_parametrization(layer, name, norm)
    _shorten_reads(type(layer), name)
    parametrizations = cast(Any, layer).parametrizations._modules
    parametrization = parametrizations[name]
    return _Layer(layer, index, norm.dim, parametrizations, parametrization, parametrization._parameters, norm._buffers)


def _shorten_reads(layer_class: type, name: str) -> None:
    """Make the property `name` of a parametrized layer return the W/σ of the current forward pass.

    Calling the parametrization instead takes longer than all other work per layer. The class belongs to the layer and
    its deepcopies.
    """
    parametrized: Any = vars(layer_class)[name]
    read_parametrized = parametrized.fget

    def read(layer: Any) -> Tensor:
        parametrizations = layer._modules["parametrizations"]._modules[name]._modules
        norm = parametrizations["0"]
        normalized = norm.forward_pass.normalized.get(norm.index)
        if normalized is None or len(parametrizations) > 1:
            return read_parametrized(layer)
        return normalized

    setattr(layer_class, name, property(read, parametrized.fset))


class _Group:
    """Layers and hooks of one wrapped module.

    The hooks are bound methods, so that `deepcopy` of the module creates a group that refers to the copied layers.
    """

    def __init__(
        self, module: nn.Module, name: str, layers: list[_Layer], n_power_iterations: int, eps: float, impl: Impl,
        forward_pass: _Pass,
    ) -> None:  # fmt: skip
        self.name = name
        self.layers = layers
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.impl: Impl = impl
        self.forward_pass = forward_pass
        self.sharded: set[int] = set()
        rename = partial(_rename_older_keys, name)
        self.handles = [
            module.register_forward_pre_hook(self.update),
            module.register_forward_hook(self.clear, always_call=True),
            *(layer.module.register_load_state_dict_pre_hook(rename) for layer in layers),
        ]

    def update(self, module: nn.Module, *_: Any) -> None:
        if "_is_replica" in vars(module):
            raise RuntimeError("spectral_norm does not support nn.DataParallel; use DistributedDataParallel")
        self.clear()  # torch does not call hooks after a KeyboardInterrupt
        # During a backward pass, this forward pass recomputes activations and must not change u and v.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self._forget_removed_layers(module)
        self.forward_pass.n_power_iterations = self.n_power_iterations
        # FSDP2 gathers the weights of its layers later, and expects their gradients before those of other layers. FSDP1
        # can replace a parameter by an attribute. Each of these layers is updated when it reads its weight.
        for layer in self.layers:
            if type(layer.parameters.get("original")) not in PLAIN_TENSORS:
                self.sharded.add(layer.index)
        layers = [layer for layer in self.layers if layer.module.training and layer.index not in self.sharded]
        if not layers:
            return
        group = Layers(
            weights=[layer.parameters["original"] for layer in layers],
            us=[layer.buffers["_u"] for layer in layers],
            vs=[layer.buffers["_v"] for layer in layers],
            dims=[layer.dim for layer in layers],
        )
        normalized = normalized_weights(group, self.n_power_iterations, self.eps, self.impl)
        self.forward_pass.normalized.update(zip([layer.index for layer in layers], normalized, strict=True))

    def clear(self, *_: Any) -> None:
        self.forward_pass.normalized.clear()
        self.forward_pass.n_power_iterations = 0

    def _forget_removed_layers(self, module: nn.Module) -> None:
        """Forget layers from which `parametrize.remove_parametrizations` removed the spectral norm."""
        layers = [layer for layer in self.layers if layer.parametrizations.get(self.name) is layer.parametrization]
        if len(layers) < len(self.layers):
            self.layers = layers
            if not layers:
                self.remove(module)

    def remove(self, module: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            if layer.parametrizations.get(self.name) is layer.parametrization:
                # torch deletes the property `weight` from the class, which a layer shares with its deepcopies.
                cls = type(layer.module)
                layer.module.__class__ = cast(type[nn.Module], type(cls.__name__, cls.__bases__, dict(vars(cls))))
                parametrize.remove_parametrizations(layer.module, self.name)
        groups = vars(module)["_spectral_norms"]
        if groups.get(self.name) is self:
            del groups[self.name]


def _rename_older_keys(name: str, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for older, newer in (("orig", "original"), ("u", "0._u"), ("v", "0._v")):
        key = f"{prefix}{name}_{older}"
        if key in state_dict:
            state_dict[f"{prefix}parametrizations.{name}.{newer}"] = state_dict.pop(key)
