"""Reference definitions in plain PyTorch, which every faster implementation must match.

Arguments are not checked here; the public functions do that. Dimensions: S scales (optional), B queries, K negatives,
D features. A weight viewed as a matrix has one row per output channel.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcvae_kernels.dispatch import assume_constant_result

SMALLEST_SQUARE = 1e-24  # F.normalize's eps, squared
UNKNOWN_ID = -1  # does not equal any id, including itself


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast, which would round the operands of every product to half precision."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


@assume_constant_result  # torch 2.11's compiler cannot trace this call
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


# InfoNCE ----------------------------------------------------------------------------------------------------


def info_nce_reference(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    *,
    temperature: float | Tensor,
    normalize: bool,
    valid: int | Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    symmetric: bool,
    with_rank: bool,
) -> tuple[Tensor, Tensor | None]:
    """Per-query loss and, on request, the rank of its positive, [B] or [S, B]; see `dcvae_kernels.info_nce`."""
    dtype = accumulate_dtype(q, k, queue)
    with without_autocast(q.device):
        excluded = []  # bool, broadcast to [B, K]
        if queue is None:
            excluded.append(torch.eye(q.shape[-2], dtype=torch.bool, device=q.device))
        elif valid is not None:
            unfilled = torch.arange(queue.shape[-2], device=q.device) >= valid
            excluded.append(unfilled)
            queue = queue.masked_fill(unfilled[:, None], 0)  # unfilled slots can hold anything, including NaN
        if query_ids is not None and negative_ids is not None:
            query_ids = query_ids[:, None]
            excluded.append((query_ids == negative_ids) & (query_ids != UNKNOWN_ID))

        q = _rows(q, dtype, normalize) / temperature
        k = _rows(k, dtype, normalize)
        negatives = k if queue is None else _rows(queue, dtype, normalize)
        positive = (q * k).sum(-1)
        scores_BK = q @ negatives.mT
        if excluded:
            # The lowest finite number, not -inf, which would give NaN gradients in a row without negatives.
            scores_BK = scores_BK.masked_fill(reduce(torch.logical_or, excluded), torch.finfo(dtype).min)

        loss = _contrast(positive, scores_BK)
        if symmetric:
            loss = (loss + _contrast(positive, scores_BK.mT)) / 2
        # 0·∞ is NaN. Without this term an infinite positive would look like a perfect match, and a negative of −∞ like
        # an excluded one.
        loss = loss + 0 * (positive + negatives.sum((-2, -1))[..., None]).detach()
        rank = (scores_BK > positive[..., None]).sum(-1) if with_rank else None
    return loss, rank


def _rows(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Return the rows to compare, as a copy, because the queue can be overwritten before the backward pass."""
    if not normalize:
        return x.to(dtype, copy=True)
    x = x.to(dtype)
    # Same values and gradients as F.normalize, whose second derivative is NaN at a zero row.
    return x / x.square().sum(-1, keepdim=True).clamp_min(SMALLEST_SQUARE).sqrt()


def _contrast(positive: Tensor, scores_BK: Tensor) -> Tensor:
    """-log(e^s⁺ / (e^s⁺ + Σ e^s)), without the cancellation that cross-entropy suffers if the loss is small."""
    # Above the threshold F.softplus returns x; at 40 the difference is below the resolution of fp64.
    return F.softplus(scores_BK.logsumexp(-1) - positive, threshold=40)


# Spectral norm ----------------------------------------------------------------------------------------------


class Layers(NamedTuple):
    """Layers to normalise.

    Attributes:
        weights: tensors of any shape.
        us, vs: power iteration vectors, [rows] and [columns] of each weight viewed as a matrix.
        dims: dimension of each weight that becomes the rows.
    """

    weights: Sequence[Tensor]
    us: Sequence[Tensor]
    vs: Sequence[Tensor]
    dims: Sequence[int]


def spectral_norm_update(layers: Layers, n_power_iterations: int, eps: float) -> list[Tensor]:
    """Update u and v of each weight W in place by power iterations and return W/σ.

    u ← Wv/‖Wv‖, v ← Wᴴu/‖Wᴴu‖, σ = uᴴWv, where dimension `dims[i]` of W becomes the rows and ᴴ is the conjugate
    transpose. With `n_power_iterations=0` u and v are unchanged. σ = 0 is replaced by 1.
    """
    normalized = []
    for weight, u, v, dim in zip(*layers, strict=True):
        with without_autocast(weight.device):
            matrix = upcast_matrix(weight, dim)
            with torch.no_grad():
                for _ in range(n_power_iterations):
                    _set_direction(u, matrix.detach() @ v.to(matrix.dtype), eps)
                    _set_direction(v, matrix.detach().mH @ u.to(matrix.dtype), eps)
            # Copies, because the next forward pass can precede this one's backward pass.
            u, v = (x.to(matrix.dtype, copy=True) for x in (u, v))
            sigma = torch.vdot(u, matrix @ v)
            normalized.append(weight / sigma.masked_fill(sigma == 0, 1))
    return normalized


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """View the weight as a matrix with dimension `dim` as rows, and the other dimensions in their order as columns."""
    return weight.movedim(dim, 0).flatten(1)


def upcast_matrix(weight: Tensor, dim: int) -> Tensor:
    """Return the weight as a matrix, converted from half precision to float32."""
    matrix = as_matrix(weight, dim)
    return matrix if weight.is_complex() else matrix.to(accumulate_dtype(weight))


def _set_direction(direction: Tensor, x: Tensor, eps: float) -> None:
    """direction ← x/‖x‖, unless x is 0 or not finite, because a zero u would stay zero forever."""
    norm = torch.linalg.vector_norm(x)
    valid = (norm > 0) & (norm < torch.inf)
    # Transforms of torch.func allow writing to an outer tensor with out=, but not with copy_.
    torch.where(valid, (x / norm.clamp_min(eps)).to(direction.dtype), direction, out=direction)
