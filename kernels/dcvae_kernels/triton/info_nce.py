"""InfoNCE in Triton: `forward` and `backward_sweep`, the two computations of `dcvae_kernels.info_nce`.

Similarities q̂·n̂ exist only in registers; a weight is e^{(similarity − maximum)/τ}. Normalisation scales the dot
products instead of rounding a normalised copy of the rows, and does not depend on which operand comes first. The
backward pass then reproduces the similarities of the forward pass, whose rounding errors matter at low temperatures.
The kernels use no atomics: programs write partial sums to a workspace, and a second kernel adds them in a fixed order.

    forward          sweep_kernel     a program owns queries and sweeps one split of the negatives, like attention with
                                      V = K
                     combine_kernel   adds the splits: loss, rank, gradients of the queries, their keys and τ
    backward_sweep   weights_kernel   a program owns rows of one operand and sweeps one split of the other
                     project_kernel   adds the splits and backpropagates through the normalisation
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

MAX_SPLITS = 64  # a power of 2, so that combine_kernel can load all splits together
# Set explicitly, because the kernels were tested with it: a·b + c can be fused into one instruction.
LAUNCH = {"enable_fp_fusion": True}

# Arguments that Triton does not specialise on, so that another batch size causes no compilation during training.
SIZES = ["B", "K", "X", "Y", "part", "rows", "splits"]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
UNKNOWN_ID = tl.constexpr(reference.UNKNOWN_ID)
SMALLEST_SQUARE = tl.constexpr(reference.SMALLEST_SQUARE)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# Device code. Matrices are [rows, D] with unit stride along D; `*_stride` is the row stride, `*_scale_stride` the scale
# stride. --------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(x, rows, row_mask, features, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load x[rows, features] in the dtype of x; 0 for masked rows and features beyond D."""
    mask = row_mask[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (features < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + features[None, :], mask=mask, other=0.0)


@triton.jit
def _inverse_norm(squares, NORMALIZE: tl.constexpr):
    """Return 1 / max(‖x‖, 1e-12), given ‖x‖², or 1 without NORMALIZE."""
    if NORMALIZE:
        inverse = 1.0 / tl.sqrt(tl.maximum(squares, SMALLEST_SQUARE))
    else:
        inverse = tl.full(squares.shape, 1.0, tl.float32)
    return inverse


@triton.jit
def _inverse_temperature(temperature, inverse_temperature):
    """Return 1/τ, from the tensor `temperature` if given, else the number `inverse_temperature`."""
    if temperature is not None:
        inverse_temperature = 1.0 / tl.load(temperature).to(tl.float32)
    return inverse_temperature


@triton.jit
def _log1p(x):
    """ln(1 + x) for 0 ≤ x ≤ 1 in full fp32 precision; the GPU's approximate logarithm is inaccurate near 1."""
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
    return tl.where(x == x, softplus, x)  # tl.maximum drops NaN


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies bfloat16 operands as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _similarities(
    x, xs, x_mask, x_stride, x_tile, x_inverse, y, ys, y_mask, y_stride,
    D: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return x̂·ŷ [BLOCK_X, BLOCK_Y], the last tile of y that was loaded, and 1/‖y‖."""
    if D <= BLOCK_D:
        y_tile = _load_rows(y, ys, y_mask, tl.arange(0, BLOCK_D), y_stride, D, BLOCK_D)
        products = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        products = _dot(x_tile.to(DOT), tl.trans(y_tile.to(DOT)), products, PRECISION)
        squares = tl.sum(y_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    else:
        y_tile = tl.zeros((BLOCK_Y, BLOCK_D), y.dtype.element_ty)
        products = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        squares = tl.zeros((BLOCK_Y,), tl.float32)
        for first in range(0, D, BLOCK_D):
            features = first + tl.arange(0, BLOCK_D)
            x_part = _load_rows(x, xs, x_mask, features, x_stride, D, BLOCK_D)
            y_tile = _load_rows(y, ys, y_mask, features, y_stride, D, BLOCK_D)
            products = _dot(x_part.to(DOT), tl.trans(y_tile.to(DOT)), products, PRECISION)
            squares += tl.sum(y_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    y_inverse = _inverse_norm(squares, NORMALIZE)
    if NORMALIZE:
        products = products * (x_inverse[:, None] * y_inverse[None, :])
    else:
        products = products + 0.0 * products  # NaN if infinite: −∞ would look like a distant negative
    return products, y_tile, y_inverse


@triton.jit
def _weighted_sum(weights, y_tile, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + weights·y. The range of float16 is too small for weights, but float16 rows are exact in tf32."""
    if DOT == tl.bfloat16:
        total = _dot(weights.to(tl.bfloat16), y_tile, total, PRECISION)
    elif DOT == tl.float16:
        total = _dot(weights, y_tile.to(tl.float32), total, "tf32")
    else:
        total = _dot(weights, y_tile.to(tl.float32), total, PRECISION)
    return total


@triton.jit
def _excluded(xs, ys, x_ids, y_ids, x_mask, y_mask, IN_BATCH: tl.constexpr):
    """Mask of the pairs that are not negatives, [xs, ys]: out of range, positives, or equal ids."""
    excluded = tl.broadcast_to((~y_mask)[None, :], (xs.shape[0], ys.shape[0]))
    if IN_BATCH:
        excluded = excluded | (xs[:, None] == ys[None, :])
    if x_ids is not None:
        x_id = tl.load(x_ids + xs, mask=x_mask, other=UNKNOWN_ID)
        y_id = tl.load(y_ids + ys, mask=y_mask, other=UNKNOWN_ID)
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

    Grid: (blocks of queries × parts of D, splits of the negatives, scales). Only the sum for the gradient, Σ p·n, is
    divided along D, if it does not fit into registers. Workspace: see `_partials`.
    """
    PARTS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part_d = tl.program_id(0) % PARTS_D
    split = tl.program_id(1)
    scale = tl.program_id(2)
    rows = tl.num_programs(2) * B
    q += scale.to(tl.int64) * q_scale_stride
    k += scale.to(tl.int64) * k_scale_stride
    negatives += scale.to(tl.int64) * negatives_scale_stride
    log2_scale = _inverse_temperature(temperature, inverse_temperature) * LOG2E

    queries = tl.program_id(0) // PARTS_D * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = queries < B
    squares = tl.zeros((BLOCK_B,), tl.float32)
    k_squares = tl.zeros((BLOCK_B,), tl.float32)
    positive = tl.zeros((BLOCK_B,), tl.float32)
    q_tile = tl.zeros((BLOCK_B, BLOCK_D), q.dtype.element_ty)
    for first in range(0, D, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        q_tile = _load_rows(q, queries, row_mask, features, q_stride, D, BLOCK_D)
        k_tile = _load_rows(k, queries, row_mask, features, k_stride, D, BLOCK_D).to(tl.float32)
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
    rank_count = tl.zeros((BLOCK_B,), tl.int32)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    end = tl.minimum((split + 1) * part, K)
    if valid is not None:
        end = tl.minimum(end, tl.load(valid).to(tl.int64)).to(tl.int32)
    for first in range(split * part, end, BLOCK_K):
        slots = first + tl.arange(0, BLOCK_K)
        filled = slots < end
        similarity, tile, inverse = _similarities(
            q, queries, row_mask, q_stride, q_tile, q_inverse, negatives, slots, filled, negatives_stride,
            D, NORMALIZE, DOT, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        excluded = _excluded(queries, slots, query_ids, negative_ids, row_mask, filled, IN_BATCH)
        similarity = tl.where(excluded & (similarity == similarity), -float("inf"), similarity)  # keep NaN
        rank_count += tl.sum((similarity > positive[:, None]).to(tl.int32), 1)
        if FIXED:
            weights = tl.exp2((similarity - 1.0) * log2_scale)
        else:
            new_maximum = tl.maximum(maximum, tl.max(similarity, 1))
            # If there was no negative so far, −∞ − −∞ would be NaN.
            finite = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
            shrink = tl.exp2((maximum - finite) * log2_scale)
            weights = tl.exp2((similarity - finite[:, None]) * log2_scale)
            weight = weight * shrink
            total = total * shrink[:, None]
            maximum = new_maximum
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
        tl.store(partials + split * rows + row, maximum, mask=row_mask)
        tl.store(partials + (splits + split) * rows + row, weight, mask=row_mask)
        tl.store(partials + (2 * splits + split) * rows + row, rank_count.to(tl.float32), mask=row_mask)
        if split == 0:
            tl.store(partials + 3 * splits * rows + row, positive, mask=row_mask)
    if GRADIENT:
        features = part_d * BLOCK_D + tl.arange(0, BLOCK_D)
        pointers = workspace + (split * rows + row).to(tl.int64)[:, None] * D + features[None, :]
        tl.store(pointers, total, mask=row_mask[:, None] & (features < D)[None, :])


@triton.jit
def _partials(workspace, splits, rows, D: tl.constexpr, GRADIENT: tl.constexpr):
    """Return the start of the per-row sums in a workspace.

    The workspace contains partial gradients [splits, rows, D] (if GRADIENT), then maxima, weights and counts of
    negatives above the positive, [splits, rows] each, and the similarities of the positives, [rows].
    """
    if GRADIENT:
        workspace += (splits * rows).to(tl.int64) * D
    return workspace


@triton.jit
def _merge(partials, row, row_mask, splits, rows, log2_scale, BLOCK_SPLITS: tl.constexpr):
    """Return the maximum, the weights of the negatives and of the positive relative to it, and the loss of each row.

    Loads BLOCK_SPLITS splits together: one at a time, memory latency would exceed the duration of the sweep.
    """
    positive = tl.load(partials + 3 * splits * rows + row, mask=row_mask, other=0.0)
    maximum = positive
    for first in range(0, splits, BLOCK_SPLITS):
        offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
        maximum = tl.maximum(maximum, tl.max(tl.load(partials + offsets, mask=mask, other=-float("inf")), 0))
    weight = tl.zeros_like(positive)
    for first in range(0, splits, BLOCK_SPLITS):
        offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
        shrink = tl.exp2((tl.load(partials + offsets, mask=mask, other=-float("inf")) - maximum[None, :]) * log2_scale)
        weight += tl.sum(shrink * tl.load(partials + splits * rows + offsets, mask=mask, other=0.0), 0)
    loss = _softplus(((maximum - positive) * log2_scale + tl.log2(weight)) * LN2)
    return maximum, weight, tl.exp2((positive - maximum) * log2_scale), loss


@triton.jit
def _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS: tl.constexpr):
    """Return the offsets of these rows in BLOCK_SPLITS splits, and their mask; [BLOCK_SPLITS, rows]."""
    split = first + tl.arange(0, BLOCK_SPLITS)
    return split[:, None] * rows + row[None, :], (split < splits)[:, None] & row_mask[None, :]


@triton.jit
def _sum_of_losses(partials, mirror, splits, rows, log2_scale, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        row_mask = row < rows
        _, _, _, loss = _merge(partials, row, row_mask, splits, rows, log2_scale, BLOCK_SPLITS)
        if mirror is not None:
            _, _, _, mirrored = _merge(mirror, row, row_mask, splits, rows, log2_scale, BLOCK_SPLITS)
            loss = (loss + mirrored) * 0.5
        total += tl.where(row_mask, loss, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_of_gradients(
    workspace, partials, maximum, row, row_mask, features, splits, rows, log2_scale, D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum partial gradients [rows, D] over the splits; with `partials`, first rescale them to the common maximum."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
        pointers = workspace + offsets.to(tl.int64)[:, :, None] * D + features[None, None, :]
        parts = tl.load(pointers, mask=mask[:, :, None] & (features < D)[None, None, :], other=0.0)
        if partials is not None:
            split_maximum = tl.load(partials + offsets, mask=mask, other=-float("inf"))
            parts *= tl.exp2((split_maximum - maximum[None, :]) * log2_scale)[:, :, None]
        total += tl.sum(parts, 0)
    return total


@triton.jit
def _store_state(state, row, row_mask, rows, maximum, inverse_sum, negatives_probability):
    tl.store(state + row, maximum, mask=row_mask)
    tl.store(state + rows + row, inverse_sum, mask=row_mask)
    tl.store(state + 2 * rows + row, negatives_probability, mask=row_mask)


@triton.jit
def _load_state(state, grad_output, rows, row, row_mask):
    """Return the maximum, and the inverse sum and the probability of the negatives, both times grad_output."""
    maximum = tl.load(state + row, mask=row_mask, other=0.0)
    inverse_sum = tl.load(state + rows + row, mask=row_mask, other=0.0)
    negatives_probability = tl.load(state + 2 * rows + row, mask=row_mask, other=0.0)
    grad = tl.load(grad_output, mask=row_mask, other=0.0).to(tl.float32)
    return maximum, inverse_sum * grad, negatives_probability * grad


@triton.jit
def _through_norm(gradient, x, squares, NORMALIZE: tl.constexpr):
    """Return the gradient with respect to x, given the one with respect to x/‖x‖, [rows, D]."""
    if NORMALIZE:
        inverse = _inverse_norm(squares, NORMALIZE)
        direction = x * inverse[:, None]
        # A clamped norm is constant.
        projection = tl.where(squares > SMALLEST_SQUARE, tl.sum(gradient * direction, 1), 0.0)
        gradient = (gradient - projection[:, None] * direction) * inverse[:, None]
    return gradient


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    q, k, workspace, mirror, temperature, loss, rank, dq, dk, dtemperature, state,
    q_scale_stride, q_stride, k_scale_stride, k_stride,
    B, rows, splits, inverse_temperature, factor,
    D: tl.constexpr, NORMALIZE: tl.constexpr, GRADIENT: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of `sweep_kernel` for rows [scales × B]; with REDUCE the last program adds the losses.

    mirror: workspace of the other direction of a symmetric loss.
    state: softmax statistics for `backward_sweep`, [directions, 3, rows]: the maximum, 1 / (sum of all weights), and
    the probability of all negatives together. A log-sum-exp would add its rounding error to the exponents.
    """
    partials = _partials(workspace, splits, rows, D, GRADIENT)
    inverse_temperature = _inverse_temperature(temperature, inverse_temperature)
    log2_scale = inverse_temperature * LOG2E
    if REDUCE and tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(loss, factor * _sum_of_losses(partials, mirror, splits, rows, log2_scale, BLOCK_SUM, BLOCK_SPLITS))
    else:
        row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        row_mask = row < rows
        maximum, weight, positive_weight, losses = _merge(
            partials, row, row_mask, splits, rows, log2_scale, BLOCK_SPLITS
        )
        inverse_sum = 1.0 / (weight + positive_weight)
        if state is not None:
            _store_state(state, row, row_mask, rows, maximum, inverse_sum, weight * inverse_sum)
        if mirror is not None:
            mirror_maximum, mirror_weight, positive_weight, mirrored = _merge(
                mirror, row, row_mask, splits, rows, log2_scale, BLOCK_SPLITS
            )
            if state is not None:
                mirror_inverse = 1.0 / (mirror_weight + positive_weight)
                mirror_probability = mirror_weight * mirror_inverse
                _store_state(state + 3 * rows, row, row_mask, rows, mirror_maximum, mirror_inverse, mirror_probability)
            losses = (losses + mirrored) * 0.5
        if not REDUCE:
            tl.store(loss + row, losses, mask=row_mask)
        if rank is not None:
            rank_count = tl.zeros_like(weight)
            for first in range(0, splits, BLOCK_SPLITS):
                offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
                rank_count += tl.sum(tl.load(partials + 2 * splits * rows + offsets, mask=mask, other=0.0), 0)
            tl.store(rank + row, rank_count.to(tl.int64), mask=row_mask)

        if GRADIENT or dk is not None:
            features = tl.arange(0, BLOCK_D)
            q_row = (row // B).to(tl.int64) * q_scale_stride + (row % B).to(tl.int64) * q_stride
            k_row = (row // B).to(tl.int64) * k_scale_stride + (row % B).to(tl.int64) * k_stride
            q_tile = _load_rows(q, q_row, row_mask, features, 1, D, BLOCK_D).to(tl.float32)
            k_tile = _load_rows(k, k_row, row_mask, features, 1, D, BLOCK_D).to(tl.float32)
            q_squares = tl.sum(q_tile * q_tile, 1)
            k_squares = tl.sum(k_tile * k_tile, 1)
            q_direction = q_tile * _inverse_norm(q_squares, NORMALIZE)[:, None]
            element_offsets = row.to(tl.int64)[:, None] * D + features[None, :]
            mask = row_mask[:, None] & (features < D)[None, :]
            if GRADIENT:
                total = _sum_of_gradients(
                    workspace, partials, maximum, row, row_mask, features, splits, rows, log2_scale, D,
                    BLOCK_SPLITS, BLOCK_B, BLOCK_D,
                )  # fmt: skip
                k_direction = k_tile * _inverse_norm(k_squares, NORMALIZE)[:, None]
                # The weights of negatives and positive add up to 0, which avoids cancellation if the loss is small.
                gradient = total - weight[:, None] * k_direction
                gradient *= (inverse_sum * inverse_temperature * factor)[:, None]
                if dtemperature is not None:
                    row_dtemperature = -tl.sum(gradient * q_direction, 1) * inverse_temperature
                    tl.store(dtemperature + row, row_dtemperature, mask=row_mask)
                if dq is not None:
                    tl.store(dq + element_offsets, _through_norm(gradient, q_tile, q_squares, NORMALIZE), mask=mask)
            if dk is not None:
                gradient = (-weight * inverse_sum * inverse_temperature * factor)[:, None] * q_direction
                tl.store(dk + element_offsets, _through_norm(gradient, k_tile, k_squares, NORMALIZE), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    x, y, x_ids, y_ids, valid, temperature, grad_output, x_state, y_state, workspace,
    x_scale_stride, x_stride, y_scale_stride, y_stride, grad_output_scale_stride, grad_output_stride,
    X, Y, part, inverse_temperature,
    D: tl.constexpr, NORMALIZE: tl.constexpr, IN_BATCH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums Σ_y weight(x, y)·ŷ of BLOCK_X rows x over `part` rows y: the gradient of x̂, times τ.

    With x_state, x are the queries and y the keys; with y_state, the reverse; with both, the loss is symmetric.
    grad_output: gradient of the queries' losses. Workspace: [splits, scales × X, D].
    """
    PARTS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part_d = tl.program_id(0) % PARTS_D
    split = tl.program_id(1)
    scale = tl.program_id(2)
    x += scale.to(tl.int64) * x_scale_stride
    y += scale.to(tl.int64) * y_scale_stride
    grad_output += scale.to(tl.int64) * grad_output_scale_stride
    log2_scale = _inverse_temperature(temperature, inverse_temperature) * LOG2E

    xs = tl.program_id(0) // PARTS_D * BLOCK_X + tl.arange(0, BLOCK_X)
    x_mask = xs < X
    if valid is not None:
        x_mask = x_mask & (xs < tl.load(valid))
    squares = tl.zeros((BLOCK_X,), tl.float32)
    x_tile = tl.zeros((BLOCK_X, BLOCK_D), x.dtype.element_ty)
    for first in range(0, D, BLOCK_D):
        x_tile = _load_rows(x, xs, x_mask, first + tl.arange(0, BLOCK_D), x_stride, D, BLOCK_D)
        squares += tl.sum(x_tile.to(tl.float32) * x_tile.to(tl.float32), 1)
    x_inverse = _inverse_norm(squares, NORMALIZE)
    if x_state is not None:
        x_maximum, x_inverse_sum, x_negatives_probability = _load_state(
            x_state + scale * X,
            grad_output + xs.to(tl.int64) * grad_output_stride,
            tl.num_programs(2) * X,
            xs,
            x_mask,
        )

    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    end = tl.minimum((split + 1) * part, Y)
    for first in range(split * part, end, BLOCK_Y):
        ys = first + tl.arange(0, BLOCK_Y)
        y_mask = ys < end
        similarity, tile, inverse = _similarities(
            x, xs, x_mask, x_stride, x_tile, x_inverse, y, ys, y_mask, y_stride,
            D, NORMALIZE, DOT, PRECISION, BLOCK_X, BLOCK_Y, BLOCK_D,
        )  # fmt: skip
        weights = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        positives = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        if x_state is not None:
            weights += x_inverse_sum[:, None] * tl.exp2((similarity - x_maximum[:, None]) * log2_scale)
            positives += x_negatives_probability[:, None]
        if y_state is not None:
            y_maximum, y_inverse_sum, y_negatives_probability = _load_state(
                y_state + scale * Y,
                grad_output + ys.to(tl.int64) * grad_output_stride,
                tl.num_programs(2) * Y,
                ys,
                y_mask,
            )
            weights += y_inverse_sum[None, :] * tl.exp2((similarity - y_maximum[None, :]) * log2_scale)
            positives += y_negatives_probability[None, :]
        weights = tl.where(_excluded(xs, ys, x_ids, y_ids, x_mask, y_mask, IN_BATCH), 0.0, weights)
        if IN_BATCH:
            weights = tl.where((xs[:, None] == ys[None, :]) & y_mask[None, :], -positives, weights)
        if PARTS_D > 1:
            tile = _load_rows(y, ys, y_mask, part_d * BLOCK_D + tl.arange(0, BLOCK_D), y_stride, D, BLOCK_D)
        total = _weighted_sum(weights * inverse[None, :], tile, total, DOT, PRECISION)

    features = part_d * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (split * tl.num_programs(2) + scale) * X + xs
    pointers = workspace + row.to(tl.int64)[:, None] * D + features[None, :]
    tl.store(pointers, total, mask=(xs < X)[:, None] & (features < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def project_kernel(
    x, workspace, valid, temperature, dx, dtemperature,
    x_scale_stride, x_stride, X, rows, splits, inverse_temperature, factor,
    D: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of rows [scales × X] and backpropagate through the normalisation: dx and dtemperature."""
    row = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    row_mask = row < rows
    load_mask = row_mask
    if valid is not None:
        load_mask = load_mask & (row % X < tl.load(valid))
    features = tl.arange(0, BLOCK_D)
    inverse_temperature = _inverse_temperature(temperature, inverse_temperature)
    x_row = (row // X).to(tl.int64) * x_scale_stride + (row % X).to(tl.int64) * x_stride
    x_tile = _load_rows(x, x_row, load_mask, features, 1, D, BLOCK_D).to(tl.float32)
    element_offsets = row.to(tl.int64)[:, None] * D + features[None, :]
    mask = row_mask[:, None] & (features < D)[None, :]
    gradient = _sum_of_gradients(
        workspace, None, None, row, row_mask, features, splits, rows, 1.0, D, BLOCK_SPLITS, BLOCK_X, BLOCK_D
    )
    gradient *= inverse_temperature * factor
    squares = tl.sum(x_tile * x_tile, 1)
    if dtemperature is not None:
        projection = tl.sum(gradient * x_tile, 1) * _inverse_norm(squares, NORMALIZE)
        tl.store(dtemperature + row, -projection * inverse_temperature, mask=row_mask)
    gradient = tl.where(load_mask[:, None], _through_norm(gradient, x_tile, squares, NORMALIZE), 0.0)
    tl.store(dx + element_offsets, gradient, mask=mask)


# Launches -------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tile sizes and compiler options of `sweep_kernel` and `weights_kernel`.

    Attributes:
        own: rows that a program owns.
        other: rows of the other operand that it loads at a time.
        features: features that it loads at a time.
        warps, stages: num_warps and num_stages.
        precision: input_precision of tl.dot.
    """

    own: int
    other: int
    features: int
    warps: int
    stages: int
    precision: str


def tiles(dim: int, dtype: torch.dtype, rows: int) -> Tiles:
    """Return tile sizes for D = dim, operand dtype and number of queries, chosen from compiler reports.

    No kernel spills registers on sm_80, sm_90 or sm_100 for D ≤ 64 (float32) or D ≤ 256 (bfloat16). Above 2048 rows,
    float32 products are computed as three tf32 products on tensor cores, with the same accuracy; below, the kernel is
    too short to benefit.
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
    """Block sizes of `combine_kernel` and `project_kernel`.

    Attributes:
        rows, features, splits: elements that a program loads at a time.
        losses: rows that the program that adds the losses loads at a time.
    """

    rows: int
    features: int
    splits: int
    losses: int


def blocks(dim: int, splits: int) -> Blocks:
    """Return block sizes for D = dim and the number of splits: 1024 elements at a time, and 8192 partial losses."""
    features = triton.next_power_of_2(dim)
    padded_splits = next(count for count in (1, 8, MAX_SPLITS) if count >= splits)
    block_splits = min(padded_splits, max(1, 1024 // features))
    rows = max(1, min(16, 1024 // (features * block_splits)))
    return Blocks(rows, features, block_splits, min(1024, 8192 // block_splits))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _splits(own: int, other: int, scales: int, size: Tiles, dim: int, device: torch.device) -> tuple[int, int]:
    """Return the number of splits of the other rows that gives every multiprocessor work, and the rows per split."""
    programs = triton.cdiv(own, size.own) * triton.cdiv(dim, size.features) * scales
    steps = triton.cdiv(other, size.other)
    splits = max(1, min(MAX_SPLITS, steps, 2 * _multiprocessors(device) // programs))
    part = triton.cdiv(steps, splits) * size.other
    return max(1, triton.cdiv(other, part)) if part else 1, part


def _rows_by_features(x: Tensor) -> Tensor:
    """Return x as [S, rows, D] with unit stride along D, copied only if necessary."""
    x = x if x.ndim == 3 else x[None]
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _operand_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == y.dtype else torch.float32


TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def forward(
    inputs: Inputs, settings: Settings, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `dcvae_kernels.info_nce_autograd.forward`."""
    with_dq, with_dk, with_dtemperature, with_state, with_rank = output_mask
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    tau, normalize, symmetric, reduction, _ = settings
    shape = q.shape[:-1]
    q, k = _rows_by_features(q), _rows_by_features(k)
    scales, batch, dim = q.shape
    rows = scales * batch
    reduce = reduction != "none"
    with_gradient = with_dq or with_dtemperature

    def allocate(requested: bool, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return q.new_empty(size if requested else (0,), dtype=dtype)

    loss = q.new_empty(() if reduce else shape, dtype=torch.float32)
    rank = allocate(with_rank, *shape, dtype=torch.int64)
    dq = allocate(with_dq, *shape, dim)
    dk = allocate(with_dk, *shape, dim)
    dtemperature = allocate(with_dtemperature, *shape)
    state = allocate(with_state, 2 if symmetric else 1, 3, rows)

    def none_if_empty(x: Tensor) -> Tensor | None:
        return x if x.numel() else None

    queue = None if queue is None else _rows_by_features(queue)
    query_ids, negative_ids = _contiguous(query_ids), _contiguous(negative_ids)
    inputs = Inputs(q, temperature, k, queue, valid, query_ids, negative_ids)
    mirror = None
    with on_device(q.device):
        workspace, splits = _sweep(inputs, settings, with_gradient)
        if symmetric:
            mirrored = inputs._replace(q=k, k=q, query_ids=negative_ids, negative_ids=query_ids)
            mirror, _ = _sweep(mirrored, settings, with_gradient)
        size = blocks(dim, splits)
        combine_kernel[(triton.cdiv(rows, size.rows) + reduce,)](
            q, k, workspace, mirror, temperature,
            loss, none_if_empty(rank),
            none_if_empty(dq), none_if_empty(dk), none_if_empty(dtemperature), none_if_empty(state),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            batch, rows, splits, 1 / tau, loss_weight(reduction, rows),
            D=dim, NORMALIZE=normalize, GRADIENT=with_gradient, REDUCE=reduce,
            BLOCK_B=size.rows, BLOCK_D=size.features, BLOCK_SPLITS=size.splits, BLOCK_SUM=size.losses,
            num_warps=8, **LAUNCH,
        )  # fmt: skip
    return loss, rank, dq, dk, dtemperature, state


def _sweep(inputs: Inputs, settings: Settings, with_gradient: bool) -> tuple[Tensor, int]:
    """Launch `sweep_kernel` and return its workspace and the number of splits."""
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    tau, normalize = settings.tau, settings.normalize
    negatives = k if queue is None else queue
    scales, batch, dim = q.shape
    count = negatives.shape[1]
    dtype = _operand_dtype(q, negatives)
    size = tiles(dim, dtype, scales * batch)
    splits, part = _splits(batch, count, scales, size, dim, q.device)
    rows = scales * batch
    workspace = q.new_empty(splits * rows * (3 + dim * with_gradient) + rows, dtype=torch.float32)
    grid = (triton.cdiv(batch, size.own) * triton.cdiv(dim, size.features), splits, scales)
    sweep_kernel[grid](
        q, k, negatives, query_ids, negative_ids, valid, temperature, workspace,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), negatives.stride(0), negatives.stride(1),
        batch, count, part, 1 / tau,
        D=dim, NORMALIZE=normalize, IN_BATCH=queue is None,
        FIXED=normalize and temperature is None and 2 / tau < FIXED_MAXIMUM_BELOW, GRADIENT=with_gradient,
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
