"""Spectral norm in Triton: `update` and `gradients`, for all layers of a network in a constant number of launches.

    update      rows_kernel      t ← Wv, with v as it is or, in a further iteration, the direction of Wᵀu
                columns_kernel   s ← Wᵀu, with u the direction of t
                divide_kernel    Ŵ ← W/σ with σ = ‖s‖, and the new u and v
    gradients   inner_kernel     parts of ⟨G, Ŵ⟩
                gradient_kernel  dW ← (G − ⟨G, Ŵ⟩ u vᵀ)/σ

Each program works on one block of one layer; tables on the device tell it which, and where the layer is. Directions and
norms are found anew by whoever needs them, from vectors that the cache holds. Sums have a fixed order: no atomics.
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
MAX_LAYERS = 256  # `gradients` passes a pointer for each as an argument
LAUNCH = {"enable_fp_fusion": True, "num_warps": 4}
ROWS, COLUMNS = (8, 256), (32, 64)  # a block of the kernels that own rows, and of the one that owns columns
ALIGNMENT = 64  # elements; each layer's part of a buffer starts at a multiple

# Fields of a layer's record.
(WEIGHT, U, V, PART, HEIGHT, WIDTH, FAST, ROW_STRIDE, SLOW_STRIDE, FAST_STRIDE, SLOW_INDEX, FAST_INDEX, FIRST_ROW,
 FIRST_COLUMN, FIRST_BLOCK, BLOCKS) = (tl.constexpr(i) for i in range(16))  # fmt: skip
FIELDS = tl.constexpr(16)
NOTHING = tl.constexpr(1 << 62)  # no address


# Device code ----------------------------------------------------------------------------------------------------------


@triton.jit
def _field(layers, layer, FIELD: tl.constexpr):
    return tl.load(layers + layer * FIELDS + FIELD)


@triton.jit
def _size(layers, layer, FIELD: tl.constexpr):
    return tl.load(layers + layer * FIELDS + FIELD).to(tl.int32)


@triton.jit
def _columns(layers, layer, first, BLOCK: tl.constexpr):
    """Of the columns that follow each other in memory from `first`: which there are, where, and their place in v."""
    column = first + tl.arange(0, BLOCK)
    fast = _size(layers, layer, FAST)
    slow, fast_index = column // fast, column % fast
    at = slow * _size(layers, layer, SLOW_STRIDE) + fast_index * _size(layers, layer, FAST_STRIDE)
    index = slow * _size(layers, layer, SLOW_INDEX) + fast_index * _size(layers, layer, FAST_INDEX)
    return column < _size(layers, layer, WIDTH), at, index


@triton.jit
def _norm(vector, count, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        part = tl.load(vector + at, mask=at < count, other=0.0)
        squares += part * part
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit
def _direction(vector, norm, previous, eps):
    """vector/norm, but the previous direction where the vector is 0 or NaN."""
    return tl.where(norm > 0, vector / tl.maximum(norm, eps), previous.to(tl.float32))


@triton.jit
def _sigma(norm, eps):
    """uᵀWv = ‖s‖, or less where that is below eps; 1 where it is 0."""
    sigma = norm * (norm / tl.maximum(norm, eps)) + 0.0 * norm
    return tl.where(sigma == 0, 1.0, sigma)


@triton.jit
def rows_kernel(
    layers, blocks, ts, ss, weights_like, eps,
    FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """t ← Wv for a block of rows; v is the buffer's in the FIRST iteration."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    row = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_present = row < _size(layers, layer, HEIGHT)
    weight = _field(layers, layer, WEIGHT).to(tl.pointer_type(weights_like.dtype.element_ty))
    v = _field(layers, layer, V).to(tl.pointer_type(weights_like.dtype.element_ty))
    ss += _field(layers, layer, FIRST_COLUMN)
    width = _size(layers, layer, WIDTH)
    norm = 0.0
    if not FIRST:
        norm = _norm(ss, width, 1024)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        present, at, index = _columns(layers, layer, first, BLOCK_COLUMNS)
        vector = tl.load(v + index, mask=present, other=0.0).to(tl.float32)
        if not FIRST:
            vector = _direction(tl.load(ss + index, mask=present, other=0.0), norm, vector, eps)
        to = weight + row[:, None] * _size(layers, layer, ROW_STRIDE) + at[None, :]
        tile = tl.load(to, mask=row_present[:, None] & present[None, :], other=0.0).to(tl.float32)
        total += tile * vector[None, :]
    tl.store(ts + _field(layers, layer, FIRST_ROW) + row, tl.sum(total, 1), mask=row_present)


@triton.jit
def columns_kernel(layers, blocks, ts, ss, weights_like, eps, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """s ← Wᵀu for a block of columns."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_COLUMNS
    present, at, index = _columns(layers, layer, first, BLOCK_COLUMNS)
    weight = _field(layers, layer, WEIGHT).to(tl.pointer_type(weights_like.dtype.element_ty))
    u = _field(layers, layer, U).to(tl.pointer_type(weights_like.dtype.element_ty))
    ts += _field(layers, layer, FIRST_ROW)
    height = _size(layers, layer, HEIGHT)
    norm = _norm(ts, height, 256)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first_row in range(0, height, BLOCK_ROWS):
        row = first_row + tl.arange(0, BLOCK_ROWS)
        row_present = row < height
        vector = tl.load(ts + row, mask=row_present, other=0.0)
        vector = _direction(vector, norm, tl.load(u + row, mask=row_present, other=0.0), eps)
        to = weight + row[:, None] * _size(layers, layer, ROW_STRIDE) + at[None, :]
        tile = tl.load(to, mask=row_present[:, None] & present[None, :], other=0.0).to(tl.float32)
        total += tile * vector[:, None]
    tl.store(ss + _field(layers, layer, FIRST_COLUMN) + index, tl.sum(total, 0), mask=present)


@triton.jit
def divide_kernel(
    layers, blocks, ts, ss, us, vs, sigmas, normalized, eps, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Ŵ ← W/σ for a block of rows; a layer's first program also writes u, v and σ, to the buffers and for backward."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    block = tl.load(blocks + 2 * tl.program_id(0) + 1)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    height, width = _size(layers, layer, HEIGHT), _size(layers, layer, WIDTH)
    row_present = row < height
    weight = _field(layers, layer, WEIGHT).to(tl.pointer_type(normalized.dtype.element_ty))
    first_row, first_column = _field(layers, layer, FIRST_ROW), _field(layers, layer, FIRST_COLUMN)
    normalized += _field(layers, layer, PART)
    s_norm = _norm(ss + first_column, width, 1024)
    sigma = _sigma(s_norm, eps)
    for first in range(0, width, BLOCK_COLUMNS):
        present, at, _ = _columns(layers, layer, first, BLOCK_COLUMNS)
        at = row[:, None] * _size(layers, layer, ROW_STRIDE) + at[None, :]
        mask = row_present[:, None] & present[None, :]
        tl.store(normalized + at, tl.load(weight + at, mask=mask, other=0.0).to(tl.float32) / sigma, mask=mask)
    if block == 0:
        tl.store(sigmas + layer, sigma)
        u = _field(layers, layer, U).to(tl.pointer_type(normalized.dtype.element_ty))
        v = _field(layers, layer, V).to(tl.pointer_type(normalized.dtype.element_ty))
        _write_direction(u, us + first_row, ts + first_row, _norm(ts + first_row, height, 256), height, eps, 256)
        _write_direction(v, vs + first_column, ss + first_column, s_norm, width, eps, 1024)


@triton.jit
def _write_direction(buffer, copy, vector, norm, count, eps, BLOCK: tl.constexpr):
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        part = tl.load(vector + at, mask=at < count, other=0.0)
        part = _direction(part, norm, tl.load(buffer + at, mask=at < count, other=0.0), eps)
        tl.store(buffer + at, part, mask=at < count)
        tl.store(copy + at, part, mask=at < count)


@triton.jit
def _chosen(addresses, layer, COUNT: tl.constexpr):
    """addresses[layer], of a tuple."""
    address = addresses[0]
    for i in tl.static_range(1, COUNT):
        address = tl.where(layer == i, addresses[i], address)
    return address


@triton.jit
def inner_kernel(
    layers, blocks, addresses, normalized, parts,
    COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """⟨G, Ŵ⟩ over a block of rows. addresses: of each layer's G, laid out like its weight, or NOTHING."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    row = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_present = row < _size(layers, layer, HEIGHT)
    address = _chosen(addresses, layer, COUNT)
    if address != NOTHING:
        grad_output = address.to(tl.pointer_type(normalized.dtype.element_ty))
        normalized += _field(layers, layer, PART)
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for first in range(0, _size(layers, layer, WIDTH), BLOCK_COLUMNS):
            present, at, _ = _columns(layers, layer, first, BLOCK_COLUMNS)
            at = row[:, None] * _size(layers, layer, ROW_STRIDE) + at[None, :]
            mask = row_present[:, None] & present[None, :]
            tile = tl.load(grad_output + at, mask=mask, other=0.0).to(tl.float32)
            total += tile * tl.load(normalized + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(parts + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def gradient_kernel(
    layers, blocks, addresses, parts, us, vs, sigmas, gradients,
    COUNT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dW ← (G − ⟨G, Ŵ⟩ u vᵀ)/σ for a block of rows."""
    layer = tl.load(blocks + 2 * tl.program_id(0))
    row = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_present = row < _size(layers, layer, HEIGHT)
    address = _chosen(addresses, layer, COUNT)
    if address != NOTHING:
        grad_output = address.to(tl.pointer_type(gradients.dtype.element_ty))
        gradients += _field(layers, layer, PART)
        parts += _field(layers, layer, FIRST_BLOCK)
        inner = tl.zeros((256,), tl.float32)
        count = _size(layers, layer, BLOCKS)
        for first in range(0, count, 256):
            part = first + tl.arange(0, 256)
            inner += tl.load(parts + part, mask=part < count, other=0.0)
        inner = tl.sum(inner, 0)
        sigma = tl.load(sigmas + layer)
        u = inner * tl.load(us + _field(layers, layer, FIRST_ROW) + row, mask=row_present, other=0.0)
        vs += _field(layers, layer, FIRST_COLUMN)
        for first in range(0, _size(layers, layer, WIDTH), BLOCK_COLUMNS):
            present, at, index = _columns(layers, layer, first, BLOCK_COLUMNS)
            at = row[:, None] * _size(layers, layer, ROW_STRIDE) + at[None, :]
            mask = row_present[:, None] & present[None, :]
            tile = tl.load(grad_output + at, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(vs + index, mask=present, other=0.0)
            tl.store(gradients + at, (tile - u[:, None] * v[None, :]) / sigma, mask=mask)


# Launches -------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Where the layers are and who works on what; on the device. Sizes are numbers of elements.

    layers: int64 [layers, FIELDS]. row_blocks, column_blocks: int32 [programs, 2], the layer and which of its blocks.
    parts: each layer's (start, size, stride) in a buffer that holds one tensor for each.
    """

    layers: Tensor
    row_blocks: Tensor
    column_blocks: Tensor
    parts: tuple[tuple[int, torch.Size, tuple[int, ...]], ...]
    elements: int
    rows: int
    columns: int


class Saved(NamedTuple):
    """What an update leaves for its backward pass: Ŵ of all layers in one buffer; u, v and σ."""

    normalized: Tensor
    us: Tensor
    vs: Tensor
    sigmas: Tensor


def layout(weight: Tensor, dim: int) -> tuple[int, ...] | None:
    """The fields HEIGHT to FAST_INDEX of a weight's record, or None if it is not laid out as torch's layers are."""
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
    if dim == 0:  # channels last: memory runs along the depth
        return height, width, depth, row_stride, tap_stride, depth_stride, 1, taps
    return height, width, taps, row_stride, depth_stride, tap_stride, taps, 1


def make_plan(layers: Layers) -> Plan | None:
    """Copies the tables to the device, which a CUDA graph cannot capture; but its warm-up has done that before.

    None for what the kernels do not take: other dtypes, other layouts, too many layers.
    """
    if layers.weights[0].dtype not in DTYPES or len(layers.weights) > MAX_LAYERS:
        return None
    records, row_blocks, column_blocks, parts = [], [], [], []
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
        parts.append((elements, weight.shape, weight.stride()))
        elements += triton.cdiv(weight.numel(), ALIGNMENT) * ALIGNMENT
        rows, columns = rows + height, columns + width
    device = layers.weights[0].device
    tables = (
        torch.tensor(records, device=device, dtype=torch.int64),
        torch.tensor(row_blocks, device=device, dtype=torch.int32),
        torch.tensor(column_blocks, device=device, dtype=torch.int32),
    )
    return Plan(*tables, tuple(parts), elements, rows, columns)


def update(plan: Plan, weights: Sequence[Tensor], n_power_iterations: int, eps: float) -> tuple[list[Tensor], Saved]:
    """Updates u and v in place; W/σ of each weight, as tensors that share a buffer."""
    like = weights[0]
    normalized = like.new_empty(plan.elements)
    layers = len(weights)
    floats = like.new_empty(2 * (plan.rows + plan.columns) + layers, dtype=torch.float32)
    ts, ss, us, vs, sigmas = floats.split([plan.rows, plan.columns, plan.rows, plan.columns, layers])
    by_rows, by_columns = (len(plan.row_blocks),), (len(plan.column_blocks),)
    with on_device(like.device):
        for i in range(n_power_iterations):
            rows_kernel[by_rows](plan.layers, plan.row_blocks, ts, ss, normalized, eps, i == 0, *ROWS, **LAUNCH)
            columns_kernel[by_columns](plan.layers, plan.column_blocks, ts, ss, normalized, eps, *COLUMNS, **LAUNCH)
        divide_kernel[by_rows](plan.layers, plan.row_blocks, ts, ss, us, vs, sigmas, normalized, eps, *ROWS, **LAUNCH)
    return _parts(plan, normalized), Saved(normalized, us, vs, sigmas)


def gradients(plan: Plan, saved: Saved, grad_output: Sequence[Tensor | None]) -> list[Tensor]:
    """dW of each weight, undefined where nothing comes in."""
    laid_out = [
        x if x is None or x.stride() == stride else x.new_empty_strided(size, stride).copy_(x)
        for x, (_, size, stride) in zip(grad_output, plan.parts, strict=True)
    ]
    addresses = tuple(NOTHING if x is None else x.data_ptr() for x in laid_out)
    result = torch.empty_like(saved.normalized)
    grid = (len(plan.row_blocks),)
    parts = saved.us.new_empty(len(plan.row_blocks))
    count = len(addresses)
    with on_device(result.device):
        inner_kernel[grid](plan.layers, plan.row_blocks, addresses, saved.normalized, parts, count, *ROWS, **LAUNCH)
        gradient_kernel[grid](
            plan.layers, plan.row_blocks, addresses, parts, saved.us, saved.vs, saved.sigmas, result, count, *ROWS,
            **LAUNCH,
        )  # fmt: skip
    return _parts(plan, result)


def _parts(plan: Plan, buffer: Tensor) -> list[Tensor]:
    """The layers' tensors in a buffer; not as views of it, which autograd would treat as one."""
    storage, first = buffer.untyped_storage(), buffer.storage_offset()
    return [buffer.new_empty(0).set_(storage, first + start, size, stride) for start, size, stride in plan.parts]
