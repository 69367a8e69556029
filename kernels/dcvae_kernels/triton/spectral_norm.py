"""Spectral norm in Triton: `update` and `gradients`, for all layers of a network in a constant number of launches.

    update      rows_kernel      t ← Wv, where v is the buffer or, after the first iteration, the direction of s
                columns_kernel   s ← Wᵀu, where u is the direction of t
                divide_kernel    Ŵ ← W/σ with σ = ‖s‖, and the new u and v
    gradients   inner_kernel     partial sums of ⟨G, Ŵ⟩
                gradient_kernel  dW ← (G − ⟨G, Ŵ⟩ u vᵀ)/σ

Each program processes one block of one layer, which it looks up in tables on the device. Every program recomputes the
norms and directions that it needs, from vectors in the cache. Sums have a fixed order, without atomics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcvae_kernels.reference import Layers
from dcvae_kernels.triton import on_device

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_LAYERS = 256  # `gradients` passes one pointer argument per layer
LAUNCH = {"enable_fp_fusion": True, "num_warps": 4}
ROWS, COLUMNS = (8, 256), (32, 64)  # block sizes of the kernels over rows, and of columns_kernel
ALIGNMENT = 64  # elements; each layer starts at a multiple of it in a buffer

# Fields of a row of `Plan.layers`.
(WEIGHT, U, V, OFFSET, HEIGHT, WIDTH, FAST, ROW_STRIDE, SLOW_STRIDE, FAST_STRIDE, SLOW_INDEX, FAST_INDEX, FIRST_ROW,
 FIRST_COLUMN, FIRST_BLOCK, BLOCKS) = (tl.constexpr(i) for i in range(16))  # fmt: skip
FIELDS = tl.constexpr(16)
NO_GRADIENT = tl.constexpr(1 << 62)  # not a valid address


# Device code ----------------------------------------------------------------------------------------------------------


@triton.jit
def _field(layers, layer, FIELD: tl.constexpr):
    return tl.load(layers + layer * FIELDS + FIELD)


@triton.jit
def _size(layers, layer, FIELD: tl.constexpr):
    return tl.load(layers + layer * FIELDS + FIELD).to(tl.int32)


@triton.jit
def _columns(layers, layer, first, BLOCK: tl.constexpr):
    """Return the mask of BLOCK columns from `first` in memory order, their memory offsets, and their indices in v."""
    column = first + tl.arange(0, BLOCK)
    fast = _size(layers, layer, FAST)
    slow, fast_index = column // fast, column % fast
    offsets = slow * _size(layers, layer, SLOW_STRIDE) + fast_index * _size(layers, layer, FAST_STRIDE)
    index = slow * _size(layers, layer, SLOW_INDEX) + fast_index * _size(layers, layer, FAST_INDEX)
    return column < _size(layers, layer, WIDTH), offsets, index


@triton.jit
def _norm(vector, count, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        part = tl.load(vector + index, mask=index < count, other=0.0)
        squares += part * part
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit
def _direction(vector, norm, previous, eps):
    """vector/norm, or the previous direction if the vector is 0 or NaN."""
    return tl.where(norm > 0, vector / tl.maximum(norm, eps), previous.to(tl.float32))


@triton.jit
def _sigma(norm, eps):
    """uᵀWv, which is ‖s‖, or less if ‖s‖ is below eps; 1 instead of 0."""
    sigma = norm * (norm / tl.maximum(norm, eps)) + 0.0 * norm
    return tl.where(sigma == 0, 1.0, sigma)


@triton.jit
def rows_kernel(
    layers, blocks, ts, ss, dtype_like, eps,
    FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """t ← Wv for a block of rows; v is the buffer in the FIRST iteration, then the direction of s."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    row = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < _size(layers, layer, HEIGHT)
    weight = _field(layers, layer, WEIGHT).to(tl.pointer_type(dtype_like.dtype.element_ty))
    v = _field(layers, layer, V).to(tl.pointer_type(dtype_like.dtype.element_ty))
    ss += _field(layers, layer, FIRST_COLUMN)
    width = _size(layers, layer, WIDTH)
    norm = 0.0
    if not FIRST:
        norm = _norm(ss, width, 1024)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        column_mask, offsets, index = _columns(layers, layer, first, BLOCK_COLUMNS)
        vector = tl.load(v + index, mask=column_mask, other=0.0).to(tl.float32)
        if not FIRST:
            vector = _direction(tl.load(ss + index, mask=column_mask, other=0.0), norm, vector, eps)
        pointers = weight + row[:, None] * _size(layers, layer, ROW_STRIDE) + offsets[None, :]
        tile = tl.load(pointers, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        total += tile * vector[None, :]
    tl.store(ts + _field(layers, layer, FIRST_ROW) + row, tl.sum(total, 1), mask=row_mask)


@triton.jit
def columns_kernel(layers, blocks, ts, ss, dtype_like, eps, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """s ← Wᵀu for a block of columns."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_COLUMNS
    column_mask, offsets, index = _columns(layers, layer, first, BLOCK_COLUMNS)
    weight = _field(layers, layer, WEIGHT).to(tl.pointer_type(dtype_like.dtype.element_ty))
    u = _field(layers, layer, U).to(tl.pointer_type(dtype_like.dtype.element_ty))
    ts += _field(layers, layer, FIRST_ROW)
    height = _size(layers, layer, HEIGHT)
    norm = _norm(ts, height, 256)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first_row in range(0, height, BLOCK_ROWS):
        row = first_row + tl.arange(0, BLOCK_ROWS)
        row_mask = row < height
        vector = tl.load(ts + row, mask=row_mask, other=0.0)
        vector = _direction(vector, norm, tl.load(u + row, mask=row_mask, other=0.0), eps)
        pointers = weight + row[:, None] * _size(layers, layer, ROW_STRIDE) + offsets[None, :]
        tile = tl.load(pointers, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        total += tile * vector[:, None]
    tl.store(ss + _field(layers, layer, FIRST_COLUMN) + index, tl.sum(total, 0), mask=column_mask)


@triton.jit
def divide_kernel(
    layers, blocks, ts, ss, us, vs, sigmas, normalized, eps, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Ŵ ← W/σ for a block of rows. The first program of a layer also writes σ, and the new u and v.

    u and v are written to the buffers of the layer, and to us and vs for the backward pass.
    """
    layer = tl.load(blocks + 2 * tl.program_id(0))
    block = tl.load(blocks + 2 * tl.program_id(0) + 1)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    height, width = _size(layers, layer, HEIGHT), _size(layers, layer, WIDTH)
    row_mask = row < height
    weight = _field(layers, layer, WEIGHT).to(tl.pointer_type(normalized.dtype.element_ty))
    first_row, first_column = _field(layers, layer, FIRST_ROW), _field(layers, layer, FIRST_COLUMN)
    normalized += _field(layers, layer, OFFSET)
    s_norm = _norm(ss + first_column, width, 1024)
    sigma = _sigma(s_norm, eps)
    for first in range(0, width, BLOCK_COLUMNS):
        column_mask, offsets, _ = _columns(layers, layer, first, BLOCK_COLUMNS)
        offsets = row[:, None] * _size(layers, layer, ROW_STRIDE) + offsets[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(normalized + offsets, tile / sigma, mask=mask)
    if block == 0:
        tl.store(sigmas + layer, sigma)
        u = _field(layers, layer, U).to(tl.pointer_type(normalized.dtype.element_ty))
        v = _field(layers, layer, V).to(tl.pointer_type(normalized.dtype.element_ty))
        _write_direction(u, us + first_row, ts + first_row, _norm(ts + first_row, height, 256), height, eps, 256)
        _write_direction(v, vs + first_column, ss + first_column, s_norm, width, eps, 1024)


@triton.jit
def _write_direction(buffer, copy, vector, norm, count, eps, BLOCK: tl.constexpr):
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        part = tl.load(vector + index, mask=index < count, other=0.0)
        part = _direction(part, norm, tl.load(buffer + index, mask=index < count, other=0.0), eps)
        tl.store(buffer + index, part, mask=index < count)
        tl.store(copy + index, part, mask=index < count)


@triton.jit
def _select(addresses, layer, COUNT: tl.constexpr):
    """Return addresses[layer]; a tuple cannot be indexed by a run-time value."""
    address = addresses[0]
    for i in tl.static_range(1, COUNT):
        address = tl.where(layer == i, addresses[i], address)
    return address


@triton.jit
def inner_kernel(
    layers, blocks, addresses, normalized, partials,
    COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """⟨G, Ŵ⟩ over a block of rows. addresses: of each layer's G, in the layout of its weight, or NO_GRADIENT."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    row = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < _size(layers, layer, HEIGHT)
    address = _select(addresses, layer, COUNT)
    if address != NO_GRADIENT:
        grad_output = address.to(tl.pointer_type(normalized.dtype.element_ty))
        normalized += _field(layers, layer, OFFSET)
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for first in range(0, _size(layers, layer, WIDTH), BLOCK_COLUMNS):
            column_mask, offsets, _ = _columns(layers, layer, first, BLOCK_COLUMNS)
            offsets = row[:, None] * _size(layers, layer, ROW_STRIDE) + offsets[None, :]
            mask = row_mask[:, None] & column_mask[None, :]
            tile = tl.load(grad_output + offsets, mask=mask, other=0.0).to(tl.float32)
            total += tile * tl.load(normalized + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(partials + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def gradient_kernel(
    layers, blocks, addresses, partials, us, vs, sigmas, gradients,
    COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dW ← (G − ⟨G, Ŵ⟩ u vᵀ)/σ for a block of rows."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    row = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < _size(layers, layer, HEIGHT)
    address = _select(addresses, layer, COUNT)
    if address != NO_GRADIENT:
        grad_output = address.to(tl.pointer_type(gradients.dtype.element_ty))
        gradients += _field(layers, layer, OFFSET)
        partials += _field(layers, layer, FIRST_BLOCK)
        inner = tl.zeros((256,), tl.float32)
        count = _size(layers, layer, BLOCKS)
        for first in range(0, count, 256):
            block = first + tl.arange(0, 256)
            inner += tl.load(partials + block, mask=block < count, other=0.0)
        inner = tl.sum(inner, 0)
        sigma = tl.load(sigmas + layer)
        u = inner * tl.load(us + _field(layers, layer, FIRST_ROW) + row, mask=row_mask, other=0.0)
        vs += _field(layers, layer, FIRST_COLUMN)
        for first in range(0, _size(layers, layer, WIDTH), BLOCK_COLUMNS):
            column_mask, offsets, index = _columns(layers, layer, first, BLOCK_COLUMNS)
            offsets = row[:, None] * _size(layers, layer, ROW_STRIDE) + offsets[None, :]
            mask = row_mask[:, None] & column_mask[None, :]
            tile = tl.load(grad_output + offsets, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(vs + index, mask=column_mask, other=0.0)
            tl.store(gradients + offsets, (tile - u[:, None] * v[None, :]) / sigma, mask=mask)


# Launches -------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Addresses and layouts of the layers, and the assignment of blocks to programs.

    Attributes:
        layers: int64 [layers, FIELDS], on the device.
        row_blocks, column_blocks: int32 [programs, 2], the layer and the block within it; on the device.
        views: (start, size, stride) of each layer in a buffer for one tensor per layer.
        elements: size of such a buffer.
        rows, columns: sum of the heights and of the widths of all layers.
    """

    layers: Tensor
    row_blocks: Tensor
    column_blocks: Tensor
    views: tuple[tuple[int, torch.Size, tuple[int, ...]], ...]
    elements: int
    rows: int
    columns: int


class Saved(NamedTuple):
    """Tensors saved for the backward pass: Ŵ of all layers in one buffer, and copies of u, v and σ."""

    normalized: Tensor
    us: Tensor
    vs: Tensor
    sigmas: Tensor


def layout(weight: Tensor, dim: int) -> tuple[int, ...] | None:
    """Return the fields HEIGHT to FAST_INDEX of a weight, or None if it is neither contiguous nor channels-last."""
    channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    if not (weight.is_contiguous() or channels_last):
        return None
    other = 1 - dim
    taps = weight.numel() // (weight.shape[0] * weight.shape[1])
    height, depth = weight.shape[dim], weight.shape[other]
    width = depth * taps
    if weight.is_contiguous():
        tap_stride, row_stride, depth_stride = 1, weight.stride(dim), weight.stride(other)
    else:
        tap_stride, row_stride, depth_stride = weight.shape[1], weight.stride(dim), weight.stride(other)
    if dim == 0 and weight.is_contiguous():
        return height, width, width, width, 0, 1, 0, 1
    if dim == 0:  # channels-last: the depth is innermost in memory
        return height, width, depth, row_stride, tap_stride, depth_stride, 1, taps
    return height, width, taps, row_stride, depth_stride, tap_stride, taps, 1


def make_plan(layers: Layers) -> Plan | None:
    """Copy the tables to the device, or return None for an unsupported dtype or layout, or too many layers.

    A CUDA graph cannot capture these copies; they take place during its warm-up.
    """
    if layers.weights[0].dtype not in DTYPES or len(layers.weights) > MAX_LAYERS:
        return None
    records, row_blocks, column_blocks, views = [], [], [], []
    elements = rows = columns = 0
    for i, (weight, u, v, dim) in enumerate(zip(*layers, strict=True)):
        fields = layout(weight, dim)
        if fields is None or not (u.is_contiguous() and v.is_contiguous()):
            return None
        height, width = fields[:2]
        count = triton.cdiv(height, ROWS[0])
        pointers = (weight.data_ptr(), u.data_ptr(), v.data_ptr(), elements)
        records.append((*pointers, *fields, rows, columns, len(row_blocks), count))
        row_blocks += [(i, block) for block in range(count)]
        column_blocks += [(i, block) for block in range(triton.cdiv(width, COLUMNS[1]))]
        views.append((elements, weight.shape, weight.stride()))
        elements += triton.cdiv(weight.numel(), ALIGNMENT) * ALIGNMENT
        rows, columns = rows + height, columns + width
    device = layers.weights[0].device
    tables = (
        torch.tensor(records, device=device, dtype=torch.int64),
        torch.tensor(row_blocks, device=device, dtype=torch.int32),
        torch.tensor(column_blocks, device=device, dtype=torch.int32),
    )
    return Plan(*tables, tuple(views), elements, rows, columns)


def update(plan: Plan, weights: Sequence[Tensor], n_power_iterations: int, eps: float) -> tuple[list[Tensor], Saved]:
    """Update u and v in place. Return W/σ of each weight, as tensors that share a buffer."""
    like = weights[0]
    normalized = like.new_empty(plan.elements)
    layers = len(weights)
    floats = like.new_empty(2 * (plan.rows + plan.columns) + layers, dtype=torch.float32)
    ts, ss, us, vs, sigmas = floats.split([plan.rows, plan.columns, plan.rows, plan.columns, layers])
    row_grid, column_grid = (len(plan.row_blocks),), (len(plan.column_blocks),)
    with on_device(like.device):
        for i in range(n_power_iterations):
            rows_kernel[row_grid](plan.layers, plan.row_blocks, ts, ss, normalized, eps, i == 0, *ROWS, **LAUNCH)
            columns_kernel[column_grid](plan.layers, plan.column_blocks, ts, ss, normalized, eps, *COLUMNS, **LAUNCH)
        divide_kernel[row_grid](plan.layers, plan.row_blocks, ts, ss, us, vs, sigmas, normalized, eps, *ROWS, **LAUNCH)
    return _tensors(plan, normalized), Saved(normalized, us, vs, sigmas)


def gradients(plan: Plan, saved: Saved, grad_output: Sequence[Tensor | None]) -> list[Tensor]:
    """Return dW of each weight; its values are undefined if the incoming gradient is None."""
    grads = [
        x if x is None or x.stride() == stride else x.new_empty_strided(size, stride).copy_(x)
        for x, (_, size, stride) in zip(grad_output, plan.views, strict=True)
    ]
    addresses = tuple(NO_GRADIENT if x is None else x.data_ptr() for x in grads)
    result = torch.empty_like(saved.normalized)
    grid = (len(plan.row_blocks),)
    partials = saved.us.new_empty(len(plan.row_blocks))
    count = len(addresses)
    with on_device(result.device):
        inner_kernel[grid](plan.layers, plan.row_blocks, addresses, saved.normalized, partials, count, *ROWS, **LAUNCH)
        gradient_kernel[grid](
            plan.layers, plan.row_blocks, addresses, partials, saved.us, saved.vs, saved.sigmas, result, count, *ROWS,
            **LAUNCH,
        )  # fmt: skip
    return _tensors(plan, result)


def _tensors(plan: Plan, buffer: Tensor) -> list[Tensor]:
    """Return the tensor of each layer in a buffer, not as views, which autograd would treat as one tensor."""
    storage, first = buffer.untyped_storage(), buffer.storage_offset()
    return [buffer.new_empty(0).set_(storage, first + start, size, stride) for start, size, stride in plan.views]
