"""InfoNCE in plain PyTorch, for any device. Scores exist for one block of pairs at a time, never for all pairs.

Implements the same two computations as `dcvae_kernels.triton.info_nce`, with the same mathematics. Every sweep
multiplies queries, scaled by 1/τ, by keys in the same blocks, so that the backward pass reproduces the scores of the
forward pass bit for bit: at low temperatures their rounding errors are not small.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dcvae_kernels.arguments import Inputs, Settings, loss_weight
from dcvae_kernels.reference import SMALLEST_SQUARE, UNKNOWN_ID, accumulate_dtype, without_autocast

# Scores per block: 2 MiB in float32 fit into a CPU's cache; a GPU needs larger blocks.
BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**24}
BLOCK_ROWS = 1024
# Scores lie in ±1/τ, so subtracting 1/τ instead of their maximum keeps every weight ≥ e^{−2/τ}. If 2/τ is below this
# bound, weights do not underflow.
FIXED_MAXIMUM_BELOW = 60.0


def forward(
    inputs: Inputs, settings: Settings, output_mask: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `dcvae_kernels.info_nce_autograd.forward`."""
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    tau, normalize, symmetric, reduction, _ = settings
    with_dq, with_dk, with_dtemperature, with_state, with_rank = output_mask
    dtype = accumulate_dtype(q, k, queue)
    shape = q.shape
    dq = dk = dtemperature = state = None
    with without_autocast(q.device):
        inverse_temperature = 1 / tau if temperature is None else temperature.to(dtype).reciprocal()
        q, q_squares = _normalized(q, dtype, normalize)
        k, k_squares = _normalized(k, dtype, normalize)
        negatives = k if queue is None else _normalized(queue, dtype, normalize)[0]
        unfilled = None
        if valid is not None:
            unfilled = torch.arange(negatives.shape[1], device=q.device) >= valid
            negatives = negatives.masked_fill(unfilled[:, None], 0)  # unfilled slots can hold anything, including NaN
        scaled = q * inverse_temperature
        positive = (scaled * k).sum(-1)

        fixed = 1 / tau if normalize and temperature is None and 2 / tau < FIXED_MAXIMUM_BELOW else None
        with_gradient = with_dq or with_dtemperature
        excluded = _exclusion(q, query_ids, negative_ids, unfilled, in_batch=queue is None)
        blocks = _score_blocks(scaled, negatives)
        maximum, weight, total, rank = _sweep(
            blocks, positive, excluded, fixed, negatives if with_gradient else None, with_rank
        )
        highest, weight, positive_weight, loss = _merge(maximum, weight, positive)
        if with_gradient:
            total *= (maximum - highest).exp()[..., None]
        states = [highest, *_softmax_state(weight, positive_weight)]
        if symmetric:
            excluded = _exclusion(q, negative_ids, query_ids, None, in_batch=True)
            mirror = _sweep(_score_blocks(scaled, k, wrt_keys=True), positive, excluded, fixed, None, False)
            mirror_highest, *mirror_weights, mirrored = _merge(mirror[0], mirror[1], positive)
            states += [mirror_highest, *_softmax_state(*mirror_weights)]
            loss = (loss + mirrored) / 2
        # NaN if a score is infinite: −∞ would look like a distant negative, and a positive of ∞ like a perfect match.
        loss = loss + 0 * (positive + negatives.sum((1, 2))[:, None])

        factor = loss_weight(reduction, loss.numel())
        gradient_scale = inverse_temperature * factor
        if with_gradient:
            # The weights of negatives and positive add up to 0, which avoids cancellation if the loss is small.
            gradient = (total - weight[..., None] * k) * (states[1] * gradient_scale)[..., None]
            if with_dtemperature:
                dtemperature = ((gradient * q).sum(-1) * -inverse_temperature).view(shape[:-1])
            if with_dq:
                dq = _through_norm(gradient, q, q_squares).view(shape)
        if with_dk:
            dk = _through_norm(q * (states[2] * -gradient_scale)[..., None], k, k_squares).view(shape)
        if with_state:
            state = torch.stack(states).view(1 + symmetric, 3, positive.numel())
        loss = loss.view(shape[:-1]) if reduction == "none" else loss.sum() * factor
        return loss, rank.view(shape[:-1]) if with_rank else None, dq, dk, dtemperature, state


def backward_sweep(
    inputs: Inputs,
    settings: Settings,
    grad_output: Tensor,
    state: Tensor,
    wrt_q: bool,
    wrt_keys: bool,
    with_dtemperature: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `dcvae_kernels.info_nce_autograd.backward_sweep`."""
    original_q, temperature, k, queue, valid, query_ids, key_ids = inputs
    tau, normalize, symmetric, reduction, _ = settings
    in_batch = queue is None
    original_keys = k if in_batch else queue
    factor = loss_weight(reduction, state.shape[-1]) / (2 if symmetric else 1)
    dtype = accumulate_dtype(original_q, original_keys)
    with without_autocast(original_q.device):
        inverse_temperature = 1 / tau if temperature is None else temperature.to(dtype).reciprocal()
        q, q_squares = _normalized(original_q, dtype, normalize)
        keys, keys_squares = _normalized(original_keys, dtype, normalize)
        unfilled = None
        if valid is not None:
            unfilled = (torch.arange(keys.shape[1], device=q.device) >= valid)[:, None]
            keys = keys.masked_fill(unfilled, 0)
        excluded = _exclusion(q, query_ids, key_ids, None, in_batch)
        # (highest, inverse_sum, negatives_probability, grad_output) of the queries and, if symmetric, of the keys.
        scales = q.shape[0]
        grad_output = grad_output.to(dtype).expand(scales, q.shape[1])
        states = [[z.reshape(scales, -1) for z in (*direction, grad_output)] for direction in state]

        dq, dkeys = torch.zeros_like(q), torch.zeros_like(keys)
        for rows, columns, scores in _score_blocks(q * inverse_temperature, keys):
            weights, positives = torch.zeros_like(scores), torch.zeros_like(scores)
            blocks = [[z[:, rows, None] for z in states[0]]]
            blocks += [[z[:, None, columns] for z in statistics] for statistics in states[1:]]
            for highest, inverse_sum, negatives_probability, grad in blocks:
                weights += (scores - highest).exp_() * (inverse_sum * grad)
                positives -= negatives_probability * grad
            for mask in excluded(rows, columns):
                weights.masked_fill_(mask, 0)
            if in_batch:
                weights = torch.where(_diagonal(rows, columns, q.device), positives, weights)
            if wrt_q or with_dtemperature:
                dq[:, rows] += weights @ keys[:, columns]
            if wrt_keys:
                dkeys[:, columns] += weights.mT @ q[:, rows]

        dtemperature = None
        scale = inverse_temperature * factor
        if with_dtemperature:
            dtemperature = (dq * q).sum(-1).flatten() * (scale * -inverse_temperature)
        dq = _through_norm(dq * scale, q, q_squares)
        dkeys = _through_norm(dkeys * scale, keys, keys_squares)
        if unfilled is not None:
            dkeys = dkeys.masked_fill(unfilled, 0)
        return (
            dq.view(original_q.shape).to(original_q.dtype) if wrt_q else None,
            dkeys.view(original_keys.shape).to(original_keys.dtype) if wrt_keys else None,
            dtemperature,
        )


def _normalized(x: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Return the rows to compare, [S, rows, D], contiguous, and if normalised their squared norms, [S, rows, 1]."""
    x = (x if x.ndim == 3 else x[None]).to(dtype).contiguous()
    if not normalize:
        return x, None
    squares = x.square().sum(-1, keepdim=True)
    return x / squares.clamp_min(SMALLEST_SQUARE).sqrt(), squares


def _through_norm(gradient: Tensor, direction: Tensor, squares: Tensor | None) -> Tensor:
    """Return the gradient with respect to x, given the one with respect to x/‖x‖."""
    if squares is None:
        return gradient
    projection = (gradient * direction).sum(-1, keepdim=True)
    projection = projection.masked_fill(squares <= SMALLEST_SQUARE, 0)  # the clamped norm is constant
    return (gradient - projection * direction) * squares.clamp_min(SMALLEST_SQUARE).rsqrt()


def _softmax_state(weight: Tensor, positive_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / (sum of all weights) and the softmax probability of all negatives together.

    With the highest score they reproduce the softmax; a log-sum-exp would add its rounding error to the exponents.
    """
    inverse_sum = 1 / (weight + positive_weight)
    return inverse_sum, weight * inverse_sum


Exclusion = Callable[[slice, slice], list[Tensor]]
ScoreBlocks = Iterator[tuple[slice, slice, Tensor]]


def _exclusion(
    x: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, unfilled: Tensor | None, in_batch: bool
) -> Exclusion:
    """Return a function that returns the masks of excluded pairs in a block; bool, broadcast to [rows, columns]."""

    def excluded(rows: slice, columns: slice) -> list[Tensor]:
        masks = []
        if unfilled is not None:
            masks.append(unfilled[columns])
        if x_ids is not None and y_ids is not None:
            ids = x_ids[rows, None]
            masks.append((ids == y_ids[columns]) & (ids != UNKNOWN_ID))
        if in_batch:
            masks.append(_diagonal(rows, columns, x.device))
        return masks

    return excluded


def _sweep(
    score_blocks: ScoreBlocks,
    positive: Tensor,
    excluded: Exclusion,
    fixed: float | None,
    negatives: Tensor | None,
    with_rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sweep over the negatives of each query.

    Returns:
        maximum: highest score [S, B]; `fixed`, an upper bound of it, if given.
        weight: sum of the weights e^{score − maximum}, [S, B].
        total: sum of weight times negative, [S, B, D]; empty without `negatives`.
        rank: number of negatives that score higher than the positive, [S, B]; empty without `with_rank`.
    """
    maximum = torch.full_like(positive, -torch.inf if fixed is None else fixed)
    weight = torch.zeros_like(positive)
    total = positive.new_zeros(0 if negatives is None else (*positive.shape, negatives.shape[-1]))
    rank = positive.new_zeros(positive.shape if with_rank else 0, dtype=torch.int64)
    for rows, columns, scores in score_blocks:
        for mask in excluded(rows, columns):
            scores.masked_fill_(mask, -torch.inf)
        if with_rank:
            rank[:, rows] += (scores > positive[:, rows, None]).sum(-1)
        if fixed is None:
            highest = torch.maximum(maximum[:, rows], scores.amax(-1))
            finite = highest.masked_fill(highest == -torch.inf, 0)  # no negative so far: −∞ − −∞ would be NaN
            shrink = (maximum[:, rows] - finite).exp_()
            weights = scores.sub_(finite[..., None]).exp_()
            maximum[:, rows] = highest
            weight[:, rows] *= shrink
            if negatives is not None:
                total[:, rows] *= shrink[..., None]
        else:
            weights = scores.sub_(fixed).exp_()
        weight[:, rows] += weights.sum(-1)
        if negatives is not None:
            total[:, rows] += weights @ negatives[:, columns]
    return maximum, weight, total, rank


def _merge(maximum: Tensor, weight: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the highest score, the weights of negatives and positive relative to it, and the loss; all [S, B]."""
    highest = torch.maximum(maximum, positive)
    weight, positive_weight = weight * (maximum - highest).exp(), (positive - highest).exp()
    # Above the threshold F.softplus returns x; at 40 the difference is below the resolution of fp64.
    loss = F.softplus(highest + weight.log() - positive, threshold=40)
    return highest, weight, positive_weight, loss


def _diagonal(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Mask of the pairs with equal indices, bool [rows, columns]."""
    return torch.arange(rows.start, rows.stop, device=device)[:, None] == torch.arange(
        columns.start, columns.stop, device=device
    )


def _score_blocks(scaled: Tensor, k: Tensor, wrt_keys: bool = False) -> ScoreBlocks:
    """Yield the rows, columns and scores of blocks of queries × keys; of keys × queries with wrt_keys."""
    scales, queries, _ = scaled.shape
    height = min(queries, BLOCK_ROWS)
    width = max(1, BLOCK_SCORES.get(scaled.device.type, BLOCK_SCORES["cpu"]) // max(scales * height, 1))
    for first in range(0, queries, BLOCK_ROWS):
        rows = slice(first, min(first + height, queries))
        for column in range(0, k.shape[1], width):
            columns = slice(column, min(column + width, k.shape[1]))
            scores = scaled[:, rows] @ k[:, columns].mT
            yield (columns, rows, scores.mT) if wrt_keys else (rows, columns, scores)
