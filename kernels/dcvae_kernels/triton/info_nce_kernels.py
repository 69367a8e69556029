"""Device code of InfoNCE; `dcvae_kernels.triton.info_nce` launches it.

Matrices are [rows, D] with unit stride along D; `*_stride` is the row stride, `*_scale_stride` the scale stride,
`*_plane_stride` the plane stride. x are rows that a program owns, y the rows that it compares them with. A weight is
e^{(similarity − maximum)/τ}. Programs write partial sums to a workspace, and a second kernel adds them in a fixed
order, so results are bitwise reproducible.
"""

import math

import triton
import triton.language as tl

from dcvae_kernels import reference

# Arguments that Triton does not specialise on, so that another batch size causes no compilation during training.
SIZES = ["B", "K", "X", "Y", "part", "rows", "splits", "mirror_splits", "first"]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
UNKNOWN_ID = tl.constexpr(reference.UNKNOWN_ID)
SMALLEST_SQUARE = tl.constexpr(reference.SMALLEST_SQUARE)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load_rows(x, rows, row_mask, features, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load x[rows, features] in the dtype of x; 0 for masked rows and features beyond D."""
    mask = row_mask[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (features < D)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + features[None, :], mask=mask, other=0.0)


@triton.jit
def _inverse_norms(x, NORMALIZE: tl.constexpr):
    """Return 1 / max(‖x‖, 1e-12) of rows, or 1 without NORMALIZE; in the latter case NaN if an element is infinite."""
    x = x.to(tl.float32)
    if NORMALIZE:
        inverse = 1.0 / tl.sqrt(tl.maximum(tl.sum(x * x, 1), SMALLEST_SQUARE))
    else:
        inverse = 1.0 + tl.sum(0.0 * x, 1)  # a similarity of −∞ would look like a distant negative
    return inverse


@triton.jit
def _directions(x, NORMALIZE: tl.constexpr):
    """Return the rows to compare in float32: x/‖x‖, or x without NORMALIZE."""
    return x.to(tl.float32) * _inverse_norms(x, NORMALIZE)[:, None]


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


# Matrix products. A float32 operand is the sum of three bfloat16 planes: first, second, third, with 8 bits each. Six
# products of planes on tensor cores are as accurate as one of float32.


@triton.jit
def _rounded(x, DOT: tl.constexpr):
    """Round a float32 tile to DOT."""
    if INTERPRETED and DOT == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DOT)


@triton.jit
def _planes(x, DOT: tl.constexpr, PLANES: tl.constexpr):
    """Split a float32 tile into a sum of PLANES tiles of dtype DOT."""
    first = _rounded(x, DOT)
    second, third = first, first
    if PLANES == 3:
        rest = x - first.to(tl.float32)
        second = _rounded(rest, DOT)
        third = _rounded(rest - second.to(tl.float32), DOT)
    return first, second, third


@triton.jit
def _load_planes(
    y, rows, row_mask, features, plane_stride, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, PLANES: tl.constexpr
):
    first = _load_rows(y, rows, row_mask, features, stride, D, BLOCK_D)
    second, third = first, first
    if PLANES == 3:
        second = _load_rows(y + plane_stride, rows, row_mask, features, stride, D, BLOCK_D)
        third = _load_rows(y + 2 * plane_stride, rows, row_mask, features, stride, D, BLOCK_D)
    return first, second, third


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:  # the interpreter multiplies bfloat16 operands as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _products(x, y, PLANES: tl.constexpr):
    """Return x·yᵀ, given planes."""
    total = tl.zeros((x[0].shape[0], y[0].shape[0]), tl.float32)
    if PLANES == 3:
        total = _small_products(x, y, total)
    return _dot(x[0], tl.trans(y[0]), total)


@triton.jit
def _small_products(x, y, total):
    """Return total + x·yᵀ without the product of the first planes. Products below 2⁻²⁴ are left out."""
    first, second = tl.trans(y[0]), tl.trans(y[1])
    total = _dot(x[0], tl.trans(y[2]), total)
    total = _dot(x[2], first, total)
    total = _dot(x[1], second, total)
    total = _dot(x[0], second, total)
    return _dot(x[1], first, total)


@triton.jit
def _weighted_sum(weights, y, total, DOT: tl.constexpr, PLANES: tl.constexpr):
    """Return total + weights·y. The range of float16 is too small for weights, but float16 rows are exact in tf32, the
    default precision of products of float32 tiles."""
    if DOT == tl.float16:
        total = _dot(weights, y[0].to(tl.float32), total)
    else:
        parts = _planes(weights, DOT, PLANES)
        if PLANES == 3:
            total = _dot(parts[0], y[2], total)
            total = _dot(parts[2], y[0], total)
            total = _dot(parts[1], y[1], total)
            total = _dot(parts[0], y[1], total)
            total = _dot(parts[1], y[0], total)
        total = _dot(parts[0], y[0], total)
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


@triton.jit
def _overlap(first_x, first_y, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """Whether two blocks of rows contain the same index, so that a tile contains positives of the batch."""
    return (first_x < first_y + BLOCK_Y) & (first_y < first_x + BLOCK_X)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    x, planes, inverses, valid, x_scale_stride, x_stride, plane_stride, X, rows,
    D: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store inverse norms of rows [scales × X, D], and normalised rows as planes [PLANES, scales × X, WIDTH]."""
    row = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    row_mask = row < rows
    if valid is not None:
        row_mask = row_mask & (row % X < tl.load(valid))
    features = tl.arange(0, BLOCK_D)
    x_row = (row // X).to(tl.int64) * x_scale_stride + (row % X).to(tl.int64) * x_stride
    tile = _load_rows(x, x_row, row_mask, features, 1, D, BLOCK_D)
    inverse = _inverse_norms(tile, NORMALIZE)
    if inverses is not None:
        tl.store(inverses + row, inverse, mask=row < rows)
    if planes is not None:
        first, second, third = _planes(tile.to(tl.float32) * inverse[:, None], DOT, PLANES)
        offsets = row.to(tl.int64)[:, None] * WIDTH + features[None, :]
        mask = (row < rows)[:, None] & (features < WIDTH)[None, :]
        tl.store(planes + offsets, first, mask=mask)
        if PLANES == 3:
            tl.store(planes + plane_stride + offsets, second, mask=mask)
            tl.store(planes + 2 * plane_stride + offsets, third, mask=mask)


# A program owns rows x and sweeps over rows y. Half-precision rows are multiplied as they are, and their inverse norms
# scale the products. Float32 rows are normalised and split into planes, y in advance unless D is small.


@triton.jit
def _own_rows(x, NORMALIZE: tl.constexpr, DOT: tl.constexpr, PLANES: tl.constexpr):
    """Return the planes of x, and the inverse norms that remain to be multiplied by."""
    inverse = _inverse_norms(x, NORMALIZE)
    if PLANES == 1:
        planes = (x, x, x)
    else:
        planes = _planes(x.to(tl.float32) * inverse[:, None], DOT, PLANES)
        inverse = tl.full(inverse.shape, 1.0, tl.float32)
    return planes, inverse


@triton.jit
def _other_rows(
    y, inverses, ys, y_mask, features, plane_stride, stride, D: tl.constexpr, NORMALIZE: tl.constexpr,
    DOT: tl.constexpr, PLANES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the planes of y, and the inverse norms that remain to be multiplied by."""
    inverse = tl.full((ys.shape[0],), 1.0, tl.float32)
    if PLANES == 3 and y.dtype.element_ty == DOT:  # planes, with BLOCK_D columns
        planes = _load_planes(y, ys, y_mask, features, plane_stride, stride, BLOCK_D, BLOCK_D, PLANES)
    elif PLANES == 3:
        directions = _directions(_load_rows(y, ys, y_mask, features, stride, D, BLOCK_D), NORMALIZE)
        planes = _planes(directions, DOT, PLANES)
    else:
        planes = _load_planes(y, ys, y_mask, features, plane_stride, stride, D, BLOCK_D, PLANES)
        inverse = tl.load(inverses + ys, mask=y_mask, other=0.0)
    return planes, inverse


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    q, k, negatives, inverses, query_ids, negative_ids, valid, temperature, workspace,
    q_scale_stride, q_stride, k_scale_stride, k_stride,
    negatives_plane_stride, negatives_scale_stride, negatives_stride,
    B, K, part, inverse_temperature,
    D: tl.constexpr, NORMALIZE: tl.constexpr, IN_BATCH: tl.constexpr, FIXED: tl.constexpr, GRADIENT: tl.constexpr,
    RANK: tl.constexpr, DOT: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of BLOCK_X queries over `part` negatives.

    Grid: (blocks of queries, splits of the negatives, scales). Workspace: see `_partials`.
    negatives, inverses: rows and their inverse norms, if in half precision; otherwise planes, or float32 rows.
    """
    split = tl.program_id(1)
    scale = tl.program_id(2)
    splits = tl.num_programs(1)
    rows = tl.num_programs(2) * B
    q += scale.to(tl.int64) * q_scale_stride
    k += scale.to(tl.int64) * k_scale_stride
    negatives += scale.to(tl.int64) * negatives_scale_stride
    if inverses is not None:
        inverses += scale * K
    log2_scale = _inverse_temperature(temperature, inverse_temperature) * LOG2E
    partials = _partials(workspace, splits, rows, D, GRADIENT)
    if tl.program_id(0) + split + scale == 0:
        tl.store(_counter(partials, splits, rows), 0)

    first_query = tl.program_id(0) * BLOCK_X
    queries = first_query + tl.arange(0, BLOCK_X)
    row_mask = queries < B
    features = tl.arange(0, BLOCK_D)
    q_tile = _load_rows(q, queries, row_mask, features, q_stride, D, BLOCK_D)
    x, x_inverse = _own_rows(q_tile, NORMALIZE, DOT, PLANES)
    positive = tl.zeros((BLOCK_X,), tl.float32)
    if RANK:
        k_tile = _load_rows(k, queries, row_mask, features, k_stride, D, BLOCK_D)
        positive = tl.sum(_directions(q_tile, NORMALIZE) * _directions(k_tile, NORMALIZE), 1)
    if FIXED:  # the exponent's factor includes the query's norm, which saves a multiplication per pair
        positive = positive / x_inverse
        log2_scales = (log2_scale * x_inverse)[:, None]
        x_inverse = tl.full((BLOCK_X,), 1.0, tl.float32)

    maximum = tl.full((BLOCK_X,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_X,), tl.float32)
    rank_count = tl.zeros((BLOCK_X,), tl.int32)
    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    end = tl.minimum((split + 1) * part, K)
    if valid is not None:
        end = tl.minimum(end, tl.load(valid).to(tl.int64)).to(tl.int32)
    for first in range(split * part, end, BLOCK_Y):
        slots = first + tl.arange(0, BLOCK_Y)
        filled = slots < end
        y, y_inverse = _other_rows(
            negatives, inverses, slots, filled, features, negatives_plane_stride, negatives_stride,
            D, NORMALIZE, DOT, PLANES, BLOCK_D,
        )  # fmt: skip
        similarity = _products(x, y, PLANES)
        if inverses is not None:
            similarity *= x_inverse[:, None] * y_inverse[None, :]
        edge = (first + BLOCK_Y > end) | (query_ids is not None)
        if IN_BATCH:
            edge = edge | _overlap(first_query, first, BLOCK_X, BLOCK_Y)
        if edge:
            excluded = _excluded(queries, slots, query_ids, negative_ids, row_mask, filled, IN_BATCH)
            similarity = tl.where(excluded & (similarity == similarity), -float("inf"), similarity)  # keep NaN
        if RANK:
            rank_count += tl.sum((similarity > positive[:, None]).to(tl.int32), 1)
        if FIXED:
            weights = tl.exp2(similarity * log2_scales - log2_scale)
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
            if inverses is not None:
                weights *= y_inverse[None, :]
            total = _weighted_sum(weights, y, total, DOT, PLANES)

    row = split * rows + scale * B + queries
    tl.store(partials + row, weight, mask=row_mask)
    if not FIXED:
        tl.store(partials + splits * rows + row, maximum, mask=row_mask)
    if RANK:
        tl.store(partials + 2 * splits * rows + row, rank_count.to(tl.float32), mask=row_mask)
    if GRADIENT:
        pointers = workspace + row.to(tl.int64)[:, None] * D + features[None, :]
        tl.store(pointers, total, mask=row_mask[:, None] & (features < D)[None, :])


@triton.jit
def _partials(workspace, splits, rows, D: tl.constexpr, GRADIENT: tl.constexpr):
    """Return the start of the per-row sums in a workspace.

    The workspace contains partial gradients [splits, rows, D] (if GRADIENT), then weights, maxima (unless FIXED) and
    counts of negatives above the positive (if RANK), [splits, rows] each, losses [rows], and a counter.
    """
    if GRADIENT:
        workspace += (splits * rows).to(tl.int64) * D
    return workspace


@triton.jit
def _counter(partials, splits, rows):
    """Return the address of the number of programs of `combine_kernel` that have stored their losses."""
    return (partials + (3 * splits + 1).to(tl.int64) * rows).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _merge(
    partials, positive, row, row_mask, splits, rows, log2_scale, FIXED: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    """Return the maximum, the weights of the negatives and of the positive relative to it, and the loss of each row.

    Loads BLOCK_SPLITS splits together: one at a time, memory latency would exceed the duration of the sweep.
    """
    if FIXED:
        maximum = tl.full(positive.shape, 1.0, tl.float32)
    else:
        maximum = positive
        for first in range(0, splits, BLOCK_SPLITS):
            offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
            maxima = tl.load(partials + splits * rows + offsets, mask=mask, other=-float("inf"))
            maximum = tl.maximum(maximum, tl.max(maxima, 0))
    weight = tl.zeros_like(positive)
    for first in range(0, splits, BLOCK_SPLITS):
        offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
        weights = tl.load(partials + offsets, mask=mask, other=0.0)
        if not FIXED:
            weights *= _shrink(partials + splits * rows + offsets, mask, maximum, log2_scale)
        weight += tl.sum(weights, 0)
    loss = _softplus(((maximum - positive) * log2_scale + tl.log2(weight)) * LN2)
    return maximum, weight, tl.exp2((positive - maximum) * log2_scale), loss


@triton.jit
def _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS: tl.constexpr):
    """Return the offsets of these rows in BLOCK_SPLITS splits, and their mask; [BLOCK_SPLITS, rows]."""
    split = first + tl.arange(0, BLOCK_SPLITS)
    return split[:, None] * rows + row[None, :], (split < splits)[:, None] & row_mask[None, :]


@triton.jit
def _shrink(maxima, mask, maximum, log2_scale):
    """Return the factors that make sums relative to the splits' maxima relative to the common maximum."""
    return tl.exp2((tl.load(maxima, mask=mask, other=-float("inf")) - maximum[None, :]) * log2_scale)


@triton.jit
def _sum_of_gradients(
    workspace, maxima, maximum, row, row_mask, features, splits, rows, log2_scale, D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum partial gradients [rows, D] over the splits; with `maxima`, first rescale them to the common maximum."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
        pointers = workspace + offsets.to(tl.int64)[:, :, None] * D + features[None, None, :]
        parts = tl.load(pointers, mask=mask[:, :, None] & (features < D)[None, None, :], other=0.0)
        if maxima is not None:
            parts *= _shrink(maxima + offsets, mask, maximum, log2_scale)[:, :, None]
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
def _through_norm(gradient, x, inverse, NORMALIZE: tl.constexpr):
    """Return the gradient with respect to x, given the one with respect to x/‖x‖, [rows, D]."""
    if NORMALIZE:
        direction = x * inverse[:, None]
        # A clamped norm is constant.
        projection = tl.where(tl.sum(x * x, 1) > SMALLEST_SQUARE, tl.sum(gradient * direction, 1), 0.0)
        gradient = (gradient - projection[:, None] * direction) * inverse[:, None]
    return gradient


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    q, k, workspace, mirror, temperature, loss, rank, dq, dk, dtemperature, state,
    q_scale_stride, q_stride, k_scale_stride, k_stride,
    B, rows, splits, mirror_splits, inverse_temperature, factor,
    D: tl.constexpr, NORMALIZE: tl.constexpr, FIXED: tl.constexpr, GRADIENT: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of rows [scales × B]; with REDUCE the program that ends last adds the losses.

    mirror: per-row sums of the keys in a symmetric loss, with mirror_splits splits.
    state: softmax statistics for `backward_sweep`, [directions, 3, rows]: the maximum, 1 / (sum of all weights), and
    the probability of all negatives together. A log-sum-exp would add its rounding error to the exponents.
    """
    partials = _partials(workspace, splits, rows, D, GRADIENT)
    inverse_temperature = _inverse_temperature(temperature, inverse_temperature)
    log2_scale = inverse_temperature * LOG2E
    row = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    row_mask = row < rows
    features = tl.arange(0, BLOCK_D)
    q_row = (row // B).to(tl.int64) * q_scale_stride + (row % B).to(tl.int64) * q_stride
    k_row = (row // B).to(tl.int64) * k_scale_stride + (row % B).to(tl.int64) * k_stride
    q_tile = _load_rows(q, q_row, row_mask, features, 1, D, BLOCK_D).to(tl.float32)
    k_tile = _load_rows(k, k_row, row_mask, features, 1, D, BLOCK_D).to(tl.float32)
    q_inverse, k_inverse = _inverse_norms(q_tile, NORMALIZE), _inverse_norms(k_tile, NORMALIZE)
    positive = tl.sum(q_tile * k_tile, 1) * (q_inverse * k_inverse)

    maximum, weight, positive_weight, losses = _merge(
        partials, positive, row, row_mask, splits, rows, log2_scale, FIXED, BLOCK_SPLITS
    )
    inverse_sum = 1.0 / (weight + positive_weight)
    if state is not None:
        _store_state(state, row, row_mask, rows, maximum, inverse_sum, weight * inverse_sum)
    if mirror is not None:
        mirror_maximum, mirror_weight, positive_weight, mirrored = _merge(
            mirror, positive, row, row_mask, mirror_splits, rows, log2_scale, FIXED, BLOCK_SPLITS
        )
        if state is not None:
            mirror_inverse = 1.0 / (mirror_weight + positive_weight)
            mirror_probability = mirror_weight * mirror_inverse
            _store_state(state + 3 * rows, row, row_mask, rows, mirror_maximum, mirror_inverse, mirror_probability)
        losses = (losses + mirrored) * 0.5
    if rank is not None:
        rank_count = tl.zeros_like(weight)
        for first in range(0, splits, BLOCK_SPLITS):
            offsets, mask = _split_offsets(first, row, row_mask, splits, rows, BLOCK_SPLITS)
            rank_count += tl.sum(tl.load(partials + 2 * splits * rows + offsets, mask=mask, other=0.0), 0)
        tl.store(rank + row, rank_count.to(tl.int64), mask=row_mask)

    element_offsets = row.to(tl.int64)[:, None] * D + features[None, :]
    mask = row_mask[:, None] & (features < D)[None, :]
    q_direction = q_tile * q_inverse[:, None]
    if GRADIENT:
        maxima = None if FIXED else partials + splits * rows
        total = _sum_of_gradients(
            workspace, maxima, maximum, row, row_mask, features, splits, rows, log2_scale, D,
            BLOCK_SPLITS, BLOCK_X, BLOCK_D,
        )  # fmt: skip
        # The weights of negatives and positive add up to 0, which avoids cancellation if the loss is small.
        gradient = total - (weight * k_inverse)[:, None] * k_tile
        gradient *= (inverse_sum * inverse_temperature * factor)[:, None]
        if dtemperature is not None:
            row_dtemperature = -tl.sum(gradient * q_direction, 1) * inverse_temperature
            tl.store(dtemperature + row, row_dtemperature, mask=row_mask)
        if dq is not None:
            tl.store(dq + element_offsets, _through_norm(gradient, q_tile, q_inverse, NORMALIZE), mask=mask)
    if dk is not None:
        gradient = (-weight * inverse_sum * inverse_temperature * factor)[:, None] * q_direction
        tl.store(dk + element_offsets, _through_norm(gradient, k_tile, k_inverse, NORMALIZE), mask=mask)

    if REDUCE:
        all_losses = partials + 3 * splits * rows
        tl.store(all_losses + row, losses, mask=row_mask)
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(_counter(partials, splits, rows), 1, sem="acq_rel") == tl.num_programs(0) - 1:
            sums = tl.zeros((BLOCK_SUM,), tl.float32)
            for first in range(0, rows, BLOCK_SUM):
                loss_row = first + tl.arange(0, BLOCK_SUM)
                sums += tl.load(all_losses + loss_row, mask=loss_row < rows, other=0.0)
            tl.store(loss, tl.sum(sums, 0) * factor)
    else:
        tl.store(loss + row, losses, mask=row_mask)


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    keys, queries, inverses, key_ids, query_ids, temperature, grad_output, state, workspace,
    keys_scale_stride, keys_stride, queries_plane_stride, queries_scale_stride, queries_stride,
    grad_output_scale_stride, grad_output_stride,
    X, Y, part, inverse_temperature,
    D: tl.constexpr, NORMALIZE: tl.constexpr, IN_BATCH: tl.constexpr, FIXED: tl.constexpr,
    DOT: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums Σ_q weight(q, key)·q̂ of BLOCK_X keys as negatives over `part` queries: their gradient, times τ.

    queries, inverses: as in `sweep_kernel`. grad_output: gradient of the queries' losses. Workspace: [splits,
    scales × X, D].
    """
    split = tl.program_id(1)
    scale = tl.program_id(2)
    keys += scale.to(tl.int64) * keys_scale_stride
    queries += scale.to(tl.int64) * queries_scale_stride
    grad_output += scale.to(tl.int64) * grad_output_scale_stride
    if inverses is not None:
        inverses += scale * Y
    log2_scale = _inverse_temperature(temperature, inverse_temperature) * LOG2E

    first_key = tl.program_id(0) * BLOCK_X
    xs = first_key + tl.arange(0, BLOCK_X)
    x_mask = xs < X
    features = tl.arange(0, BLOCK_D)
    x_tile = _load_rows(keys, xs, x_mask, features, keys_stride, D, BLOCK_D)
    x, x_inverse = _own_rows(x_tile, NORMALIZE, DOT, PLANES)
    if FIXED:  # as in `sweep_kernel`
        log2_scales = (log2_scale * x_inverse)[:, None]
        x_inverse = tl.full((BLOCK_X,), 1.0, tl.float32)
    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    end = tl.minimum((split + 1) * part, Y)
    for first in range(split * part, end, BLOCK_Y):
        ys = first + tl.arange(0, BLOCK_Y)
        y_mask = ys < end
        y, y_inverse = _other_rows(
            queries, inverses, ys, y_mask, features, queries_plane_stride, queries_stride,
            D, NORMALIZE, DOT, PLANES, BLOCK_D,
        )  # fmt: skip
        # 0 beyond the last query, whose weights are then 0.
        maximum, inverse_sum, _ = _load_state(
            state + scale * Y,
            grad_output + ys.to(tl.int64) * grad_output_stride,
            tl.num_programs(2) * Y,
            ys,
            y_mask,
        )
        similarity = _products(x, y, PLANES)
        if inverses is not None:
            similarity *= x_inverse[:, None] * y_inverse[None, :]
        if FIXED:
            weights = tl.exp2(similarity * log2_scales - log2_scale)
        else:
            weights = tl.exp2((similarity - maximum[None, :]) * log2_scale)
        weights *= (inverse_sum * y_inverse)[None, :]  # y_inverse is the factor of y in the weighted sum
        if IN_BATCH or query_ids is not None:
            edge = query_ids is not None
            if IN_BATCH:
                edge = _overlap(first_key, first, BLOCK_X, BLOCK_Y) | edge
            if edge:
                excluded = _excluded(xs, ys, key_ids, query_ids, x_mask, y_mask, IN_BATCH)
                weights = tl.where(excluded, 0.0, weights)
        total = _weighted_sum(weights, y, total, DOT, PLANES)

    row = (split * tl.num_programs(2) + scale) * X + xs
    pointers = workspace + row.to(tl.int64)[:, None] * D + features[None, :]
    tl.store(pointers, total, mask=x_mask[:, None] & (features < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def project_kernel(
    x, workspace, positives, state, mirror, grad_output, valid, temperature, dx, dtemperature,
    x_scale_stride, x_stride, positives_scale_stride, positives_stride, grad_output_scale_stride, grad_output_stride,
    X, rows, splits, inverse_temperature, factor,
    D: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of rows [scales × X] and backpropagate through the normalisation: dx and dtemperature.

    The workspace contains the gradient from pairs of a row and a negative. positives: the other row of each positive
    pair, if its gradient is to be added. In the sums on tensor cores, which do not round to nearest, its large weight
    would magnify the error. state, mirror: statistics of the rows, for each direction of the loss. grad_output:
    gradient of the queries' losses.
    """
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
    if positives is not None:
        scale, index = row // X, row % X
        query = scale.to(tl.int64) * positives_scale_stride + index.to(tl.int64) * positives_stride
        grad = grad_output + scale.to(tl.int64) * grad_output_scale_stride + index.to(tl.int64) * grad_output_stride
        _, _, negatives_probability = _load_state(state, grad, rows, row, row_mask)
        if mirror is not None:
            _, _, mirror_probability = _load_state(mirror, grad, rows, row, row_mask)
            negatives_probability += mirror_probability
        directions = _directions(_load_rows(positives, query, row_mask, features, 1, D, BLOCK_D), NORMALIZE)
        gradient -= negatives_probability[:, None] * directions
    gradient *= inverse_temperature * factor
    inverse = _inverse_norms(x_tile, NORMALIZE)
    if dtemperature is not None:
        projection = tl.sum(gradient * x_tile, 1) * inverse
        tl.store(dtemperature + row, -projection * inverse_temperature, mask=row_mask)
    if dx is not None:
        gradient = tl.where(load_mask[:, None], _through_norm(gradient, x_tile, inverse, NORMALIZE), 0.0)
        tl.store(dx + element_offsets, gradient, mask=mask)


@triton.jit
def _tile_of_program(tiles_x, tiles_y, GROUP: tl.constexpr):
    """Return the indices of this program's tile: GROUP rows of tiles together, which share operands in the cache."""
    program = tl.program_id(0)
    first = program // (GROUP * tiles_y) * GROUP
    size = tl.minimum(tiles_x - first, GROUP)
    return first + program % (GROUP * tiles_y) % size, program % (GROUP * tiles_y) // size


@triton.jit
def _tile_of_similarities(
    q, keys, q_inverses, key_inverses, q_plane_stride, q_scale_stride, q_stride,
    keys_plane_stride, keys_scale_stride, keys_stride, scale, B, K, queries, ys, q_mask, y_mask,
    D: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    q += scale.to(tl.int64) * q_scale_stride
    keys += scale.to(tl.int64) * keys_scale_stride
    similarity = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    small = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)  # summed separately: tensor cores do not round to nearest
    for first in range(0, D, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        x = _load_planes(q, queries, q_mask, features, q_plane_stride, q_stride, D, BLOCK_D, PLANES)
        y = _load_planes(keys, ys, y_mask, features, keys_plane_stride, keys_stride, D, BLOCK_D, PLANES)
        if PLANES == 3:
            small = _small_products(x, y, small)
        similarity = _dot(x[0], tl.trans(y[0]), similarity)
    if PLANES == 3:
        similarity += small
    if q_inverses is not None:
        q_inverse = tl.load(q_inverses + scale * B + queries, mask=q_mask, other=0.0)
        key_inverse = tl.load(key_inverses + scale * K + ys, mask=y_mask, other=0.0)
        similarity *= q_inverse[:, None] * key_inverse[None, :]
    return similarity


@triton.jit
def _softmax_sums(similarity, log2_scale, AXIS: tl.constexpr):
    """Return the maxima of a tile along an axis, and the sums of the weights relative to them."""
    maximum = tl.max(similarity, AXIS)
    finite = tl.where(maximum == -float("inf"), 0.0, maximum)
    weights = tl.exp2((similarity - tl.expand_dims(finite, AXIS)) * log2_scale)
    return maximum, tl.sum(weights, AXIS)


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    q, keys, q_inverses, key_inverses, query_ids, key_ids, valid, temperature, positive, workspace, mirror,
    q_plane_stride, q_scale_stride, q_stride, keys_plane_stride, keys_scale_stride, keys_stride,
    B, K, inverse_temperature,
    D: tl.constexpr, IN_BATCH: tl.constexpr, FIXED: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Partial sums of a tile of similarities over its rows and, with `mirror`, over its columns.

    Grid: (tiles, scales). q, keys, inverses: as the negatives of `sweep_kernel`. positive: similarity of each query to
    its key, [scales, B], if ranks are computed. Workspaces: as without GRADIENT in `_partials`; the splits are tiles.
    """
    scale = tl.program_id(1)
    tiles_x, tiles_y = tl.cdiv(B, BLOCK_X), tl.maximum(tl.cdiv(K, BLOCK_Y), 1)  # one without keys
    tile_x, tile_y = _tile_of_program(tiles_x, tiles_y, GROUP)
    rows, columns = tl.num_programs(1) * B, tl.num_programs(1) * K
    if tl.program_id(0) + scale == 0:
        tl.store(_counter(workspace, tiles_y, rows), 0)
    first_query, first_key = tile_x * BLOCK_X, tile_y * BLOCK_Y
    queries, ys = first_query + tl.arange(0, BLOCK_X), first_key + tl.arange(0, BLOCK_Y)
    end = K
    if valid is not None:
        end = tl.minimum(end, tl.load(valid).to(tl.int64)).to(tl.int32)
    q_mask, y_mask = queries < B, ys < end
    similarity = _tile_of_similarities(
        q, keys, q_inverses, key_inverses, q_plane_stride, q_scale_stride, q_stride,
        keys_plane_stride, keys_scale_stride, keys_stride, scale, B, K, queries, ys, q_mask, y_mask,
        D, PLANES, BLOCK_X, BLOCK_Y, BLOCK_D,
    )  # fmt: skip
    edge = (first_key + BLOCK_Y > end) | (first_query + BLOCK_X > B) | (query_ids is not None)
    if IN_BATCH:
        edge = edge | _overlap(first_query, first_key, BLOCK_X, BLOCK_Y)
    if edge:
        excluded = _excluded(queries, ys, query_ids, key_ids, q_mask, y_mask, IN_BATCH) | (~q_mask)[:, None]
        similarity = tl.where(excluded & (similarity == similarity), -float("inf"), similarity)  # keep NaN
    log2_scale = _inverse_temperature(temperature, inverse_temperature) * LOG2E
    row = tile_y * rows + scale * B + queries
    column = tile_x * columns + scale * K + ys
    if FIXED:
        weights = tl.exp2(similarity * log2_scale - log2_scale)
        tl.store(workspace + row, tl.sum(weights, 1), mask=q_mask)
        if mirror is not None:
            tl.store(mirror + column, tl.sum(weights, 0), mask=y_mask)
    else:
        maximum, weight = _softmax_sums(similarity, log2_scale, 1)
        tl.store(workspace + row, weight, mask=q_mask)
        tl.store(workspace + tiles_y * rows + row, maximum, mask=q_mask)
        if mirror is not None:
            maximum, weight = _softmax_sums(similarity, log2_scale, 0)
            tl.store(mirror + column, weight, mask=y_mask)
            tl.store(mirror + tiles_x * columns + column, maximum, mask=y_mask)
    if positive is not None:
        similarity_of_key = tl.load(positive + scale * B + queries, mask=q_mask, other=0.0)
        rank_count = tl.sum((similarity > similarity_of_key[:, None]).to(tl.float32), 1)
        tl.store(workspace + 2 * tiles_y * rows + row, rank_count, mask=q_mask)


@triton.jit(do_not_specialize=SIZES)
def chunk_kernel(
    q, keys, q_inverses, key_inverses, query_ids, key_ids, valid, temperature, grad_output, state, mirror, weights_out,
    q_plane_stride, q_scale_stride, q_stride, keys_plane_stride, keys_scale_stride, keys_stride,
    grad_output_scale_stride, grad_output_stride, out_scale_stride, out_stride,
    B, K, first, inverse_temperature,
    D: tl.constexpr, IN_BATCH: tl.constexpr, FIXED: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store a tile of weights(q, key) of negatives for queries from `first`, as a matrix [scales, queries, K].

    Its rows have room for all columns of the last tile, because stores with a mask of columns are slow.

    state, mirror: statistics of the queries and, if the loss is symmetric, of the keys. grad_output: gradient of the
    queries' losses.
    """
    scale = tl.program_id(1)
    tile_x, tile_y = _tile_of_program(tl.num_programs(0) // tl.cdiv(K, BLOCK_Y), tl.cdiv(K, BLOCK_Y), GROUP)
    first_query, first_key = first + tile_x * BLOCK_X, tile_y * BLOCK_Y
    queries, ys = first_query + tl.arange(0, BLOCK_X), first_key + tl.arange(0, BLOCK_Y)
    end = K
    if valid is not None:
        end = tl.minimum(end, tl.load(valid).to(tl.int64)).to(tl.int32)
    q_mask, y_mask = queries < B, ys < end
    similarity = _tile_of_similarities(
        q, keys, q_inverses, key_inverses, q_plane_stride, q_scale_stride, q_stride,
        keys_plane_stride, keys_scale_stride, keys_stride, scale, B, K, queries, ys, q_mask, y_mask,
        D, PLANES, BLOCK_X, BLOCK_Y, BLOCK_D,
    )  # fmt: skip
    log2_scale = _inverse_temperature(temperature, inverse_temperature) * LOG2E
    grad_output += scale.to(tl.int64) * grad_output_scale_stride
    rows = tl.num_programs(1) * B
    edge = (first_key + BLOCK_Y > end) | (query_ids is not None)
    if IN_BATCH:
        edge = edge | _overlap(first_query, first_key, BLOCK_X, BLOCK_Y)
    if edge:
        excluded = _excluded(queries, ys, query_ids, key_ids, q_mask, y_mask, IN_BATCH)
        similarity = tl.where(excluded, -float("inf"), similarity)
    maximum, inverse_sum, _ = _load_state(
        state + scale * B, grad_output + queries.to(tl.int64) * grad_output_stride, rows, queries, q_mask
    )
    if mirror is not None:  # then B = K
        mirror_maximum, mirror_inverse_sum, _ = _load_state(
            mirror + scale * K, grad_output + ys.to(tl.int64) * grad_output_stride, rows, ys, y_mask
        )
    if FIXED:
        shares = inverse_sum[:, None]
        if mirror is not None:
            shares = shares + mirror_inverse_sum[None, :]
        weights = tl.exp2(similarity * log2_scale - log2_scale) * shares
    else:
        weights = tl.exp2((similarity - maximum[:, None]) * log2_scale) * inverse_sum[:, None]
        if mirror is not None:
            weights += tl.exp2((similarity - mirror_maximum[None, :]) * log2_scale) * mirror_inverse_sum[None, :]
    row = scale.to(tl.int64) * out_scale_stride + (queries - first).to(tl.int64) * out_stride
    weights = weights.to(weights_out.dtype.element_ty)
    tl.store(weights_out + row[:, None] + ys[None, :], weights, mask=q_mask[:, None])
