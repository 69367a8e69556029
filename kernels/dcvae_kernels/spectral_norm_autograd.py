"""Autograd functions and torch.compile operators of spectral norm, for many layers in one update.

Ŵ = W/σ and dW = (G − ⟨G, Ŵ⟩ u vᵀ)/σ, where G is the gradient with respect to Ŵ, and u and v are constants.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from dcvae_kernels.dispatch import is_batched, needs_reference, obstacle_to_triton
from dcvae_kernels.reference import (
    Layers,
    accumulate_dtype,
    spectral_norm_update,
    upcast_matrix,
    without_autocast,
)

MAX_LAYERS = 256  # a kernel takes one argument per layer
MAX_ELEMENTS = 2**30  # of a layer; the kernels compute 32-bit offsets
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENT = 64  # elements; each weight starts at a multiple of it in a buffer for all weights
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def normalized_weights(layers: Layers, n_power_iterations: int, eps: float, impl: str) -> Sequence[Tensor]:
    """Return W/σ of all layers like `reference.spectral_norm_update`, for n_power_iterations ≥ 1.

    Twice differentiable.
    """
    weights = layers.weights
    if needs_reference(*weights) or torch.compiler.is_exporting():
        return spectral_norm_update(layers, n_power_iterations, eps)
    use_triton = _use_triton(weights[0].device, impl)
    if torch.compiler.is_compiling():
        if not _real_and_uniform(weights):
            return spectral_norm_update(layers, n_power_iterations, eps)
        return _compiled(layers, n_power_iterations, eps, use_triton and supported(layers))
    plan = _triton().find_plan(layers) if use_triton else None
    if plan is None and not _real_and_uniform(weights):
        return spectral_norm_update(layers, n_power_iterations, eps)
    with hidden_from_checkpointing():
        return GroupedSpectralNorm.apply(layers, n_power_iterations, eps, plan, *weights)


def _triton() -> ModuleType:
    from dcvae_kernels.triton import spectral_norm as triton_spectral_norm  # optional dependency

    return triton_spectral_norm


def _real_and_uniform(weights: Sequence[Tensor]) -> bool:
    dtype, device = weights[0].dtype, weights[0].device
    return not dtype.is_complex and all(x.dtype == dtype and x.device == device for x in weights)


def _use_triton(device: torch.device, impl: str) -> bool:
    return impl != "torch" and (impl == "triton" or device.type == "cuda") and obstacle_to_triton(device) is None


def supported(layers: Layers) -> bool:
    """Whether the Triton kernels support the dtypes, devices, sizes and strides, and the number of layers."""
    weights, us, vs, dims = layers
    return (
        len(weights) <= MAX_LAYERS
        and weights[0].dtype in DTYPES
        and _real_and_uniform((*weights, *us, *vs))
        and all(x.numel() <= MAX_ELEMENTS and _is_dense(x, dim) for x, dim in zip(weights, dims, strict=True))
        and all(x.is_contiguous() for x in (*us, *vs))
    )


def _is_dense(weight: Tensor, dim: int) -> bool:
    if weight.is_contiguous():
        return True
    memory_format = CHANNELS_LAST.get(weight.ndim)
    return memory_format is not None and dim < 2 and weight.is_contiguous(memory_format=memory_format)


def hidden_from_checkpointing() -> AbstractContextManager:
    """Hide operations, and the tensors that they save for the backward pass, from activation checkpointing.

    Checkpointing requires the forward pass and its recomputation to run the same operations and save the same tensors,
    but only the forward pass normalises all weights together.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    has_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]
    return _hidden(has_hooks) if has_hooks or _is_selective() else nullcontext()


def _is_selective() -> bool:
    return type(_get_current_dispatch_mode()).__module__ == "torch.utils.checkpoint"


@contextmanager
def _hidden(has_hooks: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if has_hooks:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        while _is_selective():
            stack.enter_context(_pop_mode_temporarily())
        yield


class GroupedSpectralNorm(torch.autograd.Function):
    """Update us and vs in place and return W/σ of each weight, with Triton if there is a plan, else with PyTorch."""

    @staticmethod
    def forward(
        ctx: Any, layers: Layers, n_power_iterations: int, eps: float, plan: Any, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        if plan is None:
            ctx.layout, ctx.views = None, buffer_views(weights)
            normalized, vectors = _update(layers, n_power_iterations, eps)
        else:
            ctx.layout, ctx.views = plan.layout, plan.layout.views
            normalized, vectors = _triton().update(plan, weights[0], n_power_iterations, eps)
        ctx.save_for_backward(normalized, vectors)
        # Only second derivatives depend on the weights.
        ctx.weights, ctx.dims, ctx.versions = weights, layers.dims, _versions(ctx, weights)
        ctx.set_materialize_grads(False)
        return tuple(split(normalized, ctx.views))

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[-len(grad_output) :]
        # Embedding(sparse=True) has a sparse gradient.
        grad_outputs = [
            None if x is None or not needed else x.to_dense() if x.is_sparse else x
            for x, needed in zip(grad_output, needs_grad, strict=True)
        ]
        normalized, vectors = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, vectors, grad_outputs)
        elif ctx.layout is None or any(map(is_batched, [x for x in grad_outputs if x is not None])):
            gradients = _gradients(ctx.weights, ctx.dims, normalized, vectors, grad_outputs)
        else:
            gradients = split(_triton().gradients(ctx.layout, normalized, vectors, grad_outputs), ctx.views)
        gradients = [None if x is None else gradient for x, gradient in zip(grad_outputs, gradients, strict=True)]
        return *(None,) * 4, *gradients


def _versions(ctx: Any, weights: Sequence[Tensor]) -> list[int]:
    return [x._version for x, needed in zip(weights, ctx.needs_input_grad[-len(weights) :], strict=True) if needed]


def _differentiable_gradients(ctx: Any, vectors: Tensor, grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    weights, dims = ctx.weights, ctx.dims
    if _versions(ctx, weights) != ctx.versions:
        raise RuntimeError(
            "spectral_norm: a weight was modified in place after the forward pass, so second derivatives cannot be "
            "computed; compute them before the optimizer's step"
        )
    us, vs, _ = _vectors(vectors, weights, dims)
    gradients: list[Tensor | None] = []
    with without_autocast(weights[0].device):
        for grad, weight, u, v, dim in zip(grad_outputs, weights, us, vs, dims, strict=True):
            if grad is None:
                gradients.append(None)
                continue
            recomputed = spectral_norm_update(Layers([weight], [u], [v], [dim]), 0, 0.0)
            gradients += torch.autograd.grad(recomputed, weight, grad, create_graph=True)
    return gradients


# Buffers --------------------------------------------------------------------------------------------------------------

# W/σ or dW of all layers share a buffer. Another one holds u, v and σ of all layers, in float32, or in float64 for
# float64 weights. They are copies, because the next forward pass can precede this one's backward pass.


def buffer_views(weights: Sequence[Tensor]) -> list[tuple[torch.Size, tuple[int, ...], int]]:
    """Return size, strides and start of each weight in a buffer for all weights."""
    starts = accumulate((_padded(x) for x in weights), initial=0)
    return [(x.shape, x.stride(), start) for x, start in zip(weights, starts, strict=False)]


def buffer_size(weights: Sequence[Tensor]) -> int:
    return sum(_padded(x) for x in weights)


def _padded(x: Tensor) -> int:
    return -(-x.numel() // ALIGNMENT) * ALIGNMENT


def split(buffer: Tensor, views: Sequence[tuple[torch.Size, tuple[int, ...], int]]) -> list[Tensor]:
    first = 0 if torch.compiler.is_compiling() else buffer.storage_offset()
    return [buffer.as_strided(size, stride, first + start) for size, stride, start in views]


def _vectors(vectors: Tensor, weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[Sequence[Tensor], ...]:
    """Return u, v and σ of each layer."""
    heights = [weight.shape[dim] for weight, dim in zip(weights, dims, strict=True)]
    widths = [weight.numel() // height for weight, height in zip(weights, heights, strict=True)]
    us, vs, sigmas = vectors.split([sum(heights), sum(widths), len(weights)])
    return us.split(heights), vs.split(widths), sigmas.unbind()


# In PyTorch -----------------------------------------------------------------------------------------------------------


def _update(layers: Layers, n_power_iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """Update u and v in place. Return W/σ, and u, v and σ, of all layers."""
    weights, us, vs, dims = layers
    dtype = accumulate_dtype(*weights)
    with without_autocast(weights[0].device):
        matrices = [upcast_matrix(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
        new_us, new_vs = ([x.to(dtype) for x in vectors] for vectors in (us, vs))
        norms = None
        for _ in range(n_power_iterations):
            new_us, _ = _directions([x @ v for x, v in zip(matrices, new_vs, strict=True)], new_us, eps)
            new_vs, norms = _directions([x.mT @ u for x, u in zip(matrices, new_us, strict=True)], new_vs, eps)
        if norms is None:
            sigmas = torch.stack([u @ x @ v for x, u, v in zip(matrices, new_us, new_vs, strict=True)])
        else:
            torch._foreach_copy_([*us, *vs], [*new_us, *new_vs])
            # uᵀWv is ‖Wᵀu‖, or less if that is below eps, because v is Wᵀu / max(‖Wᵀu‖, eps).
            sigmas = norms.square() / norms.clamp_min(eps)
        sigmas = sigmas.masked_fill(sigmas == 0, 1)
        normalized = weights[0].new_empty(buffer_size(weights))
        for weight, sigma, quotient in zip(weights, sigmas, split(normalized, buffer_views(weights)), strict=True):
            torch.div(weight, sigma, out=quotient)
    return normalized, torch.cat([*new_us, *new_vs, sigmas])


def _directions(vectors: list[Tensor], previous: list[Tensor], eps: float) -> tuple[list[Tensor], Tensor]:
    """Return each vector divided by its norm, and the norms, [len(vectors)].

    If a vector is 0 or not finite, its direction is the previous one, because a zero u would stay zero forever.
    """
    norms = torch.stack(torch._foreach_norm(vectors))
    directions = torch._foreach_div(vectors, norms.clamp_min(eps).unbind())
    valid = (norms > 0) & (norms < torch.inf)
    return [torch.where(*args) for args in zip(valid.unbind(), directions, previous, strict=True)], norms


def _gradients(
    weights: Sequence[Tensor],
    dims: Sequence[int],
    normalized: Tensor,
    vectors: Tensor,
    grad_output: Sequence[Tensor | None],
) -> list[Tensor | None]:
    layers = zip(
        grad_output, split(normalized, buffer_views(weights)), *_vectors(vectors, weights, dims), dims, strict=True
    )
    with without_autocast(normalized.device):
        return [None if grad is None else _gradient(grad, *layer) for grad, *layer in layers]


def _gradient(grad_output: Tensor, normalized: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int) -> Tensor:
    others = [n for i, n in enumerate(normalized.shape) if i != dim]
    u = u.view([-1 if i == dim else 1 for i in range(normalized.ndim)])
    grad, normalized = (x.to(u.dtype) for x in (grad_output, normalized))
    inner_u = torch.dot(grad.reshape(-1), normalized.reshape(-1)) * u
    gradient = torch.addcmul(grad, inner_u, v.view(others).unsqueeze(dim), value=-1).div_(sigma)
    return gradient.to(grad_output.dtype)


# torch.compile --------------------------------------------------------------------------------------------------------


# mode="reduce-overhead" does not allow the tables on the device that these operators make and keep.
TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("dcvae_kernels::spectral_norm_update", mutates_args=("us", "vs"), tags=TAGS)
def update_operator(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    dims: list[int],
    n_power_iterations: int,
    eps: float,
    use_triton: bool,
) -> tuple[Tensor, Tensor]:
    layers = Layers(weights, us, vs, dims)
    recomputes = torch._C._current_graph_task_id() != -1  # see `spectral_norm.spectral_norm`
    if use_triton and not recomputes:
        return _triton().update(_triton().find_plan(layers), weights[0], n_power_iterations, eps)
    return _update(layers, 0 if recomputes else n_power_iterations, eps)


@torch.library.custom_op("dcvae_kernels::spectral_norm_gradient", mutates_args=(), tags=TAGS)
def gradient_operator(
    weights: list[Tensor],
    dims: list[int],
    normalized: Tensor,
    vectors: Tensor,
    grad_output: list[Tensor],
    use_triton: bool,
) -> Tensor:
    """Return dW of all layers."""
    if use_triton:
        return _triton().gradients(_triton().find_layout(weights, dims), normalized, vectors, grad_output)
    buffer = torch.empty_like(normalized)
    gradients = _gradients(weights, dims, normalized, vectors, grad_output)
    torch._foreach_copy_(split(buffer, buffer_views(weights)), [x for x in gradients if x is not None])
    return buffer


@update_operator.register_fake
def _(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    size = sum(x.numel() for x in (*us, *vs)) + len(weights)
    like = weights[0]
    return like.new_empty(buffer_size(weights)), like.new_empty(size, dtype=accumulate_dtype(like))


@gradient_operator.register_fake
def _(weights: list[Tensor], dims: list[int], normalized: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(normalized)


def _compiled(layers: Layers, n_power_iterations: int, eps: float, use_triton: bool) -> Sequence[Tensor]:
    """Compute `normalized_weights` with operators that torch.compile does not trace."""
    weights, us, vs, dims = layers
    with torch.no_grad():
        saved = update_operator([*weights], [*us], [*vs], [*dims], n_power_iterations, eps, use_triton)
    return CompiledSpectralNorm.apply(*saved, dims, use_triton, *weights)


class CompiledSpectralNorm(torch.autograd.Function):
    """Split a buffer with W/σ of all weights, and connect it to the weights."""

    @staticmethod
    def forward(
        ctx: Any, normalized: Tensor, vectors: Tensor, dims: Sequence[int], use_triton: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(normalized, vectors, *weights)
        ctx.dims, ctx.use_triton = dims, use_triton
        return tuple(split(normalized, buffer_views(weights)))

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        normalized, vectors, *weights = ctx.saved_tensors
        gradients = gradient_operator(weights, list(ctx.dims), normalized, vectors, [*grad_output], ctx.use_triton)
        return *(None,) * 4, *split(gradients, buffer_views(weights))
