"""InfoNCE in Triton: `forward` and `backward_sweep`, the two computations of `dcvae_kernels.info_nce`.

If a row fits into registers, similarities exist only there:

    forward          prepare_kernel   inverse norms or planes of the negatives, unless they are short float32 rows
                     sweep_kernel     a program owns queries and sweeps one split of the negatives, like attention with
                                      V = K
                     combine_kernel   adds the splits: loss, rank, gradients of the queries, their keys and τ
    backward_sweep   weights_kernel   a program owns keys and sweeps one split of the queries
                     project_kernel   adds the splits and backpropagates through the normalisation

For larger D and for symmetric losses, similarities exist in tiles, and the weights of some queries at a time are stored
for matrix products by PyTorch (cuBLAS):

    forward          scores_kernel    a program computes one tile of similarities and adds its rows and columns
                     combine_kernel
    backward_sweep   chunk_kernel     stores the weights of some queries and all keys; unless the loss is symmetric,
                                      `forward` launches it for the gradients of the queries and τ
                     project_kernel
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dcvae_kernels.arguments import Inputs, Settings, loss_weight
from dcvae_kernels.chunked import FIXED_MAXIMUM_BELOW
from dcvae_kernels.triton import on_device
from dcvae_kernels.triton.info_nce_kernels import (
    chunk_kernel,
    combine_kernel,
    prepare_kernel,
    project_kernel,
    scores_kernel,
    sweep_kernel,
    weights_kernel,
)
from dcvae_kernels.triton.launch import Launch, cdiv, power_of_2

MAX_SPLITS = 64  # a power of 2, so that combine_kernel can load all splits together
MAX_UNPREPARED = 32  # largest D of float32 rows that each program normalises and splits by itself
CHUNK_BYTES = 2**28  # bytes of weights that are stored at a time
# float16 weights are scaled, so that their largest possible value is just below the largest float16.
FLOAT16_SCALE = 2.0**14
TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# Choices --------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Tile sizes and compiler options of the kernels that visit pairs of rows.

    Attributes:
        own: rows that a program owns.
        other: rows of the other operand that it loads at a time.
        features: features that it loads at a time.
        warps, stages: num_warps and num_stages.
        resident: programs per multiprocessor among which the work is divided.
    """

    own: int
    other: int
    features: int
    warps: int
    stages: int
    resident: int


def operand_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the common dtype of rows that are multiplied."""
    return x.dtype if x.dtype == y.dtype else torch.float32


def _unprepared(x: Tensor) -> bool:
    """Whether each program normalises and splits rows, instead of `prepare_kernel`."""
    return x.dtype == torch.float32 and x.shape[-1] <= MAX_UNPREPARED


def dot_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Return constants of kernels that multiply rows: float32 rows are sums of three bfloat16 planes."""
    if dtype == torch.float32:
        return {"DOT": tl.bfloat16, "PLANES": 3}
    return {"DOT": TRITON_DTYPES[dtype], "PLANES": 1}


def sweep_tiles(dim: int, dtype: torch.dtype, capability: int, in_batch: bool) -> Tiles:
    """Return tile sizes of `sweep_kernel` and `weights_kernel`."""
    features = max(16, power_of_2(dim))
    if dtype == torch.float32:
        if features <= 32:
            return Tiles(64, 64, features, 4, 3, 4)
        return Tiles(128, 64, features, 8, 2, 1) if capability == 90 else Tiles(64, 32, features, 4, 2, 2)
    if dtype == torch.float16:
        return Tiles(64, 32, features, 4, 2, 2) if features <= 128 else Tiles(128, 32, features, 8, 2, 1)
    if features == 256:
        return Tiles(128, 64, features, 8, 2, 1)
    if features == 128 and capability == 90:
        return Tiles(64, 128, features, 4, 2 if in_batch else 3, 2)
    return Tiles(64, 32 if features == 128 and capability < 90 else 64, features, 4, 3, 2)


def scores_tiles(dtype: torch.dtype, capability: int) -> Tiles:
    """Return tile sizes of `scores_kernel` and `chunk_kernel`."""
    if dtype == torch.float32:
        return Tiles(128, 64, 32, 4 if capability == 90 else 8, 2, 1)
    return Tiles(128, 64 if capability >= 100 else 128, 64, 4 if capability == 90 else 8, 3, 1)


class Blocks(NamedTuple):
    """Block sizes of `combine_kernel` and `project_kernel`.

    Attributes:
        rows, features, splits: elements that a program loads at a time.
    """

    rows: int
    features: int
    splits: int


def blocks(dim: int, splits: int) -> Blocks:
    """Return block sizes for D = dim and the number of splits: 4096 elements at a time."""
    features = power_of_2(dim)
    padded_splits = next(count for count in (1, 4, 16, MAX_SPLITS) if count >= min(splits, MAX_SPLITS))
    block_splits = min(padded_splits, max(1, 4096 // features))
    return Blocks(max(1, min(16, 4096 // (features * block_splits))), features, block_splits)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _capability(device: torch.device) -> int:
    """Compute capability of a GPU: 80, 90, 100, …; the interpreter tests the code for 90."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _splits(own: int, other: int, scales: int, size: Tiles, device: torch.device) -> tuple[int, int]:
    """Return the number of splits of the other rows that gives every multiprocessor work, and the rows per split."""
    programs = cdiv(own, size.own) * scales
    steps = cdiv(other, size.other)
    splits = max(1, min(MAX_SPLITS, steps, size.resident * _multiprocessors(device) // programs))
    part = cdiv(steps, splits) * size.other
    return max(1, cdiv(other, part)) if part else 1, part


# Launches -------------------------------------------------------------------------------------------------------------


def _rows_by_features(x: Tensor) -> Tensor:
    """Return x as [S, rows, D] with unit stride along D, copied only if necessary."""
    x = x if x.ndim == 3 else x[None]
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _kernel_inputs(inputs: Inputs) -> Inputs:
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    queue = None if queue is None else _rows_by_features(queue)
    query_ids, negative_ids = _contiguous(query_ids), _contiguous(negative_ids)
    return Inputs(_rows_by_features(q), temperature, _rows_by_features(k), queue, valid, query_ids, negative_ids)


def _keys(inputs: Inputs) -> Tensor:
    return inputs.k if inputs.queue is None else inputs.queue


def _fits(inputs: Inputs, settings: Settings) -> bool:
    """Whether rows fit into registers, so that no similarities are stored."""
    capability = _capability(inputs.q.device)
    if operand_dtype(inputs.q, _keys(inputs)) == torch.float32:
        largest = 128 if 90 <= capability < 120 else 64
    else:
        largest = 256 if capability == 90 else 128
    return not settings.symmetric and inputs.q.shape[-1] <= largest


def _fixed_maximum(inputs: Inputs, settings: Settings) -> bool:
    return settings.normalize and inputs.temperature is None and 2 / settings.tau < FIXED_MAXIMUM_BELOW


def forward(
    inputs: Inputs, settings: Settings, output_mask: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `dcvae_kernels.info_nce_autograd.forward`."""
    plan = plan_rows(inputs, settings, output_mask)
    if plan is not None:
        return forward_rows(plan, inputs, settings.tau)
    return _forward_tiles(inputs, settings, output_mask)


# If rows fit into registers -------------------------------------------------------------------------------------------


class RowsPlan(NamedTuple):
    """Outputs and launches of the forward pass.

    A plan can be used again for inputs with the same shapes, strides, dtypes, alignment and device.

    Attributes:
        convert: whether inputs must be copied or viewed as [S, rows, D] with unit stride along D.
        loss: shape of the loss.
        with_rank, …: whether these outputs are computed.
        planes: shape of the planes of the negatives; None if they are not split.
        inverses: shape of the inverse norms of the negatives; None if they are not needed.
        workspace: number of elements of the workspace.
        factor: weight of one query's loss in the reduced loss.
    """

    convert: bool
    loss: tuple[int, ...]
    with_dq: bool
    with_dk: bool
    with_dtemperature: bool
    with_state: bool
    with_rank: bool
    planes: tuple[int, ...] | None
    inverses: tuple[int, ...] | None
    workspace: int
    factor: float
    prepare: Launch
    sweep: Launch
    combine: Launch


def plan_rows(inputs: Inputs, settings: Settings, output_mask: Sequence[bool]) -> RowsPlan | None:
    """Return the plan of the forward pass, or None if rows do not fit into registers."""
    if not _fits(inputs, settings):
        return None
    shape, given = inputs.q.shape[:-1], inputs
    with_dq, _, with_dtemperature, _, with_rank = output_mask
    inputs = _kernel_inputs(inputs)
    q, k, queue = inputs.q, inputs.k, inputs.queue
    gradient, reduce = with_dq or with_dtemperature, settings.reduction != "none"
    normalize, fixed = settings.normalize, _fixed_maximum(inputs, settings)
    negatives = _keys(inputs)
    scales, batch, dim = q.shape
    count, rows = negatives.shape[1], scales * batch
    dtype = operand_dtype(q, negatives)
    size = sweep_tiles(dim, dtype, _capability(q.device), in_batch=queue is None)
    splits, part = _splits(batch, count, scales, size, q.device)
    planes = inverses = None
    strides = (0, *negatives.stride()[:2])
    if dtype != torch.float32:
        inverses = (scales, count)
    elif not _unprepared(negatives):
        planes = (3, scales, count, size.features)
        strides = (scales * count * size.features, count * size.features, size.features)
    sweep = Launch(
        sweep_kernel, (cdiv(batch, size.own), splits, scales),
        (*q.stride()[:2], *k.stride()[:2], *strides, batch, count, part),
        D=dim, NORMALIZE=normalize, IN_BATCH=queue is None, FIXED=fixed, GRADIENT=gradient, RANK=with_rank,
        **dot_constants(dtype), BLOCK_X=size.own, BLOCK_Y=size.other, BLOCK_D=size.features,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return RowsPlan(
        any(x is not y for x, y in zip(inputs, given, strict=True)),
        () if reduce else tuple(shape),
        *output_mask,
        planes,
        inverses,
        (3 + dim * gradient) * splits * rows + rows + 1,
        loss_weight(settings.reduction, rows),
        _prepare_launch(negatives.shape, negatives.stride(), normalize, torch.bfloat16, planes),
        sweep,
        _combine_launch(q, k, splits, 0, normalize, fixed, gradient, reduce),
    )


def forward_rows(
    plan: RowsPlan, inputs: Inputs, tau: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return loss, rank, dq, dk, dτ and state as `forward`."""
    q = inputs.q
    shape = q.shape
    loss = q.new_empty(plan.loss, dtype=torch.float32)
    rank = q.new_empty(shape[:-1], dtype=torch.int64) if plan.with_rank else None
    dq = q.new_empty(shape, dtype=torch.float32) if plan.with_dq else None
    dk = q.new_empty(shape, dtype=torch.float32) if plan.with_dk else None
    dtemperature = q.new_empty(shape[:-1], dtype=torch.float32) if plan.with_dtemperature else None
    state = q.new_empty((1, 3, q.numel() // shape[-1]), dtype=torch.float32) if plan.with_state else None
    workspace = q.new_empty(plan.workspace, dtype=torch.float32)
    if plan.convert:
        inputs = _kernel_inputs(inputs)
    q, temperature, k, queue, valid, query_ids, negative_ids = inputs
    negatives, inverses = k if queue is None else queue, None
    with on_device(q.device):
        if plan.planes is not None:
            planes = q.new_empty(plan.planes, dtype=torch.bfloat16)
            plan.prepare(negatives, planes, None, valid, floats=())
            negatives = planes
        elif plan.inverses is not None:
            inverses = q.new_empty(plan.inverses, dtype=torch.float32)
            plan.prepare(negatives, None, inverses, valid, floats=())
        plan.sweep(
            q, k, negatives, inverses, query_ids, negative_ids, valid, temperature, workspace, floats=(1 / tau,)
        )  # fmt: skip
        plan.combine(
            q, k, workspace, None, temperature, loss, rank, dq, dk, dtemperature, state, floats=(1 / tau, plan.factor)
        )  # fmt: skip
    return loss, rank, dq, dk, dtemperature, state


def _combine_launch(
    q: Tensor, k: Tensor, splits: int, mirror_splits: int, normalize: bool, fixed: bool, gradient: bool, reduce: bool
) -> Launch:
    scales, batch, dim = q.shape
    size = blocks(dim, max(splits, mirror_splits))
    return Launch(
        combine_kernel, (cdiv(scales * batch, size.rows), 1, 1),
        (*q.stride()[:2], *k.stride()[:2], batch, scales * batch, splits, mirror_splits),
        D=dim, NORMALIZE=normalize, FIXED=fixed, GRADIENT=gradient, REDUCE=reduce,
        BLOCK_X=size.rows, BLOCK_D=size.features, BLOCK_SPLITS=size.splits, BLOCK_SUM=1024, num_warps=4,
    )  # fmt: skip


def _prepare_launch(
    shape: tuple[int, ...], strides: tuple[int, ...], normalize: bool, dot: torch.dtype, planes: tuple[int, ...] | None
) -> Launch:
    """Return the launch of `prepare_kernel` for rows of this shape; `planes`: shape of the planes, if requested."""
    scales, own, dim = shape
    width = dim if planes is None else planes[-1]
    block = max(1, 4096 // power_of_2(width))
    return Launch(
        prepare_kernel, (max(1, cdiv(scales * own, block)), 1, 1),
        (*strides[:2], scales * own * width, own, scales * own),
        D=dim, NORMALIZE=normalize, DOT=TRITON_DTYPES[dot], PLANES=1 if planes is None else planes[0], WIDTH=width,
        BLOCK_X=block, BLOCK_D=power_of_2(width), num_warps=8,
    )  # fmt: skip


class Rows(NamedTuple):
    """Rows as the kernels multiply them.

    Attributes:
        rows: [S, X, D], or planes of the normalised rows, [planes, S, X, width].
        inverses: inverse norms [S, X] by which products remain to be multiplied.
    """

    rows: Tensor
    inverses: Tensor | None

    def strides(self) -> tuple[int, int, int]:
        """Return the plane, scale and row strides."""
        *plane, scale, row, _ = self.rows.stride()
        return (plane[0] if plane else 0), scale, row


def _prepare(
    x: Tensor, valid: Tensor | None, settings: Settings, planes: Tensor | None, inverses: Tensor | None
) -> None:
    """Launch `prepare_kernel`."""
    dot, shape = (torch.bfloat16, None) if planes is None else (planes.dtype, tuple(planes.shape))
    _prepare_launch(x.shape, x.stride(), settings.normalize, dot, shape)(x, planes, inverses, valid, floats=())


def _directions_of(x: Tensor, valid: Tensor | None, settings: Settings, dtype: torch.dtype) -> Tensor:
    """Return the normalised rows of x, [S, X, D]."""
    directions = x.new_empty((1, *x.shape), dtype=dtype)
    _prepare(x, valid, settings, directions, None)
    return directions[0]


def _prepared(x: Tensor, valid: Tensor | None, settings: Settings, dtype: torch.dtype, width: int) -> Rows:
    """Return the rows of x and what the kernels need to multiply them; `width`: row length of planes."""
    if dtype == torch.float32:
        planes = x.new_empty((3, *x.shape[:2], width), dtype=torch.bfloat16)
        _prepare(x, valid, settings, planes, None)
        return Rows(planes, None)
    inverses = x.new_empty(x.shape[:2], dtype=torch.float32)
    _prepare(x, valid, settings, None, inverses)
    return Rows(x, inverses)


# Otherwise ------------------------------------------------------------------------------------------------------------


def _pair(inputs: Inputs, settings: Settings) -> tuple[Rows, Rows]:
    """Return the queries and the negatives, for `scores_kernel` and `chunk_kernel`."""
    keys = _keys(inputs)
    dtype = operand_dtype(inputs.q, keys)
    width = cdiv(keys.shape[2], 64) * 64
    return (
        _prepared(inputs.q, None, settings, dtype, width),
        _prepared(keys, inputs.valid, settings, dtype, width),
    )


def _forward_tiles(
    inputs: Inputs, settings: Settings, output_mask: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return loss, rank, dq, dk, dτ and state as `forward`."""
    with_dq, with_dk, with_dtemperature, with_state, with_rank = output_mask
    with_gradient, reduce = with_dq or with_dtemperature, settings.reduction != "none"
    shape = inputs.q.shape[:-1]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return inputs.q.new_empty(size, dtype=dtype)

    loss = empty() if reduce else empty(*shape)
    rank = empty(*shape, dtype=torch.int64) if with_rank else None
    dq = empty(*inputs.q.shape) if with_dq else None
    dk = empty(*inputs.q.shape) if with_dk else None
    dtemperature = empty(*shape) if with_dtemperature else None
    state = empty(2 if settings.symmetric else 1, 3, shape.numel()) if with_state or with_gradient else None
    inputs = _kernel_inputs(inputs)
    q, k = inputs.q, inputs.k
    fixed, factor = _fixed_maximum(inputs, settings), loss_weight(settings.reduction, shape.numel())
    with on_device(q.device):
        pair = _pair(inputs, settings)
        sums, splits, mirror, mirror_splits = _scores(inputs, settings, pair, with_rank)
        _combine_launch(q, k, splits, mirror_splits, settings.normalize, fixed, False, reduce)(
            q, k, sums, mirror, inputs.temperature, loss, rank, None, dk, None, state, floats=(1 / settings.tau, factor)
        )
        if with_gradient:
            grad_output = q.new_ones(()).expand(q.shape[:2])
            total, _ = _sums_of_products(inputs, settings, pair, grad_output, state, True, False)
            _project(q, total, inputs, settings, state, grad_output, 1, dq, dtemperature, positives=k)
    return loss, rank, dq, dk, dtemperature, state if with_state else None


def _scores(
    inputs: Inputs, settings: Settings, pair: tuple[Rows, Rows], with_rank: bool
) -> tuple[Tensor, int, Tensor | None, int]:
    """Launch `scores_kernel` and return its workspaces and the numbers of splits."""
    q, temperature, k, _, valid, query_ids, negative_ids = inputs
    queries, keys = pair
    scales, batch, _ = q.shape
    columns = _keys(inputs).shape[1]
    dtype = operand_dtype(q, _keys(inputs))
    size = scores_tiles(dtype, _capability(q.device))
    tiles_x, tiles_y = cdiv(batch, size.own), max(1, cdiv(columns, size.other))
    if 3 * scales * max(tiles_y * batch, tiles_x * columns * settings.symmetric) >= 2**31:
        raise ValueError(f'q {list(q.shape)} and {columns} keys exceed the indices of impl="triton"; use impl="torch"')

    def workspace(splits: int, rows: int) -> Tensor:
        return q.new_empty(3 * splits * rows + rows + 1, dtype=torch.float32)

    sums = workspace(tiles_y, scales * batch)
    mirror = workspace(tiles_x, scales * columns) if settings.symmetric else None
    positive = None
    if with_rank:
        directions = (_directions_of(x, None, settings, torch.float32) for x in (q, k))
        positive = math.prod(directions).sum(-1)
    launch = Launch(
        scores_kernel, (tiles_x * tiles_y, scales, 1), (*queries.strides(), *keys.strides(), batch, columns),
        **_tile_options(inputs, settings, keys, size),
    )  # fmt: skip
    launch(
        queries.rows, keys.rows, queries.inverses, keys.inverses, query_ids, negative_ids, valid, temperature, positive,
        sums, mirror, floats=(1 / settings.tau,),
    )  # fmt: skip
    return sums, tiles_y, mirror, tiles_x if settings.symmetric else 0


def _tile_options(inputs: Inputs, settings: Settings, keys: Rows, size: Tiles) -> dict[str, Any]:
    """Return the constants of `scores_kernel` and `chunk_kernel`, in their order, and options of the launch."""
    return {
        "D": keys.rows.shape[-1],
        "IN_BATCH": inputs.queue is None,
        "FIXED": _fixed_maximum(inputs, settings),
        "PLANES": 1 if keys.rows.ndim == 3 else len(keys.rows),
        "BLOCK_X": size.own,
        "BLOCK_Y": size.other,
        "BLOCK_D": size.features,
        "GROUP": 8,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }


def _sums_of_products(
    inputs: Inputs,
    settings: Settings,
    pair: tuple[Rows, Rows],
    grad_output: Tensor,
    state: Tensor,
    wrt_q: bool,
    wrt_keys: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return Σ_k weight(q, k)·k̂ [S, B, D] and Σ_q weight(q, k)·q̂ [S, K, D] in float32, by chunks of queries."""
    q, negatives = inputs.q, _keys(inputs)
    queries, keys = pair
    scales, batch, _ = q.shape
    columns = negatives.shape[1]
    dtype = operand_dtype(q, negatives)
    size = scores_tiles(dtype, _capability(q.device))
    row_bytes = max(1, scales * columns * dtype.itemsize)
    chunk = max(1, CHUNK_BYTES // (row_bytes * size.own)) * size.own
    q_directions = _directions_of(q, None, settings, dtype) if wrt_keys else None
    key_directions = _directions_of(negatives, inputs.valid, settings, dtype) if wrt_q else None
    largest = None
    if dtype == torch.float16:
        largest = grad_output.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny) / FLOAT16_SCALE
        grad_output = grad_output / largest
    padded_columns = cdiv(columns, size.other) * size.other
    buffer = q.new_empty((scales, min(chunk, batch), padded_columns), dtype=dtype)
    dq, dkeys = [], None
    for first in range(0, batch, chunk):
        weights = buffer[:, : min(chunk, batch - first), :columns]
        if columns:
            strides = (*queries.strides(), *keys.strides(), *grad_output.stride(), *buffer.stride()[:2])
            launch = Launch(
                chunk_kernel, (cdiv(weights.shape[1], size.own) * cdiv(columns, size.other), scales, 1),
                (*strides, batch, columns, first),
                **_tile_options(inputs, settings, keys, size),
            )  # fmt: skip
            launch(
                queries.rows, keys.rows, queries.inverses, keys.inverses, inputs.query_ids, inputs.negative_ids,
                inputs.valid, inputs.temperature, grad_output,
                state[0], state[1] if settings.symmetric else None, weights, floats=(1 / settings.tau,),
            )  # fmt: skip
        if wrt_q:
            dq.append(_matrix_product(weights, key_directions))
        if wrt_keys:
            dkeys = _matrix_product(weights.mT, q_directions[:, first : first + chunk], dkeys)
    totals = [torch.cat(dq, 1) if len(dq) > 1 else dq[0] if dq else None, dkeys]
    if largest is not None:
        totals = [total if total is None else total * largest for total in totals]
    return totals[0], totals[1]


def _matrix_product(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """Return total + a·b in float32, in place of total."""
    if not a.is_cuda:  # the half-precision products of CPUs have no float32 result
        product = torch.bmm(a.float(), b.float())
        return product if total is None else total.add_(product)
    options = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    if total is None:
        return torch.bmm(a, b, **options)
    return torch.baddbmm(total, a, b, out=total, **options)


def _project(
    x: Tensor,
    workspace: Tensor,
    inputs: Inputs,
    settings: Settings,
    state: Tensor,
    grad_output: Tensor,
    splits: int,
    dx: Tensor | None,
    dtemperature: Tensor | None,
    positives: Tensor | None,
) -> None:
    """Launch `project_kernel`. x: queries, keys of the batch, or a queue, which has no positives."""
    scales, own, dim = x.shape
    block = blocks(dim, splits)
    directions = 2 if settings.symmetric else 1
    factor = loss_weight(settings.reduction, state.shape[-1]) / directions
    positives_strides = (x if positives is None else positives).stride()[:2]
    launch = Launch(
        project_kernel, (cdiv(scales * own, block.rows), 1, 1),
        (*x.stride()[:2], *positives_strides, *grad_output.stride(), own, scales * own, splits),
        D=dim, NORMALIZE=settings.normalize, BLOCK_X=block.rows, BLOCK_D=block.features, BLOCK_SPLITS=block.splits,
        num_warps=8,
    )  # fmt: skip
    launch(
        x, workspace, positives, state[0], state[1] if settings.symmetric else None, grad_output,
        inputs.valid if positives is None else None, inputs.temperature, dx, dtemperature,
        floats=(1 / settings.tau, factor),
    )  # fmt: skip


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
    q_shape, keys_shape = inputs.q.shape, _keys(inputs).shape
    inputs = _kernel_inputs(inputs)
    q, keys, in_batch = inputs.q, _keys(inputs), inputs.queue is None
    grad_output = grad_output.expand(q.shape[:2])
    dq = dkeys = dtemperature = None
    if keys.numel() == 0:
        return None, keys.new_empty(keys_shape), None
    with on_device(q.device):
        if _fits(inputs, settings):
            total_q, (total_keys, splits) = None, _weights(inputs, settings, grad_output, state)
        else:
            pair, wrt, splits = _pair(inputs, settings), (wrt_q or with_dtemperature, wrt_keys), 1
            total_q, total_keys = _sums_of_products(inputs, settings, pair, grad_output, state, *wrt)
        if total_q is not None:
            dq = q.new_empty(q_shape) if wrt_q else None
            dtemperature = q.new_empty(state.shape[-1], dtype=torch.float32) if with_dtemperature else None
            _project(q, total_q, inputs, settings, state, grad_output, 1, dq, dtemperature, positives=keys)
        if wrt_keys:
            dkeys = keys.new_empty(keys_shape)
            positives = q if in_batch else None
            _project(keys, total_keys, inputs, settings, state, grad_output, splits, dkeys, None, positives)
    return dq, dkeys, dtemperature


def _weights(inputs: Inputs, settings: Settings, grad_output: Tensor, state: Tensor) -> tuple[Tensor, int]:
    """Launch `weights_kernel` and return its workspace and the number of splits."""
    q, temperature, _, queue, _, query_ids, key_ids = inputs
    keys = _keys(inputs)
    scales, own, dim = keys.shape
    other, rows = q.shape[1], scales * own
    dtype = operand_dtype(q, keys)
    size = sweep_tiles(dim, dtype, _capability(q.device), in_batch=queue is None)
    splits, part = _splits(own, other, scales, size, q.device)
    workspace = q.new_empty(splits * rows * dim, dtype=torch.float32)
    queries = Rows(q, None) if _unprepared(q) else _prepared(q, None, settings, dtype, size.features)
    launch = Launch(
        weights_kernel, (cdiv(own, size.own), splits, scales),
        (*keys.stride()[:2], *queries.strides(), *grad_output.stride(), own, other, part),
        D=dim, NORMALIZE=settings.normalize, IN_BATCH=queue is None, FIXED=_fixed_maximum(inputs, settings),
        **dot_constants(dtype), BLOCK_X=size.own, BLOCK_Y=size.other, BLOCK_D=size.features,
        num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    launch(
        keys, *queries, key_ids, query_ids, temperature, grad_output, state, workspace,
        floats=(1 / settings.tau,),
    )  # fmt: skip
    return workspace, splits
