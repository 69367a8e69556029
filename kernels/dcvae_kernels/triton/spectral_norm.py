"""Spectral norm in Triton: `update` and `gradients`, for all layers of a network in two launches each.

    update      iterate_kernel   one power iteration: t ← Wv and its direction u, s ← Wᵀu and its direction v, σ ← ‖s‖
                divide_kernel    Ŵ ← W/σ
    gradients   inner_kernel     partial sums of ⟨G, Ŵ⟩
                gradient_kernel  dW ← (G − ⟨G, Ŵ⟩ u vᵀ)/σ

Sums have a fixed order. The only atomic operations count programs that have ended.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dcvae_kernels.reference import Layers
from dcvae_kernels.spectral_norm_autograd import buffer_size, buffer_views, supported
from dcvae_kernels.triton import on_device
from dcvae_kernels.triton.launch import Launch, cdiv
from dcvae_kernels.triton.spectral_norm_kernels import (
    NO_GRADIENT,
    divide_kernel,
    gradient_kernel,
    inner_kernel,
    iterate_kernel,
)

ROWS, COLUMNS, GROUP, VECTOR = 8, 256, 16, 1024  # blocks of iterate_kernel
ELEMENTS = 4096  # block of divide_kernel and inner_kernel
GRADIENT_ROWS, GRADIENT_COLUMNS, PARTIALS = 16, 128, 1024  # blocks of gradient_kernel

MAX_PLANS = 4096  # maximum number of plans, and of layouts; each layer of a network can have its own plan
SPARE_COUNTERS = 32
_LAYOUTS: dict[tuple[Any, ...], "Layout"] = {}
_PLANS: dict[tuple[Any, ...], "Plan | None"] = {}


@dataclass(frozen=True)
class Layout:
    """Table of the layers on the device, and launches, for given shapes, strides, dtype and device.

    Attributes:
        table: int64 [layers, fields], see `dcvae_kernels.triton.spectral_norm_kernels`.
        row_blocks, element_blocks, gradient_blocks: int32; layer and block of each program.
        views: size, strides and start of each layer in a buffer for one tensor per layer.
        elements, vectors, workspace, partials, counters: numbers of elements of buffers.
        divide: launches for weights with any address, and for weights whose addresses are all multiples of 16.
    """

    table: Tensor
    row_blocks: Tensor
    element_blocks: Tensor
    gradient_blocks: Tensor
    views: Sequence[tuple[torch.Size, tuple[int, ...], int]]
    elements: int
    vectors: int
    workspace: int
    partials: int
    counters: int
    first_iteration: Launch
    next_iteration: Launch
    divide: tuple[Launch, Launch]
    inner: Launch
    gradient: Launch


@dataclass(frozen=True)
class Plan:
    """Layout and addresses of layers, and counters of iterate_kernel.

    Attributes:
        addresses: int64 [layers, 3], of W, u and v.
        aligned: whether the addresses of all W are multiples of 16.
        counters: one tensor per stream, because launches that overlap must not share counters.
        captured_counters: one tensor per launch captured in a CUDA graph, because replays can overlap.
        spare_counters: tensors for further captured launches, allocated before the capture.
    """

    layout: Layout
    addresses: Tensor
    aligned: bool
    counters: dict[int, Tensor]
    captured_counters: list[Tensor]
    spare_counters: list[Tensor]


def find_plan(layers: Layers) -> Plan | None:
    """Return the plan of the layers, or None if the kernels do not support them.

    The first call with the same layers copies tables to the device. A CUDA graph cannot capture this, so run one pass
    before the capture.
    """
    weights, us, vs, dims = layers
    key = (*_layout_key(weights, dims), *[x.data_ptr() for tensors in (weights, us, vs) for x in tensors])
    if key in _PLANS:
        return _PLANS[key]
    if len(_PLANS) >= MAX_PLANS:
        _forget_plan()
    plan = None
    if supported(layers):
        layout = find_layout(weights, dims)
        addresses = [[x.data_ptr() for x in tensors] for tensors in zip(weights, us, vs, strict=True)]
        spare = layout.table.new_zeros(SPARE_COUNTERS, layout.counters, dtype=torch.int32)
        aligned = all(x.data_ptr() % 16 == 0 for x in weights)
        plan = Plan(layout, layout.table.new_tensor(addresses), aligned, {}, [], list(spare.unbind()))
    _PLANS[key] = plan
    return plan


def _layout_key(weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[Any, ...]:
    return *dims, *[x.dtype for x in weights], *[x.shape for x in weights], *[x.stride() for x in weights]


def _forget_plan() -> None:
    """Forget the oldest plan that no captured graph uses."""
    for key, plan in _PLANS.items():
        if plan is None or not plan.captured_counters:
            del _PLANS[key]
            return


def find_layout(weights: Sequence[Tensor], dims: Sequence[int]) -> Layout:
    """Return the layout of weights that `spectral_norm_autograd.supported` accepts."""
    key = (weights[0].device, *_layout_key(weights, dims))
    layout = _LAYOUTS.get(key)
    if layout is None:
        if len(_LAYOUTS) >= MAX_PLANS:
            _LAYOUTS.clear()  # plans keep theirs
        layout = _LAYOUTS[key] = _make_layout(weights, dims)
    return layout


def _matrix(weight: Tensor, dim: int) -> tuple[int, ...]:
    """Return the fields HEIGHT to FAST_INDEX."""
    height = weight.shape[dim]
    width = weight.numel() // height
    if weight.is_contiguous():
        fast = math.prod(weight.shape[dim + 1 :])
        return height, width, fast, fast, height * fast, 1, fast, 1
    channels = weight.shape[1]
    if dim == 0:  # channels-last: in memory, the channels of a tap are consecutive; in v, the taps of a channel
        return height, width, channels, width, channels, 1, 1, width // channels
    return height, width, width, 1, 0, channels, 0, 1


def _sums(sizes: Sequence[int], first: int = 0) -> list[int]:
    """Return where each of consecutive arrays starts, from `first`, and where the last one ends."""
    return list(accumulate(sizes, initial=first))


def _make_layout(weights: Sequence[Tensor], dims: Sequence[int]) -> Layout:
    like, number = weights[0], len(weights)
    matrices = [_matrix(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
    heights, widths = [matrix[0] for matrix in matrices], [matrix[1] for matrix in matrices]
    counts = [cdiv(height, ROWS) for height in heights]
    partial_counts = [cdiv(weight.numel(), ELEMENTS) for weight in weights]
    views = buffer_views(weights)
    starts = [start for *_, start in views]
    us = _sums(heights)
    vs = _sums(widths, us[-1])
    sigmas = _sums([1] * number, vs[-1])
    parts = _sums([count * cdiv(width, 4) * 4 for count, width in zip(counts, widths, strict=True)])
    norms = _sums(counts, parts[-1])
    groups = _sums([cdiv(count, GROUP) for count in counts], number)
    partials = _sums(partial_counts)
    fields = (starts, *zip(*matrices, strict=True), us, vs, sigmas, parts, norms, groups, partials, partial_counts)
    table = [[values[i] for values in fields] for i in range(number)]

    # Large layers first, so that the additions of their parts overlap with the other layers.
    order = sorted(range(number), key=lambda i: -weights[i].numel())
    row_blocks = [(i, block) for i in order for block in range(counts[i])]
    element_blocks = [(i, block) for i in order for block in range(partial_counts[i])]
    gradient_blocks = [
        (i, row, column)
        for i in order
        for row in range(cdiv(heights[i], GRADIENT_ROWS))
        for column in range(cdiv(widths[i], GRADIENT_COLUMNS))
    ]

    def table_on_device(rows: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(rows, device=like.device, dtype=dtype)

    def iterate(first: bool) -> Launch:
        return Launch(
            iterate_kernel, (len(row_blocks), 1, 1), (), FIRST=first, BLOCK_ROWS=ROWS, BLOCK_COLUMNS=COLUMNS,
            GROUP=GROUP, BLOCK_VECTOR=VECTOR, num_warps=8, maxnreg=64,
        )  # fmt: skip

    return Layout(
        table=table_on_device(table, torch.int64),
        row_blocks=table_on_device(row_blocks),
        element_blocks=table_on_device(element_blocks),
        gradient_blocks=table_on_device(gradient_blocks),
        views=views,
        elements=buffer_size(weights),
        vectors=sigmas[-1],
        workspace=norms[-1],
        partials=partials[-1],
        counters=cdiv(groups[-1], 4) * 4,  # a multiple of 16 bytes
        first_iteration=iterate(True),
        next_iteration=iterate(False),
        divide=tuple(
            Launch(divide_kernel, (len(element_blocks), 1, 1), (), ALIGNED=aligned, BLOCK=ELEMENTS, num_warps=4)
            for aligned in (False, True)
        ),
        inner=Launch(inner_kernel, (len(element_blocks), 1, 1), (), COUNT=number, BLOCK=ELEMENTS, num_warps=8),
        gradient=Launch(
            gradient_kernel, (len(gradient_blocks), 1, 1), (), COUNT=number, BLOCK_ROWS=GRADIENT_ROWS,
            BLOCK_COLUMNS=GRADIENT_COLUMNS, BLOCK_PARTIALS=PARTIALS, num_warps=4,
        ),
    )  # fmt: skip


def update(plan: Plan, like: Tensor, n_power_iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """Update u and v in place. Return W/σ, and u, v and σ, of all layers."""
    layout = plan.layout
    normalized = like.new_empty(layout.elements)
    vectors = like.new_empty(layout.vectors, dtype=torch.float32)
    workspace = like.new_empty(layout.workspace, dtype=torch.float32)
    counters = _counters(plan)
    tables = plan.addresses, layout.table
    with on_device(like.device):
        iterate = layout.first_iteration
        for _ in range(n_power_iterations):
            iterate(*tables, layout.row_blocks, vectors, workspace, counters, normalized, floats=(eps,))
            iterate = layout.next_iteration
        layout.divide[plan.aligned](*tables, layout.element_blocks, vectors, normalized, floats=())
    return normalized, vectors


def _counters(plan: Plan) -> Tensor:
    """Return counters that are 0 and that no concurrent launch uses."""
    device = plan.addresses.device
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            plan.captured_counters.append(plan.spare_counters.pop() if plan.spare_counters else _new_counters(plan))
            return plan.captured_counters[-1]
        stream = torch.cuda.current_stream(device).cuda_stream
    counters = plan.counters.get(stream)
    if counters is None:
        counters = plan.counters[stream] = _new_counters(plan)
    return counters


def _new_counters(plan: Plan) -> Tensor:
    return plan.addresses.new_zeros(plan.layout.counters, dtype=torch.int32)


def gradients(layout: Layout, normalized: Tensor, vectors: Tensor, grad_output: Sequence[Tensor | None]) -> Tensor:
    """Return dW of all layers, undefined for a layer whose grad_output is None."""
    grads = [
        x if x is None or _can_be_read(x, stride) else x.new_empty_strided(size, stride).copy_(x)
        for x, (size, stride, _) in zip(grad_output, layout.views, strict=True)
    ]
    addresses = tuple([NO_GRADIENT.value if x is None else x.data_ptr() for x in grads])
    result = torch.empty_like(normalized)
    partials = vectors.new_empty(layout.partials)
    with on_device(result.device):
        layout.inner(layout.table, layout.element_blocks, addresses, normalized, partials, floats=())
        layout.gradient(layout.table, layout.gradient_blocks, addresses, vectors, partials, result, floats=())
    return result


def _can_be_read(grad_output: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether the kernels can read a gradient: 16 bytes at a time, in the order of the weight's elements."""
    address = grad_output.data_ptr()
    return grad_output.stride() == stride and address % 16 == 0 and address != 0 and not grad_output.is_neg()
