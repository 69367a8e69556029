"""Autograd function of spectral norm, for many layers in one update.

Ŵ = W/σ and dW = (G − ⟨G, Ŵ⟩ u vᵀ)/σ, where G is the gradient with respect to Ŵ, and u and v are constants.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcvae_kernels.dispatch import needs_reference, obstacle_to_triton
from dcvae_kernels.reference import Layers, as_matrix, spectral_norm_update, without_autocast


def normalized_weights(
    layers: Layers, n_power_iterations: int, eps: float, impl: str, memo: dict[str, Any]
) -> Sequence[Tensor]:
    """Same result as `reference.spectral_norm_update` for n_power_iterations ≥ 1. Twice differentiable.

    Args:
        memo: cache for the next call with the same tensors; initially empty.
    """
    uniform = len({(weight.device, weight.dtype) for weight in layers.weights}) == 1
    # torch.compile fuses the reference implementation by itself.
    if torch.compiler.is_compiling() or not uniform or needs_reference(*layers.weights):
        return spectral_norm_update(layers, n_power_iterations, eps)
    plan = _triton_plan(layers, impl, memo)
    return GroupedSpectralNorm.apply(layers, n_power_iterations, eps, plan, *layers.weights)


def _triton_plan(layers: Layers, impl: str, memo: dict[str, Any]) -> Any:
    """Return the launch plan of the Triton kernels, or None if they do not support these layers."""
    device = layers.weights[0].device
    if impl == "torch" or (impl == "auto" and device.type != "cuda") or obstacle_to_triton(device) is not None:
        return None
    from dcvae_kernels.triton import spectral_norm as triton_spectral_norm  # optional dependency

    key = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (*layers.weights, *layers.us, *layers.vs)]
    if memo.get("key") != key:
        memo["plan"] = triton_spectral_norm.make_plan(layers)
        memo["key"] = key
    return memo["plan"]


class GroupedSpectralNorm(torch.autograd.Function):
    """Update us and vs in place and return W/σ of each weight, with Triton if there is a plan, else with PyTorch."""

    @staticmethod
    def forward(
        ctx: Any, layers: Layers, n_power_iterations: int, eps: float, plan: Any, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        # `saved` has copies of us and vs, because the next forward pass can precede this one's backward pass.
        if plan is not None:
            from dcvae_kernels.triton import spectral_norm as triton_spectral_norm

            normalized, saved = triton_spectral_norm.update(plan, weights, n_power_iterations, eps)
        else:
            with without_autocast(weights[0].device):
                normalized, *rest = _update(layers, n_power_iterations, eps)
            saved = [*normalized, *(x for tensors in rest for x in tensors)]
        ctx.dims, ctx.plan = layers.dims, plan
        ctx.save_for_backward(*weights, *saved)
        ctx.set_materialize_grads(False)
        return tuple(normalized)

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(grad_output)
        weights, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs_grad = ctx.needs_input_grad[-count:]
        grad_outputs = [x if needed else None for x, needed in zip(grad_output, needs_grad, strict=True)]
        if torch.is_grad_enabled() or ctx.plan is None:
            with without_autocast(weights[0].device):
                gradients = _gradients(ctx, weights, saved, grad_outputs)
        else:
            from dcvae_kernels.triton import spectral_norm as triton_spectral_norm

            gradients = triton_spectral_norm.gradients(ctx.plan, triton_spectral_norm.Saved(*saved), grad_outputs)
        gradients = [None if x is None else gradient for x, gradient in zip(grad_outputs, gradients, strict=True)]
        return *(None,) * 4, *gradients


def _gradients(
    ctx: Any, weights: Sequence[Tensor], saved: Sequence[Tensor], grad_output: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return dW of each weight, differentiable in grad mode."""
    count = len(weights)
    if ctx.plan is None:
        normalized, sigmas, us, vs = (saved[i * count : (i + 1) * count] for i in range(4))
    else:
        heights = [weight.shape[dim] for weight, dim in zip(weights, ctx.dims, strict=True)]
        widths = [weight.numel() // height for weight, height in zip(weights, heights, strict=True)]
        normalized, us, vs, sigmas = weights, saved[1].split(heights), saved[2].split(widths), saved[3].unbind()
    gradients: list[Tensor | None] = []
    for grad, *layer, u, v, dim in zip(grad_output, weights, normalized, sigmas, us, vs, ctx.dims, strict=True):
        weight, normalized_weight, sigma = layer
        if grad is None:
            gradients.append(None)
        elif torch.is_grad_enabled():
            u, v = u.to(weight.dtype), v.to(weight.dtype)
            recomputed = spectral_norm_update(Layers([weight], [u], [v], [dim]), 0, 0.0)
            gradients += torch.autograd.grad(recomputed, weight, grad, create_graph=True)
        else:
            gradients.append(_gradient(grad, normalized_weight, sigma, u, v, dim))
    return gradients


def _update(layers: Layers, n_power_iterations: int, eps: float) -> tuple[Sequence[Tensor], ...]:
    """Update u and v in place. Return W/σ, σ, and copies of u and v."""
    weights, us, vs, dims = layers
    matrices = [as_matrix(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
    transposed = [matrix.mT for matrix in matrices]
    new_us, new_vs, norms = us, vs, weights[0].new_empty(0)
    for _ in range(n_power_iterations):
        new_us, _ = _directions(list(map(torch.mv, matrices, new_vs)), new_us, eps)
        new_vs, norms = _directions(list(map(torch.mv, transposed, new_us)), new_vs, eps)
    torch._foreach_copy_(list(us) + list(vs), list(new_us) + list(new_vs))
    # uᵀWv is ‖Wᵀu‖, or less if that is below eps, because v is Wᵀu / max(‖Wᵀu‖, eps).
    sigmas = norms.square() / norms.clamp_min(eps)
    sigmas = sigmas.masked_fill(sigmas == 0, 1).unbind()
    return [weight / sigma for weight, sigma in zip(weights, sigmas, strict=True)], sigmas, new_us, new_vs


def _directions(vectors: list[Tensor], previous: Sequence[Tensor], eps: float) -> tuple[Sequence[Tensor], Tensor]:
    """Return each vector divided by its norm, and the norms, [len(vectors)].

    If a vector is 0 or NaN, its direction is the previous one, because a zero u would stay zero forever.
    """
    norms = torch.stack(torch._foreach_norm(vectors))
    directions = torch._foreach_div(vectors, norms.clamp_min(eps).unbind())
    nonzero = norms > 0
    return [torch.where(*args) for args in zip(nonzero.unbind(), directions, previous, strict=True)], norms


def _gradient(grad_output: Tensor, normalized: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    others = [n for i, n in enumerate(normalized.shape) if i != dim]
    u = u.view([-1 if i == dim else 1 for i in range(normalized.ndim)])
    inner_u = torch.dot(grad_output.reshape(-1), normalized.reshape(-1)) * u
    return torch.addcmul(grad_output, inner_u, v.view(others).unsqueeze(dim), value=-1).div_(sigma)
