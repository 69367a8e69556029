"""InfoNCE in plain PyTorch, for any device: the scores of a block of pairs at a time, never those of all.

The same two computations as in `dcvae_kernels.triton.info_nce`, by the same mathematics. Every sweep multiplies
queries, scaled by 1/τ, by keys in the same blocks: the scores of the backward pass must be those of the forward pass to
the last bit, for at low temperatures their rounding errors are no longer small.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dcvae_kernels.arguments import Inputs, Settings, loss_weight
from dcvae_kernels.reference import SMALLEST_SQUARE, UNKNOWN_ID, accumulate_dtype, without_autocast

# Scores of a block: 2 MiB in float32, which a CPU's cache holds; a GPU needs more to be busy.
BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**24}
BLOCK_ROWS = 1024
# With scores in ±1/τ a fixed maximum of 1/τ keeps every weight above e^{−2/τ}: far from underflow below this.
FIXED_MAXIMUM_BELOW = 60.0


def forward(
    inputs: Inputs, settings: Settings, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `dcvae_kernels.info_nce_autograd.forward`."""
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    tau, normalize, symmetric, reduction, _ = settings
    with_dq, with_dk, with_dtemperature, with_state, with_rank = wanted
    dtype = accumulate_dtype(q, k, queue)
    shape = q.shape
    dq, dk, dtemperature, state = (q.new_empty(0, dtype=dtype) for _ in range(4))
    with without_autocast(q.device):
        inverse_temperature = 1 / tau if temperature is None else temperature.to(dtype).reciprocal()
        q, q_squares = _normalized(q, dtype, normalize)
        k, k_squares = _normalized(k, dtype, normalize)
        negatives = k if queue is None else _normalized(queue, dtype, normalize)[0]
        unfilled = None
        if valid is not None:
            unfilled = torch.arange(negatives.shape[1], device=q.device) >= valid
            negatives = negatives.masked_fill(unfilled[:, None], 0)  # such a slot may hold anything, even NaN
        scaled = q * inverse_temperature
        positive = (scaled * k).sum(-1)

        fixed = 1 / tau if normalize and temperature is None and 2 / tau < FIXED_MAXIMUM_BELOW else None
        gradient = with_dq or with_dtemperature
        excluded = _exclusion(q, query_ids, negative_ids, unfilled, in_batch=queue is None)
        blocks = _score_blocks(scaled, negatives)
        maximum, weight, total, rank = _sweep(
            blocks, positive, excluded, fixed, negatives if gradient else None, with_rank
        )
        highest, weight, positive_weight, loss = _merge(maximum, weight, positive)
        if gradient:
            total *= (maximum - highest).exp()[..., None]
        states = [highest, *_shares(weight, positive_weight)]
        if symmetric:
            excluded = _exclusion(q, negative_ids, query_ids, None, in_batch=True)
            mirror = _sweep(_score_blocks(scaled, k, wrt_keys=True), positive, excluded, fixed, None, False)
            mirror_highest, *mirror_weights, mirrored = _merge(mirror[0], mirror[1], positive)
            states += [mirror_highest, *_shares(*mirror_weights)]
            loss = (loss + mirrored) / 2
        # A score of −∞ would pass for a negative that is far away, and a positive of ∞ for a perfect one.
        loss = loss + 0 * (positive + negatives.sum((1, 2))[:, None])

        factor = loss_weight(reduction, loss.numel())
        slope = inverse_temperature * factor
        if gradient:
            # Weights of negatives and positive add up to 0, so nothing cancels where the loss is small.
            pull = (total - weight[..., None] * k) * (states[1] * slope)[..., None]
            if with_dtemperature:
                dtemperature = ((pull * q).sum(-1) * -inverse_temperature).view(shape[:-1])
            if with_dq:
                dq = _through_norm(pull, q, q_squares).view(shape)
        if with_dk:
            dk = _through_norm(q * (states[2] * -slope)[..., None], k, k_squares).view(shape)
        if with_state:
            state = torch.stack(states).view(1 + symmetric, 3, positive.numel())
        loss = loss.view(shape[:-1]) if reduction == "none" else loss.sum() * factor
        return loss, rank.view(shape[:-1]) if with_rank else rank, dq, dk, dtemperature, state


def backward_sweep(
    inputs: Inputs, settings: Settings, grad_output: Tensor, state: Tensor, wrt_keys: bool, with_dtemperature: bool
) -> tuple[Tensor, Tensor]:
    """See `dcvae_kernels.info_nce_autograd.backward_sweep`."""
    q, temperature, k, queue, valid, query_ids, key_ids = inputs
    tau, normalize, symmetric, reduction, _ = settings
    in_batch = queue is None
    k = k if in_batch else queue
    factor = loss_weight(reduction, state.shape[-1]) / (2 if symmetric else 1)
    dtype = accumulate_dtype(q, k)
    wanted = k if wrt_keys else q
    with without_autocast(q.device):
        inverse_temperature = 1 / tau if temperature is None else temperature.to(dtype).reciprocal()
        q, q_squares = _normalized(q, dtype, normalize)
        k, k_squares = _normalized(k, dtype, normalize)
        if valid is not None:
            unfilled = (torch.arange(k.shape[1], device=k.device) >= valid)[:, None]
            k = k.masked_fill(unfilled, 0)
        x, x_squares, x_ids, y, y_ids = (k, k_squares, key_ids, q, query_ids)
        if not wrt_keys:
            x, x_squares, x_ids, y, y_ids = (q, q_squares, query_ids, k, key_ids)
        excluded = _exclusion(x, x_ids, y_ids, None, in_batch)
        # State and grad_output of each row: a query of the loss, or a key of the symmetric loss.
        scales = q.shape[0]
        grad_output = grad_output.to(dtype).expand(scales, q.shape[1])
        of_queries, *of_mirror = [[z.reshape(scales, -1) for z in (*direction, grad_output)] for direction in state]

        pull = torch.zeros_like(x)
        for rows, columns, scores in _score_blocks(q * inverse_temperature, k, wrt_keys):
            weights, positives = torch.zeros_like(scores), torch.zeros_like(scores)
            along_rows, along_columns = (of_mirror, [of_queries]) if wrt_keys else ([of_queries], of_mirror)
            terms = [[z[:, rows, None] for z in side] for side in along_rows]
            terms += [[z[:, None, columns] for z in side] for side in along_columns]
            for highest, share, negatives_share, arriving in terms:
                weights += (scores - highest).exp_() * (share * arriving)
                positives -= negatives_share * arriving
            for mask in excluded(rows, columns):
                weights.masked_fill_(mask, 0)
            if in_batch:
                weights = torch.where(_same(rows, columns, x.device), positives, weights)
            pull[:, rows] += weights @ y[:, columns]

        pull *= inverse_temperature * factor
        dtemperature = (pull * x).sum(-1).flatten() * -inverse_temperature if with_dtemperature else pull.new_empty(0)
        dx = _through_norm(pull, x, x_squares)
        if valid is not None:
            dx = dx.masked_fill(unfilled, 0)
        return dx.view(wanted.shape).to(wanted.dtype), dtemperature


def _normalized(x: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The rows to compare, [S, rows, D], contiguous, and their squared norms [S, rows, 1] if they were normalised."""
    x = (x if x.ndim == 3 else x[None]).to(dtype).contiguous()
    if not normalize:
        return x, None
    squares = x.square().sum(-1, keepdim=True)
    return x / squares.clamp_min(SMALLEST_SQUARE).sqrt(), squares


def _through_norm(gradient: Tensor, direction: Tensor, squares: Tensor | None) -> Tensor:
    """The gradient with respect to x from that with respect to its direction x/‖x‖."""
    if squares is None:
        return gradient
    along = (gradient * direction).sum(-1, keepdim=True)
    along = along.masked_fill(squares <= SMALLEST_SQUARE, 0)  # there the norm is a constant
    return (gradient - along * direction) * squares.clamp_min(SMALLEST_SQUARE).rsqrt()


def _shares(weight: Tensor, positive_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the softmax: what a weight of 1 comes to, and the negatives together. With the highest score, not a
    log-sum-exp, weights can be had again without the rounding error of a large number in the exponent."""
    share = 1 / (weight + positive_weight)
    return share, weight * share


Exclusion = Callable[[slice, slice], list[Tensor]]
ScoreBlocks = Iterator[tuple[slice, slice, Tensor]]


def _exclusion(
    x: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, unfilled: Tensor | None, in_batch: bool
) -> Exclusion:
    """A function that gives masks of the pairs that are no negatives, bool, broadcast to [rows, columns]."""

    def excluded(rows: slice, columns: slice) -> list[Tensor]:
        masks = []
        if unfilled is not None:
            masks.append(unfilled[columns])
        if x_ids is not None and y_ids is not None:
            ids = x_ids[rows, None]
            masks.append((ids == y_ids[columns]) & (ids != UNKNOWN_ID))
        if in_batch:
            masks.append(_same(rows, columns, x.device))
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
    """Of each query's negatives: the highest score [S, B] (or `fixed`, a bound of it), the sum of the weights
    e^{score − highest} [S, B] and, if negatives are given, of weights times these [S, B, D], and how many beat the
    positive."""
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
            finite = highest.masked_fill(highest == -torch.inf, 0)  # no negative yet: −∞ − −∞ is NaN
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
    """The highest score, the weights of the negatives and of the positive relative to it, and the loss; all [S, B]."""
    highest = torch.maximum(maximum, positive)
    weight, positive_weight = weight * (maximum - highest).exp(), (positive - highest).exp()
    # Above the threshold softplus(x) is x; at 40 they differ by less than fp64 resolves.
    loss = F.softplus(highest + weight.log() - positive, threshold=40)
    return highest, weight, positive_weight, loss


def _same(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """bool [rows, columns]: the pairs of a row with itself."""
    return torch.arange(rows.start, rows.stop, device=device)[:, None] == torch.arange(
        columns.start, columns.stop, device=device
    )


def _score_blocks(scaled: Tensor, k: Tensor, wrt_keys: bool = False) -> ScoreBlocks:
    """Blocks of queries × keys: their rows, their columns, their scores; the other way round with wrt_keys."""
    scales, queries, _ = scaled.shape
    height = min(queries, BLOCK_ROWS)
    width = max(1, BLOCK_SCORES.get(scaled.device.type, BLOCK_SCORES["cpu"]) // max(scales * height, 1))
    for first in range(0, queries, BLOCK_ROWS):
        rows = slice(first, min(first + height, queries))
        for column in range(0, k.shape[1], width):
            columns = slice(column, min(column + width, k.shape[1]))
            scores = scaled[:, rows] @ k[:, columns].mT
            yield (columns, rows, scores.mT) if wrt_keys else (rows, columns, scores)
