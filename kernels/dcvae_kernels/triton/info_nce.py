"""InfoNCE in Triton: `forward` and `backward_sweep`, the two computations of `dcvae_kernels.info_nce`.

Similarities q̂·n̂ live in registers only; a weight is e^{(similarity − maximum)/τ}. Rows are normalised by scaling their
products, never by rounding a normalised copy, and in the same way whichever side comes first: the backward pass should
find the similarity of the forward pass, for at low temperatures its rounding error matters. Nothing is added
atomically: programs write partial sums to a workspace, a second kernel adds them in a fixed order.

    forward          sweep_kernel     a program owns queries and sweeps a part of the negatives, as attention with V = K
                     combine_kernel   adds the parts: loss, rank, gradients of the queries, their keys and τ
    backward_sweep   weights_kernel   a program owns rows of one side and sweeps a part of the other
                     project_kernel   adds the parts and passes them through the normalisation
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcvae_kernels import reference
from dcvae_kernels.arguments import Inputs, Settings, loss_weight
from dcvae_kernels.chunked import FIXED_MAXIMUM_BELOW
from dcvae_kernels.triton import on_device

MAX_SPLITS = 64  # a power of 2, so that combine can take all at once
# Kernels are compiled as tested: whether a·b + c may be one instruction is no default to rely on.
LAUNCH = {"enable_fp_fusion": True}

# A batch of another size needs no other program, which would have to be compiled in the midst of training.
SIZES = ["B", "K", "X", "Y", "part", "rows", "splits"]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
UNKNOWN_ID = tl.constexpr(reference.UNKNOWN_ID)
SMALLEST_SQUARE = tl.constexpr(reference.SMALLEST_SQUARE)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# Device code. Matrices are [rows, D] with unit stride along D; a name's `_stride` is between rows, `_scale_stride`
# between scales. ------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(x, rows, present, features, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[rows, features] in its own dtype; 0 for absent rows and beyond D."""
    mask = present[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (features < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + features[None, :], mask=mask, other=0.0)


@triton.jit
def _inverse_norm(squares, NORMALIZE: tl.constexpr):
    """1/‖x‖ from ‖x‖², with ‖x‖ at least 1e-12, or 1."""
    if NORMALIZE:
        inverse = 1.0 / tl.sqrt(tl.maximum(squares, SMALLEST_SQUARE))
    else:
        inverse = tl.full(squares.shape, 1.0, tl.float32)
    return inverse


@triton.jit
def _inverse_temperature(temperature, inverse_temperature):
    """1/τ of the tensor if there is one, else the number."""
    if temperature is not None:
        inverse_temperature = 1.0 / tl.load(temperature).to(tl.float32)
    return inverse_temperature


@triton.jit
def _log1p(x):
    """ln(1 + x) for 0 ≤ x ≤ 1 to fp32's precision, which the GPU's approximate logarithm lacks near 1."""
    z = x / (2.0 + x)  # ln(1 + x) = 2 artanh(z), z ≤ 1/3
    z2 = z * z
    series = 1.0 / 15 + z2 * (1.0 / 17)
    series = 1.0 / 13 + z2 * series
    series = 1.0 / 11 + z2 * series
    series = 1.0 / 9 + z2 * series
    series = 1.0 / 7 + z2 * series
    series = 1.0 / 5 + z2 * series
    series = 1.0 / 3 + z2 * series
    return 2.0 * z * (1.0 + z2 * series)


@triton.jit
def _softplus(x):
    softplus = tl.maximum(x, 0.0) + _log1p(tl.exp2(-tl.abs(x) * LOG2E))
    return tl.where(x == x, softplus, x)  # maximum drops a NaN


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _similarities(
    x, xs, x_present, x_stride, x_tile, x_inverse, y, ys, y_present, y_stride,
    D: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x̂·ŷ [BLOCK_X, BLOCK_Y], the last tile of y that was read, and 1/‖y‖."""
    if D <= BLOCK_D:
        y_tile = _load_rows(y, ys, y_present, tl.arange(0, BLOCK_D), y_stride, D, BLOCK_D)
        products = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        products = _dot(x_tile.to(DOT), tl.trans(y_tile.to(DOT)), products, PRECISION)
        squares = tl.sum(y_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    else:
        y_tile = tl.zeros((BLOCK_Y, BLOCK_D), y.dtype.element_ty)
        products = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        squares = tl.zeros((BLOCK_Y,), tl.float32)
        for first in range(0, D, BLOCK_D):
            features = first + tl.arange(0, BLOCK_D)
            x_part = _load_rows(x, xs, x_present, features, x_stride, D, BLOCK_D)
            y_tile = _load_rows(y, ys, y_present, features, y_stride, D, BLOCK_D)
            products = _dot(x_part.to(DOT), tl.trans(y_tile.to(DOT)), products, PRECISION)
            squares += tl.sum(y_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    y_inverse = _inverse_norm(squares, NORMALIZE)
    if NORMALIZE:
        products = products * (x_inverse[:, None] * y_inverse[None, :])
    else:
        products = products + 0.0 * products  # −∞ would pass for a negative that is far away; ∞ − ∞ is NaN
    return products, y_tile, y_inverse


@triton.jit
def _weighted_sum(weights, y_tile, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """total + weights·y. float16's range is too small for weights, but its rows are exact in tf32."""
    if DOT == tl.bfloat16:
        total = _dot(weights.to(tl.bfloat16), y_tile, total, PRECISION)
    elif DOT == tl.float16:
        total = _dot(weights, y_tile.to(tl.float32), total, "tf32")
    else:
        total = _dot(weights, y_tile.to(tl.float32), total, PRECISION)
    return total


@triton.jit
def _excluded(xs, ys, x_ids, y_ids, x_present, y_present, IN_BATCH: tl.constexpr):
    """[xs, ys]: the pairs that are no negatives: those beyond the ends, positives, and images met again."""
    excluded = tl.broadcast_to((~y_present)[None, :], (xs.shape[0], ys.shape[0]))
    if IN_BATCH:
        excluded = excluded | (xs[:, None] == ys[None, :])
    if x_ids is not None:
        x_id = tl.load(x_ids + xs, mask=x_present, other=UNKNOWN_ID)
        y_id = tl.load(y_ids + ys, mask=y_present, other=UNKNOWN_ID)
        excluded = excluded | ((x_id[:, None] == y_id[None, :]) & (x_id != UNKNOWN_ID)[:, None])
    return excluded


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    q, k, negatives, query_ids, negative_ids, valid, temperature, workspace,
    q_scale_stride, q_stride, k_scale_stride, k_stride, negatives_scale_stride, negatives_stride,
    B, K, part, inverse_temperature,
    D: tl.constexpr, NORMALIZE: tl.constexpr, IN_BATCH: tl.constexpr, FIXED: tl.constexpr, GRADIENT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of BLOCK_B queries over `part` negatives, and the similarities of their positives.

    Programs: (blocks of queries × parts of D, parts of the negatives, scales). Only the sum for the gradient, Σ p·n, is
    split along D, where it would not fit into registers. Workspace: see `_partials`.
    """
    PARTS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part_d = tl.program_id(0) % PARTS_D
    split = tl.program_id(1)
    scale = tl.program_id(2)
    rows = tl.num_programs(2) * B
    q += scale.to(tl.int64) * q_scale_stride
    k += scale.to(tl.int64) * k_scale_stride
    negatives += scale.to(tl.int64) * negatives_scale_stride
    to_log2 = _inverse_temperature(temperature, inverse_temperature) * LOG2E

    queries = tl.program_id(0) // PARTS_D * BLOCK_B + tl.arange(0, BLOCK_B)
    present = queries < B
    squares = tl.zeros((BLOCK_B,), tl.float32)
    k_squares = tl.zeros((BLOCK_B,), tl.float32)
    positive = tl.zeros((BLOCK_B,), tl.float32)
    q_tile = tl.zeros((BLOCK_B, BLOCK_D), q.dtype.element_ty)
    for first in range(0, D, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        q_tile = _load_rows(q, queries, present, features, q_stride, D, BLOCK_D)
        k_tile = _load_rows(k, queries, present, features, k_stride, D, BLOCK_D).to(tl.float32)
        squares += tl.sum(q_tile.to(tl.float32) * q_tile.to(tl.float32), 1)
        k_squares += tl.sum(k_tile * k_tile, 1)
        positive += tl.sum(q_tile.to(tl.float32) * k_tile, 1)
    q_inverse = _inverse_norm(squares, NORMALIZE)
    positive = positive * (q_inverse * _inverse_norm(k_squares, NORMALIZE))

    if FIXED:
        maximum = tl.full((BLOCK_B,), 1.0, tl.float32)
    else:
        maximum = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_B,), tl.float32)
    better = tl.zeros((BLOCK_B,), tl.int32)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    end = tl.minimum((split + 1) * part, K)
    if valid is not None:
        end = tl.minimum(end, tl.load(valid).to(tl.int64)).to(tl.int32)
    for first in range(split * part, end, BLOCK_K):
        slots = first + tl.arange(0, BLOCK_K)
        filled = slots < end
        similarity, tile, inverse = _similarities(
            q, queries, present, q_stride, q_tile, q_inverse, negatives, slots, filled, negatives_stride,
            D, NORMALIZE, DOT, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        excluded = _excluded(queries, slots, query_ids, negative_ids, present, filled, IN_BATCH)
        similarity = tl.where(excluded & (similarity == similarity), -float("inf"), similarity)  # a NaN stays in sight
        better += tl.sum((similarity > positive[:, None]).to(tl.int32), 1)
        if FIXED:
            weights = tl.exp2((similarity - 1.0) * to_log2)
        else:
            higher = tl.maximum(maximum, tl.max(similarity, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)  # no negative yet: −∞ − −∞ is NaN
            shrink = tl.exp2((maximum - finite) * to_log2)
            weights = tl.exp2((similarity - finite[:, None]) * to_log2)
            weight = weight * shrink
            total = total * shrink[:, None]
            maximum = higher
        weight += tl.sum(weights, 1)
        if GRADIENT:
            if PARTS_D > 1:
                features = part_d * BLOCK_D + tl.arange(0, BLOCK_D)
                tile = _load_rows(negatives, slots, filled, features, negatives_stride, D, BLOCK_D)
            total = _weighted_sum(weights * inverse[None, :], tile, total, DOT, PRECISION)

    row = scale * B + queries
    splits = tl.num_programs(1)
    partials = _partials(workspace, splits, rows, D, GRADIENT)
    if part_d == 0:
        tl.store(partials + split * rows + row, maximum, mask=present)
        tl.store(partials + (splits + split) * rows + row, weight, mask=present)
        tl.store(partials + (2 * splits + split) * rows + row, better.to(tl.float32), mask=present)
        if split == 0:
            tl.store(partials + 3 * splits * rows + row, positive, mask=present)
    if GRADIENT:
        features = part_d * BLOCK_D + tl.arange(0, BLOCK_D)
        to = workspace + (split * rows + row).to(tl.int64)[:, None] * D + features[None, :]
        tl.store(to, total, mask=present[:, None] & (features < D)[None, :])


@triton.jit
def _partials(workspace, splits, rows, D: tl.constexpr, GRADIENT: tl.constexpr):
    """Where the per-row sums begin in a workspace of [splits, rows, D] partial gradients (if GRADIENT), then
    [splits, rows] maxima, [splits, rows] weights, [splits, rows] counts of better negatives, and [rows] positives."""
    if GRADIENT:
        workspace += (splits * rows).to(tl.int64) * D
    return workspace


@triton.jit
def _merge(partials, row, present, splits, rows, to_log2, BLOCK_SPLITS: tl.constexpr):
    """Of each row: the maximum that weights are relative to, the weights of negatives and of the positive, the loss.

    All splits at once, as far as possible: one after the other, the wait for memory would take longer than the sweep.
    """
    positive = tl.load(partials + 3 * splits * rows + row, mask=present, other=0.0)
    maximum = positive
    for first in range(0, splits, BLOCK_SPLITS):
        at, mask = _of_splits(first, row, present, splits, rows, BLOCK_SPLITS)
        maximum = tl.maximum(maximum, tl.max(tl.load(partials + at, mask=mask, other=-float("inf")), 0))
    weight = tl.zeros_like(positive)
    for first in range(0, splits, BLOCK_SPLITS):
        at, mask = _of_splits(first, row, present, splits, rows, BLOCK_SPLITS)
        shrink = tl.exp2((tl.load(partials + at, mask=mask, other=-float("inf")) - maximum[None, :]) * to_log2)
        weight += tl.sum(shrink * tl.load(partials + splits * rows + at, mask=mask, other=0.0), 0)
    loss = _softplus(((maximum - positive) * to_log2 + tl.log2(weight)) * LN2)
    return maximum, weight, tl.exp2((positive - maximum) * to_log2), loss


@triton.jit
def _of_splits(first, row, present, splits, rows, BLOCK_SPLITS: tl.constexpr):
    """Where the values of these rows are in BLOCK_SPLITS splits, [BLOCK_SPLITS, rows], and which of them there are."""
    split = first + tl.arange(0, BLOCK_SPLITS)
    return split[:, None] * rows + row[None, :], (split < splits)[:, None] & present[None, :]


@triton.jit
def _sum_of_losses(partials, mirror, splits, rows, to_log2, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        present = row < rows
        _, _, _, loss = _merge(partials, row, present, splits, rows, to_log2, BLOCK_SPLITS)
        if mirror is not None:
            _, _, _, mirrored = _merge(mirror, row, present, splits, rows, to_log2, BLOCK_SPLITS)
            loss = (loss + mirrored) * 0.5
        total += tl.where(present, loss, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_of_gradients(
    workspace, partials, maximum, row, present, features, splits, rows, to_log2, D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum over splits of [rows, D] partial gradients; with partials, of those relative to their maxima."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        at, mask = _of_splits(first, row, present, splits, rows, BLOCK_SPLITS)
        to = workspace + at.to(tl.int64)[:, :, None] * D + features[None, None, :]
        parts = tl.load(to, mask=mask[:, :, None] & (features < D)[None, None, :], other=0.0)
        if partials is not None:
            of_split = tl.load(partials + at, mask=mask, other=-float("inf"))
            parts *= tl.exp2((of_split - maximum[None, :]) * to_log2)[:, :, None]
        total += tl.sum(parts, 0)
    return total


@triton.jit
def _store_state(state, row, present, rows, maximum, share, negatives):
    tl.store(state + row, maximum, mask=present)
    tl.store(state + rows + row, share, mask=present)
    tl.store(state + 2 * rows + row, negatives, mask=present)


@triton.jit
def _load_state(state, grad_output, rows, row, present):
    """Return the maximum, and the weights of 1 and of all negatives, each times grad_output."""
    maximum = tl.load(state + row, mask=present, other=0.0)
    share = tl.load(state + rows + row, mask=present, other=0.0)
    negatives = tl.load(state + 2 * rows + row, mask=present, other=0.0)
    arriving = tl.load(grad_output, mask=present, other=0.0).to(tl.float32)
    return maximum, share * arriving, negatives * arriving


@triton.jit
def _through_norm(gradient, x, squares, NORMALIZE: tl.constexpr):
    """The gradient with respect to x from that with respect to x/‖x‖, [rows, D]."""
    if NORMALIZE:
        inverse = _inverse_norm(squares, NORMALIZE)
        direction = x * inverse[:, None]
        along = tl.where(squares > SMALLEST_SQUARE, tl.sum(gradient * direction, 1), 0.0)  # else the norm is constant
        gradient = (gradient - along[:, None] * direction) * inverse[:, None]
    return gradient


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    q, k, workspace, mirror, temperature, loss, rank, dq, dk, dtemperature, state,
    q_scale_stride, q_stride, k_scale_stride, k_stride,
    B, rows, splits, inverse_temperature, factor,
    D: tl.constexpr, NORMALIZE: tl.constexpr, GRADIENT: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Adds what the sweep left, for rows [scales × B] at once; with REDUCE the last program adds the losses.

    mirror: the workspace of the other direction, of a symmetric loss. state: [directions, 3, rows], for the gradient of
    the keys: the maximum, and, of the softmax, what a weight of 1 relative to that comes to and the negatives together.
    A log-sum-exp instead would put the rounding error of a large number into exponents.
    """
    partials = _partials(workspace, splits, rows, D, GRADIENT)
    inverse_temperature = _inverse_temperature(temperature, inverse_temperature)
    to_log2 = inverse_temperature * LOG2E
    if REDUCE and tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(loss, factor * _sum_of_losses(partials, mirror, splits, rows, to_log2, BLOCK_SUM, BLOCK_SPLITS))
    else:
        row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        present = row < rows
        maximum, weight, positive_weight, losses = _merge(partials, row, present, splits, rows, to_log2, BLOCK_SPLITS)
        share = 1.0 / (weight + positive_weight)
        if state is not None:
            _store_state(state, row, present, rows, maximum, share, weight * share)
        if mirror is not None:
            mirror_maximum, mirror_weight, positive_weight, mirrored = _merge(
                mirror, row, present, splits, rows, to_log2, BLOCK_SPLITS
            )
            if state is not None:
                mirror_share = 1.0 / (mirror_weight + positive_weight)
                _store_state(
                    state + 3 * rows, row, present, rows, mirror_maximum, mirror_share, mirror_weight * mirror_share
                )
            losses = (losses + mirrored) * 0.5
        if not REDUCE:
            tl.store(loss + row, losses, mask=present)
        if rank is not None:
            better = tl.zeros_like(weight)
            for first in range(0, splits, BLOCK_SPLITS):
                at, mask = _of_splits(first, row, present, splits, rows, BLOCK_SPLITS)
                better += tl.sum(tl.load(partials + 2 * splits * rows + at, mask=mask, other=0.0), 0)
            tl.store(rank + row, better.to(tl.int64), mask=present)

        if GRADIENT or dk is not None:
            features = tl.arange(0, BLOCK_D)
            q_row = (row // B).to(tl.int64) * q_scale_stride + (row % B).to(tl.int64) * q_stride
            k_row = (row // B).to(tl.int64) * k_scale_stride + (row % B).to(tl.int64) * k_stride
            q_tile = _load_rows(q, q_row, present, features, 1, D, BLOCK_D).to(tl.float32)
            k_tile = _load_rows(k, k_row, present, features, 1, D, BLOCK_D).to(tl.float32)
            q_squares = tl.sum(q_tile * q_tile, 1)
            k_squares = tl.sum(k_tile * k_tile, 1)
            q_direction = q_tile * _inverse_norm(q_squares, NORMALIZE)[:, None]
            to = row.to(tl.int64)[:, None] * D + features[None, :]
            mask = present[:, None] & (features < D)[None, :]
            if GRADIENT:
                total = _sum_of_gradients(
                    workspace, partials, maximum, row, present, features, splits, rows, to_log2, D,
                    BLOCK_SPLITS, BLOCK_B, BLOCK_D,
                )  # fmt: skip
                k_direction = k_tile * _inverse_norm(k_squares, NORMALIZE)[:, None]
                # Weights of negatives and positive add up to 0, so nothing cancels where the loss is small.
                gradient = total - weight[:, None] * k_direction
                gradient *= (share * inverse_temperature * factor)[:, None]
                if dtemperature is not None:
                    slope = -tl.sum(gradient * q_direction, 1) * inverse_temperature
                    tl.store(dtemperature + row, slope, mask=present)
                if dq is not None:
                    tl.store(dq + to, _through_norm(gradient, q_tile, q_squares, NORMALIZE), mask=mask)
            if dk is not None:
                gradient = (-weight * share * inverse_temperature * factor)[:, None] * q_direction
                tl.store(dk + to, _through_norm(gradient, k_tile, k_squares, NORMALIZE), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    x, y, x_ids, y_ids, valid, temperature, grad_output, x_state, y_state, workspace,
    x_scale_stride, x_stride, y_scale_stride, y_stride, grad_output_scale_stride, grad_output_stride,
    X, Y, part, inverse_temperature,
    D: tl.constexpr, NORMALIZE: tl.constexpr, IN_BATCH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums Σ_y weight(x, y)·ŷ of BLOCK_X rows x over `part` rows y: what pulls at x̂, times τ.

    With x_state, x are queries of the loss and y their keys; with y_state, the other way round; with both, symmetric.
    grad_output: the gradient that arrives at the queries' losses. Workspace [splits, scales × X, D].
    """
    PARTS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part_d = tl.program_id(0) % PARTS_D
    split = tl.program_id(1)
    scale = tl.program_id(2)
    x += scale.to(tl.int64) * x_scale_stride
    y += scale.to(tl.int64) * y_scale_stride
    grad_output += scale.to(tl.int64) * grad_output_scale_stride
    to_log2 = _inverse_temperature(temperature, inverse_temperature) * LOG2E

    xs = tl.program_id(0) // PARTS_D * BLOCK_X + tl.arange(0, BLOCK_X)
    x_present = xs < X
    if valid is not None:
        x_present = x_present & (xs < tl.load(valid))
    squares = tl.zeros((BLOCK_X,), tl.float32)
    x_tile = tl.zeros((BLOCK_X, BLOCK_D), x.dtype.element_ty)
    for first in range(0, D, BLOCK_D):
        x_tile = _load_rows(x, xs, x_present, first + tl.arange(0, BLOCK_D), x_stride, D, BLOCK_D)
        squares += tl.sum(x_tile.to(tl.float32) * x_tile.to(tl.float32), 1)
    x_inverse = _inverse_norm(squares, NORMALIZE)
    if x_state is not None:
        x_maximum, x_share, x_negatives = _load_state(
            x_state + scale * X,
            grad_output + xs.to(tl.int64) * grad_output_stride,
            tl.num_programs(2) * X,
            xs,
            x_present,
        )

    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    end = tl.minimum((split + 1) * part, Y)
    for first in range(split * part, end, BLOCK_Y):
        ys = first + tl.arange(0, BLOCK_Y)
        y_present = ys < end
        similarity, tile, inverse = _similarities(
            x, xs, x_present, x_stride, x_tile, x_inverse, y, ys, y_present, y_stride,
            D, NORMALIZE, DOT, PRECISION, BLOCK_X, BLOCK_Y, BLOCK_D,
        )  # fmt: skip
        weights = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        positives = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        if x_state is not None:
            weights += x_share[:, None] * tl.exp2((similarity - x_maximum[:, None]) * to_log2)
            positives += x_negatives[:, None]
        if y_state is not None:
            y_maximum, y_share, y_negatives = _load_state(
                y_state + scale * Y,
                grad_output + ys.to(tl.int64) * grad_output_stride,
                tl.num_programs(2) * Y,
                ys,
                y_present,
            )
            weights += y_share[None, :] * tl.exp2((similarity - y_maximum[None, :]) * to_log2)
            positives += y_negatives[None, :]
        weights = tl.where(_excluded(xs, ys, x_ids, y_ids, x_present, y_present, IN_BATCH), 0.0, weights)
        if IN_BATCH:
            weights = tl.where((xs[:, None] == ys[None, :]) & y_present[None, :], -positives, weights)
        if PARTS_D > 1:
            tile = _load_rows(y, ys, y_present, part_d * BLOCK_D + tl.arange(0, BLOCK_D), y_stride, D, BLOCK_D)
        total = _weighted_sum(weights * inverse[None, :], tile, total, DOT, PRECISION)

    features = part_d * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (split * tl.num_programs(2) + scale) * X + xs
    to = workspace + row.to(tl.int64)[:, None] * D + features[None, :]
    tl.store(to, total, mask=(xs < X)[:, None] & (features < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def project_kernel(
    x, workspace, valid, temperature, dx, dtemperature,
    x_scale_stride, x_stride, X, rows, splits, inverse_temperature, factor,
    D: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of rows [scales × X] and passes them through the normalisation: dx, and the slope in τ."""
    row = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    present = row < rows
    read = present
    if valid is not None:
        read = read & (row % X < tl.load(valid))
    features = tl.arange(0, BLOCK_D)
    inverse_temperature = _inverse_temperature(temperature, inverse_temperature)
    x_row = (row // X).to(tl.int64) * x_scale_stride + (row % X).to(tl.int64) * x_stride
    x_tile = _load_rows(x, x_row, read, features, 1, D, BLOCK_D).to(tl.float32)
    to = row.to(tl.int64)[:, None] * D + features[None, :]
    mask = present[:, None] & (features < D)[None, :]
    gradient = _sum_of_gradients(
        workspace, None, None, row, present, features, splits, rows, 1.0, D, BLOCK_SPLITS, BLOCK_X, BLOCK_D
    )
    gradient *= inverse_temperature * factor
    squares = tl.sum(x_tile * x_tile, 1)
    if dtemperature is not None:
        slope = tl.sum(gradient * x_tile, 1) * _inverse_norm(squares, NORMALIZE)
        tl.store(dtemperature + row, -slope * inverse_temperature, mask=present)
    gradient = tl.where(read[:, None], _through_norm(gradient, x_tile, squares, NORMALIZE), 0.0)
    tl.store(dx + to, gradient, mask=mask)


# Launches -------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Sizes of a program of `sweep_kernel` or `weights_kernel`: rows it owns, rows it reads at a time, features."""

    own: int
    other: int
    features: int
    warps: int
    stages: int
    precision: str


def tiles(dim: int, dtype: torch.dtype, rows: int) -> Tiles:
    """The sizes for D = dim, operands of that dtype and so many queries; chosen from what the compiler reports.

    None spills registers on sm_80, sm_90 or sm_100 for D ≤ 64 (float32) or D ≤ 256 (bfloat16). Above 2048 rows float32
    products are made of three tf32 ones (as exact, and on tensor cores); below, the launch is too short to gain by it.
    """
    features = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32 and rows <= 2048:
        return Tiles(64, 32, min(features, 128), 8, 2, "ieee")
    if dtype == torch.float32:
        other, warps = {16: (64, 4), 64: (16, 8)}.get(features, (32, 8))
        return Tiles(64, other, min(features, 64), warps, 2, "tf32x3")
    if features > 128 or dtype == torch.float16:
        return Tiles(64, 32, min(features, 256), 8, 2, "ieee")
    return Tiles(64, 64, features, 8 if features == 128 else 4, 3, "ieee")


class Blocks(NamedTuple):
    """Sizes of a program of `combine_kernel` or `project_kernel`."""

    rows: int
    features: int
    splits: int
    losses: int


def blocks(dim: int, splits: int) -> Blocks:
    """The sizes for rows of D = dim that come in so many splits: 1024 elements, and 8192 parts of losses."""
    features = triton.next_power_of_2(dim)
    enough = next(count for count in (1, 8, MAX_SPLITS) if count >= splits)
    at_once = min(enough, max(1, 1024 // features))
    rows = max(1, min(16, 1024 // (features * at_once)))
    return Blocks(rows, features, at_once, min(1024, 8192 // at_once))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _splits(own: int, other: int, scales: int, size: Tiles, dim: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts the other rows are split so that every multiprocessor has work, and the rows of a part."""
    programs = triton.cdiv(own, size.own) * triton.cdiv(dim, size.features) * scales
    steps = triton.cdiv(other, size.other)
    splits = max(1, min(MAX_SPLITS, steps, 2 * _multiprocessors(device) // programs))
    part = triton.cdiv(steps, splits) * size.other
    return max(1, triton.cdiv(other, part)) if part else 1, part


def _rows_by_features(x: Tensor) -> Tensor:
    """x as [S, rows, D] with unit stride along D; copied only where it has another."""
    x = x if x.ndim == 3 else x[None]
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _operand_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == y.dtype else torch.float32


TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def forward(
    inputs: Inputs, settings: Settings, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `dcvae_kernels.info_nce_autograd.forward`."""
    with_dq, with_dk, with_dtemperature, with_state, with_rank = wanted
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    tau, normalize, symmetric, reduction, _ = settings
    shape = q.shape[:-1]
    q, k = _rows_by_features(q), _rows_by_features(k)
    scales, batch, dim = q.shape
    rows = scales * batch
    reduce = reduction != "none"
    gradient = with_dq or with_dtemperature

    def new(wanted: bool, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty(size if wanted else (0,), dtype=dtype)

    loss = q.new_empty(() if reduce else shape, dtype=torch.float32)
    rank = new(with_rank, *shape, dtype=torch.int64)
    dq = new(with_dq, *shape, dim)
    dk = new(with_dk, *shape, dim)
    dtemperature = new(with_dtemperature, *shape)
    state = new(with_state, 2 if symmetric else 1, 3, rows)

    def given(x: Tensor) -> Tensor | None:
        return x if x.numel() else None

    queue = None if queue is None else _rows_by_features(queue)
    query_ids, negative_ids = _contiguous(query_ids), _contiguous(negative_ids)
    inputs = Inputs(q, temperature, k, queue, valid, query_ids, negative_ids)
    mirror = None
    with on_device(q.device):
        workspace, splits = _sweep(inputs, settings, gradient)
        if symmetric:
            mirrored = inputs._replace(q=k, k=q, query_ids=negative_ids, negative_ids=query_ids)
            mirror, _ = _sweep(mirrored, settings, gradient)
        size = blocks(dim, splits)
        combine_kernel[(triton.cdiv(rows, size.rows) + reduce,)](
            q, k, workspace, mirror, temperature,
            loss, given(rank), given(dq), given(dk), given(dtemperature), given(state),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            batch, rows, splits, 1 / tau, loss_weight(reduction, rows),
            D=dim, NORMALIZE=normalize, GRADIENT=gradient, REDUCE=reduce,
            BLOCK_B=size.rows, BLOCK_D=size.features, BLOCK_SPLITS=size.splits, BLOCK_SUM=size.losses,
            num_warps=8, **LAUNCH,
        )  # fmt: skip
    return loss, rank, dq, dk, dtemperature, state


def _sweep(inputs: Inputs, settings: Settings, gradient: bool) -> tuple[Tensor, int]:
    """A workspace of partial sums, and into how many parts the negatives were split."""
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    tau, normalize = settings.tau, settings.normalize
    negatives = k if queue is None else queue
    scales, batch, dim = q.shape
    count = negatives.shape[1]
    dtype = _operand_dtype(q, negatives)
    size = tiles(dim, dtype, scales * batch)
    splits, part = _splits(batch, count, scales, size, dim, q.device)
    rows = scales * batch
    workspace = q.new_empty(splits * rows * (3 + dim * gradient) + rows, dtype=torch.float32)
    grid = (triton.cdiv(batch, size.own) * triton.cdiv(dim, size.features), splits, scales)
    sweep_kernel[grid](
        q, k, negatives, query_ids, negative_ids, valid, temperature, workspace,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), negatives.stride(0), negatives.stride(1),
        batch, count, part, 1 / tau,
        D=dim, NORMALIZE=normalize, IN_BATCH=queue is None,
        FIXED=normalize and temperature is None and 2 / tau < FIXED_MAXIMUM_BELOW, GRADIENT=gradient,
        DOT=TRITON_DTYPES[dtype], PRECISION=size.precision,
        BLOCK_B=size.own, BLOCK_K=size.other, BLOCK_D=size.features,
        num_warps=size.warps, num_stages=size.stages, **LAUNCH,
    )  # fmt: skip
    return workspace, splits


def backward_sweep(
    inputs: Inputs, settings: Settings, grad_output: Tensor, state: Tensor, wrt_keys: bool, with_dtemperature: bool
) -> tuple[Tensor, Tensor]:
    """See `dcvae_kernels.info_nce_autograd.backward_sweep`."""
    q, temperature, k, queue, valid, query_ids, key_ids = inputs
    tau, normalize, symmetric, reduction, _ = settings
    in_batch = queue is None
    k = k if in_batch else queue
    factor = loss_weight(reduction, state.shape[-1]) / (2 if symmetric else 1)
    query_ids, key_ids = _contiguous(query_ids), _contiguous(key_ids)
    mirror = state[1] if state.shape[0] == 2 else None
    if wrt_keys:
        x, y, x_ids, y_ids, x_state, y_state = k, q, key_ids, query_ids, mirror, state[0]
    else:
        x, y, x_ids, y_ids, x_state, y_state = q, k, query_ids, key_ids, state[0], mirror
    shape = x.shape
    x, y = _rows_by_features(x), _rows_by_features(y)
    scales, own, dim = x.shape
    other = y.shape[1]
    rows = scales * own
    dx = x.new_empty(shape)
    dtemperature = x.new_empty(rows if with_dtemperature else 0, dtype=torch.float32)
    if rows == 0:
        return dx, dtemperature
    dtype = _operand_dtype(x, y)
    size = tiles(dim, dtype, q.shape[:-1].numel())
    splits, part = _splits(own, other, scales, size, dim, x.device)
    workspace = x.new_empty(splits * rows * dim, dtype=torch.float32)
    grad_output = grad_output.expand(scales, q.shape[-2])
    with on_device(x.device):
        grid = (triton.cdiv(own, size.own) * triton.cdiv(dim, size.features), splits, scales)
        weights_kernel[grid](
            x, y, x_ids, y_ids, valid, temperature, grad_output, x_state, y_state, workspace,
            x.stride(0), x.stride(1), y.stride(0), y.stride(1), grad_output.stride(0), grad_output.stride(1),
            own, other, part, 1 / tau,
            D=dim, NORMALIZE=normalize, IN_BATCH=in_batch, DOT=TRITON_DTYPES[dtype], PRECISION=size.precision,
            BLOCK_X=size.own, BLOCK_Y=size.other, BLOCK_D=size.features,
            num_warps=size.warps, num_stages=size.stages, **LAUNCH,
        )  # fmt: skip
        block = blocks(dim, splits)
        project_kernel[(triton.cdiv(rows, block.rows),)](
            x, workspace, valid, temperature, dx, dtemperature if with_dtemperature else None,
            x.stride(0), x.stride(1), own, rows, splits, 1 / tau, factor,
            D=dim, NORMALIZE=normalize, BLOCK_X=block.rows, BLOCK_D=block.features, BLOCK_SPLITS=block.splits,
            num_warps=8, **LAUNCH,
        )  # fmt: skip
    return dx, dtemperature
