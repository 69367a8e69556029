"""Plain PyTorch definitions: what every faster implementation must agree with.

Arguments are taken as valid; the public functions check them. Dimensions: S scales (optional), B queries, K negatives,
D features; a weight seen as a matrix has one row for each output channel.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcvae_kernels.dispatch import constant

SMALLEST_SQUARE = 1e-24  # F.normalize's eps, squared
UNKNOWN_ID = -1  # equal to no identity, not even to itself


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would round the operands of every product to half precision."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


@constant  # torch 2.11's compiler cannot look into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where one of them is."""
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
    """The loss of each query and, if wanted, the rank of its positive, [B] or [S, B]; see `dcvae_kernels.info_nce`."""
    dtype = accumulate_dtype(q, k, queue)
    with without_autocast(q.device):
        excluded = []  # bool, broadcast to [B, K]
        if queue is None:
            excluded.append(torch.eye(q.shape[-2], dtype=torch.bool, device=q.device))
        elif valid is not None:
            unfilled = torch.arange(queue.shape[-2], device=q.device) >= valid
            excluded.append(unfilled)
            queue = queue.masked_fill(unfilled[:, None], 0)  # such a slot may hold anything, even NaN
        if query_ids is not None and negative_ids is not None:
            query_ids = query_ids[:, None]
            excluded.append((query_ids == negative_ids) & (query_ids != UNKNOWN_ID))

        q = _rows(q, dtype, normalize) / temperature
        k = _rows(k, dtype, normalize)
        negatives = k if queue is None else _rows(queue, dtype, normalize)
        positive = (q * k).sum(-1)
        scores_BK = q @ negatives.mT
        if excluded:
            # The lowest finite number, not -inf: a row without any negative then has gradient 0, where -inf gives NaN.
            scores_BK = scores_BK.masked_fill(reduce(torch.logical_or, excluded), torch.finfo(dtype).min)

        loss = _contrast(positive, scores_BK)
        if symmetric:
            loss = (loss + _contrast(positive, scores_BK.mT)) / 2
        # 0·∞ is NaN: without this term a positive that overflowed would look like a perfect one, and a negative that
        # overflowed downwards like none.
        loss = loss + 0 * (positive + negatives.sum((-2, -1))[..., None]).detach()
        rank = (scores_BK > positive[..., None]).sum(-1) if with_rank else None
    return loss, rank


def _rows(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """The rows to compare, as a copy: the caller may overwrite a queue before the backward pass reads it."""
    if not normalize:
        return x.to(dtype, copy=True)
    x = x.to(dtype)
    # F.normalize's values and gradients; its second derivative, though, is NaN at a zero row.
    return x / x.square().sum(-1, keepdim=True).clamp_min(SMALLEST_SQUARE).sqrt()


def _contrast(positive: Tensor, scores_BK: Tensor) -> Tensor:
    """-log(e^s⁺ / (e^s⁺ + Σ e^s)) without the cancellation that cross-entropy suffers where the loss is small."""
    # Above the threshold softplus(x) is x; at 40 they differ by less than fp64 resolves.
    return F.softplus(scores_BK.logsumexp(-1) - positive, threshold=40)


# Spectral norm ----------------------------------------------------------------------------------------------


class Layers(NamedTuple):
    """The layers to normalise.

    Attributes:
        weights: of any shape.
        us, vs: the vectors of the power iteration, [rows] and [columns] of each weight as a matrix.
        dims: the dimension of each weight that becomes the rows.
    """

    weights: Sequence[Tensor]
    us: Sequence[Tensor]
    vs: Sequence[Tensor]
    dims: Sequence[int]


def spectral_norm_update(layers: Layers, n_power_iterations: int, eps: float) -> list[Tensor]:
    """W/σ for each weight W, after power iterations that update its u and v in place.

    u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖, σ = uᵀWv, with W as a matrix: dimension `dims[i]` against all others. With
    `n_power_iterations=0` u and v stay as they are. σ counts as 1 where it is 0.
    """
    normalized = []
    for weight, u, v, dim in zip(*layers, strict=True):
        with without_autocast(weight.device):
            matrix = as_matrix(weight, dim)
            with torch.no_grad():
                for _ in range(n_power_iterations):
                    u.copy_(_direction(matrix @ v, u, eps))
                    v.copy_(_direction(matrix.mT @ u, v, eps))
            # Copies, for the next forward pass may come before this one's backward.
            sigma = torch.dot(u.clone(), matrix @ v.clone())
            normalized.append(weight / sigma.masked_fill(sigma == 0, 1))
    return normalized


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """The weight with dimension `dim` as rows and all others as columns."""
    return weight.transpose(0, dim).flatten(1)


def _direction(x: Tensor, previous: Tensor, eps: float) -> Tensor:
    """x/‖x‖, but the previous direction where x is 0: a zero weight has none, and a zero u would stay zero for ever."""
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > 0, x / norm.clamp_min(eps), previous)
