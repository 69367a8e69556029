"""Device code of spectral norm; `dcvae_kernels.triton.spectral_norm` launches it.

Each program processes one block of one layer, which it looks up in tables on the device. A layer is a matrix W of
HEIGHT rows and WIDTH columns. Columns are visited in the order of memory. The order of v is the same if the weight is
contiguous.

    layers     int64 [layers, FIELDS], the fields below.
    addresses  int64 [layers, 3], of W, u and v.
    vectors    float32: u of all layers, v of all layers, σ of all layers.
    workspace  float32: parts of Wᵀu, [blocks, padded width] for each layer, then the norm of each block.
    counters   int32, 0 before and after a launch: of the ended groups of each layer, then of the ended blocks of each
               group.
"""

import triton
import triton.language as tl

# Fields of a row of `layers`: START in a buffer for one tensor per layer; HEIGHT to FAST_INDEX, the layout of W, whose
# column c has the coordinates slow = c // FAST and fast = c % FAST; U, V and SIGMA in `vectors`; PARTS and NORMS in
# `workspace`; GROUPS in `counters`; PARTIALS in `partials`, and their number.
(START, HEIGHT, WIDTH, FAST, ROW_STRIDE, SLOW_STRIDE, FAST_STRIDE, SLOW_INDEX, FAST_INDEX, U, V, SIGMA, PARTS, NORMS,
 GROUPS, PARTIALS, COUNT_PARTIALS) = (tl.constexpr(i) for i in range(17))  # fmt: skip
FIELDS = tl.constexpr(17)
UNROLL = tl.constexpr(4)
NO_GRADIENT = tl.constexpr(1 << 62)  # not a valid address


@triton.jit
def _field(layers, layer, FIELD: tl.constexpr):
    return tl.load(layers + layer * FIELDS + FIELD)


@triton.jit
def _size(layers, layer, FIELD: tl.constexpr):
    return _field(layers, layer, FIELD).to(tl.int32)


@triton.jit
def _pointer(address, like):
    return address.to(tl.pointer_type(like.dtype.element_ty))


@triton.jit
def _strides(layers, layer):
    return _size(layers, layer, FAST), _size(layers, layer, SLOW_STRIDE), _size(layers, layer, FAST_STRIDE)


@triton.jit
def _offsets(column, strides):
    return column // strides[0] * strides[1] + column % strides[0] * strides[2]


@triton.jit
def _index_strides(layers, layer):
    return _size(layers, layer, FAST), _size(layers, layer, SLOW_INDEX), _size(layers, layer, FAST_INDEX)


@triton.jit
def _padded(width):
    """Return the number of elements of a part, such that each part can be loaded 16 bytes at a time."""
    return tl.multiple_of((width + 3) // 4 * 4, 4)


@triton.jit
def _norm(x):
    """Return the norm of a vector and its largest magnitude, without overflow or underflow of squares."""
    largest = tl.max(tl.abs(x), 0)
    scaled = x / tl.where(largest > 0, largest, 1.0)
    return largest * tl.sqrt(tl.sum(scaled * scaled, 0)), largest


@triton.jit
def _hypotenuse(a, b):
    larger = tl.maximum(a, b)
    a, b = a / tl.where(larger > 0, larger, 1.0), b / tl.where(larger > 0, larger, 1.0)
    return larger * tl.sqrt(a * a + b * b)


@triton.jit
def _direction(vector, norm, previous, eps):
    """Return vector/norm, or the previous direction if norm is 0 or NaN, as for a vector that is not finite."""
    return tl.where(norm > 0, vector / tl.maximum(norm, eps), previous.to(tl.float32))


@triton.jit
def iterate_kernel(
    addresses, layers, blocks, vectors, workspace, counters, dtype_like, eps,
    FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_VECTOR: tl.constexpr,
):  # fmt: skip
    """One power iteration: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖ and σ ← uᵀWv, in the buffers and in `vectors`.

    A program owns BLOCK_ROWS rows. It computes their t = Wv and their part of Wᵀu. ‖Wv‖ of the whole layer is not known
    yet, so u is replaced by the direction of the program's t, and `_add_parts` weights the parts. The last program of
    GROUP blocks adds their parts, and the last program of the layer adds those of the groups and writes u, v and σ.

    Args:
        FIRST: read v from its buffer, else from `vectors`, which is more accurate.
    """
    layer = tl.load(blocks + 2 * tl.program_id(0))
    block = tl.load(blocks + 2 * tl.program_id(0) + 1)
    height, width = _size(layers, layer, HEIGHT), _size(layers, layer, WIDTH)
    strides, index_strides = _strides(layers, layer), _index_strides(layers, layer)
    u_buffer = _pointer(tl.load(addresses + 3 * layer + 1), dtype_like)
    v_buffer = _pointer(tl.load(addresses + 3 * layer + 2), dtype_like)
    u, v = vectors + _field(layers, layer, U), vectors + _field(layers, layer, V)

    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < height
    pointers = _pointer(tl.load(addresses + 3 * layer), dtype_like) + row[:, None] * _size(layers, layer, ROW_STRIDE)
    steps = tl.cdiv(width, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in tl.range(0, steps, loop_unroll_factor=2):
        column = step * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_mask = column < width
        index = _offsets(column, index_strides)
        if FIRST:
            direction = tl.load(v_buffer + index, mask=column_mask, other=0.0).to(tl.float32)
        else:
            direction = tl.load(v + index, mask=column_mask, other=0.0)
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(pointers + _offsets(column, strides)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tile * direction[None, :]
    t = tl.sum(total, 1)
    tl.store(u + row, t, mask=row_mask)
    norm, largest = _norm(t)
    # If all of Wv is 0, u keeps its direction, and every part is a product with it; see _add_parts.
    previous = tl.load(u_buffer + row, mask=row_mask, other=0.0).to(tl.float32)
    direction = tl.where(largest > 0, t / largest / (norm / largest), previous)

    parts = workspace + tl.multiple_of(_field(layers, layer, PARTS), 4)
    norms = workspace + _field(layers, layer, NORMS)
    part = parts + block * _padded(width)
    tl.store(norms + block, norm)
    for i in tl.range(0, steps, loop_unroll_factor=2):
        # In reverse, because the last tiles are the likeliest to be in the cache.
        column = (steps - 1 - i) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_mask = column < width
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(pointers + _offsets(column, strides)[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(part + column, tl.sum(tile * direction[:, None], 0), mask=column_mask)

    count = tl.cdiv(height, BLOCK_ROWS)
    groups = tl.cdiv(count, GROUP)
    first = block // GROUP * GROUP
    members = tl.minimum(GROUP, count - first)
    tl.debug_barrier()  # all threads have stored before one of them counts
    counter = counters + _field(layers, layer, GROUPS) + block // GROUP
    if tl.atomic_add(counter, 1, sem="acq_rel") == members - 1:
        tl.store(counter, 0)
        norm, s_norm = _add_parts(parts + first * _padded(width), norms + first, members, width, 1, GROUP, BLOCK_VECTOR)
        tl.debug_barrier()
        if tl.atomic_add(counters + layer, 1, sem="acq_rel") == groups - 1:
            tl.store(counters + layer, 0)
            if groups > 1:
                norm, s_norm = _add_parts(parts, norms, groups, width, GROUP, GROUP, BLOCK_VECTOR)
                tl.debug_barrier()
            # parts now begins with s = Wᵀt/‖t‖; u is t/‖t‖, or smaller if ‖t‖ is below eps.
            shrink = tl.where(norm > 0, norm / tl.maximum(norm, eps), 1.0)
            s_norm *= shrink
            sigma = s_norm * (s_norm / tl.maximum(s_norm, eps))
            tl.store(vectors + _field(layers, layer, SIGMA), tl.where(sigma == 0, 1.0, sigma))
            for start in range(0, width, BLOCK_VECTOR):
                element = start + tl.arange(0, BLOCK_VECTOR)
                index, in_v = _offsets(element, index_strides), element < width
                s = tl.load(parts + element, mask=in_v, other=0.0) * shrink
                s = _direction(s, s_norm, tl.load(v_buffer + index, mask=in_v, other=0.0), eps)
                tl.store(v_buffer + index, s, mask=in_v)
                tl.store(v + index, s, mask=in_v)
            for start in range(0, height, BLOCK_VECTOR):
                element = start + tl.arange(0, BLOCK_VECTOR)
                in_u = element < height
                new_u = tl.load(u + element, mask=in_u, other=0.0)
                new_u = _direction(new_u, norm, tl.load(u_buffer + element, mask=in_u, other=0.0), eps)
                tl.store(u_buffer + element, new_u, mask=in_u)
                tl.store(u + element, new_u, mask=in_u)


@triton.jit
def _add_parts(parts, norms, count, width, STRIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_VECTOR: tl.constexpr):
    """Replace part 0 by the weighted sum of the parts 0, STRIDE, 2·STRIDE, …, in this order.

    A part is the product of rows of W with the direction of their t; the sum is the one with the direction of all of
    their t. The weights are the norms of the t, divided by the norm of all, which also replaces norm 0.

    Returns:
        The norm of t and the norm of the sum.
    """
    member = tl.arange(0, GROUP)
    norm = 0.0
    for start in range(0, count, GROUP):
        index = start + member
        group_norm, _ = _norm(tl.load(norms + index * STRIDE, mask=index < count, other=0.0))
        norm = _hypotenuse(norm, group_norm)
    sum_norm = 0.0
    for start_column in range(0, width, BLOCK_VECTOR):
        column = start_column + tl.arange(0, BLOCK_VECTOR)
        mask = column < _padded(width)
        total = tl.zeros((BLOCK_VECTOR,), tl.float32)
        for i in tl.range(0, count, loop_unroll_factor=UNROLL):
            # If all of t is 0, parts are products with the previous u.
            weight = tl.where(norm > 0, tl.load(norms + i * STRIDE) / norm, 1.0)
            total += weight * tl.load(parts + i * STRIDE * _padded(width) + column, mask=mask, other=0.0)
        total = tl.where(column < width, total, 0.0)
        tl.store(parts + column, total, mask=mask)
        block_norm, _ = _norm(total)
        sum_norm = _hypotenuse(sum_norm, block_norm)
    tl.store(norms, norm)
    return norm, sum_norm


@triton.jit
def divide_kernel(addresses, layers, blocks, vectors, normalized, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Ŵ ← W/σ for BLOCK consecutive elements in memory. ALIGNED: the addresses of all W are multiples of 16."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK
    count = _size(layers, layer, HEIGHT) * _size(layers, layer, WIDTH)
    weight = _pointer(tl.load(addresses + 3 * layer), normalized)
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    normalized += tl.multiple_of(_field(layers, layer, START), 16)
    sigma = tl.load(vectors + _field(layers, layer, SIGMA))
    element = first + tl.arange(0, BLOCK)
    if first + BLOCK <= count:  # without masks, elements are loaded and stored 16 bytes at a time
        tl.store(normalized + element, tl.load(weight + element).to(tl.float32) / sigma)
    else:
        mask = element < count
        tile = tl.load(weight + element, mask=mask, other=0.0).to(tl.float32)
        tl.store(normalized + element, tile / sigma, mask=mask)


@triton.jit
def _select(addresses, layer, COUNT: tl.constexpr):
    """Return addresses[layer]; a tuple cannot be indexed by a run-time value."""
    address = addresses[0]
    for i in tl.static_range(1, COUNT):
        address = tl.where(layer == i, addresses[i], address)
    return address


@triton.jit
def inner_kernel(layers, blocks, grad_outputs, normalized, partials, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """⟨G, Ŵ⟩ over BLOCK consecutive elements.

    Args:
        grad_outputs: address of each G, a multiple of 16, or NO_GRADIENT; G has the strides of its weight.
    """
    layer = tl.load(blocks + 2 * tl.program_id(0))
    block = tl.load(blocks + 2 * tl.program_id(0) + 1)
    address = _select(grad_outputs, layer, COUNT)
    if address != NO_GRADIENT:
        grad_output = tl.multiple_of(_pointer(address, normalized), 16)
        normalized += tl.multiple_of(_field(layers, layer, START), 16)
        element = block * BLOCK + tl.arange(0, BLOCK)
        count = _size(layers, layer, HEIGHT) * _size(layers, layer, WIDTH)
        if (block + 1) * BLOCK <= count:
            products = tl.load(grad_output + element).to(tl.float32) * tl.load(normalized + element).to(tl.float32)
        else:
            mask = element < count
            products = tl.load(grad_output + element, mask=mask, other=0.0).to(tl.float32)
            products *= tl.load(normalized + element, mask=mask, other=0.0).to(tl.float32)
        tl.store(partials + _field(layers, layer, PARTIALS) + block, tl.sum(products, 0))


@triton.jit
def gradient_kernel(
    layers, blocks, grad_outputs, vectors, partials, gradients,
    COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr,
):  # fmt: skip
    """dW ← (G − ⟨G, Ŵ⟩ u vᵀ)/σ for a block of rows and columns."""
    layer = tl.load(blocks + 3 * tl.program_id(0))
    row = tl.load(blocks + 3 * tl.program_id(0) + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.load(blocks + 3 * tl.program_id(0) + 2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    address = _select(grad_outputs, layer, COUNT)
    if address != NO_GRADIENT:
        row_mask, column_mask = row < _size(layers, layer, HEIGHT), column < _size(layers, layer, WIDTH)
        mask = row_mask[:, None] & column_mask[None, :]
        offsets = row[:, None] * _size(layers, layer, ROW_STRIDE) + _offsets(column, _strides(layers, layer))[None, :]
        tile = tl.load(_pointer(address, gradients) + offsets, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(vectors + _field(layers, layer, U) + row, mask=row_mask, other=0.0)
        index = _offsets(column, _index_strides(layers, layer))
        v = tl.load(vectors + _field(layers, layer, V) + index, mask=column_mask, other=0.0)
        sigma = tl.load(vectors + _field(layers, layer, SIGMA))
        partials += _field(layers, layer, PARTIALS)
        count = _size(layers, layer, COUNT_PARTIALS)
        inner = tl.zeros((BLOCK_PARTIALS,), tl.float32)
        for start in range(0, count, BLOCK_PARTIALS):
            partial = start + tl.arange(0, BLOCK_PARTIALS)
            inner += tl.load(partials + partial, mask=partial < count, other=0.0)
        gradient = (tile - (tl.sum(inner, 0) * u)[:, None] * v[None, :]) / sigma
        tl.store(gradients + _field(layers, layer, START) + offsets, gradient, mask=mask)
