"""Autograd function and torch.compile operators of InfoNCE, for both implementations.

The sweep of the forward pass over the negatives also yields the gradient of the queries: with weights p and negatives
n, it sums p·n along with p. The backward pass then only multiplies that gradient by grad_output. It sweeps again only
for the symmetric loss and for negatives that require a gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcvae_kernels import chunked
from dcvae_kernels.arguments import Inputs, Settings
from dcvae_kernels.dispatch import is_batched
from dcvae_kernels.reference import accumulate_dtype, info_nce_reference


def _implementation(name: str) -> ModuleType:
    if name == "torch":
        return chunked
    from dcvae_kernels.triton import info_nce as triton_info_nce  # optional dependency

    return triton_info_nce


def forward(
    inputs: Inputs, settings: Settings, output_mask: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss and, on request, gradients or the state from which `backward_sweep` computes them.

    Args:
        output_mask: whether to compute dq, dk, dtemperature, state and rank; the first three must be False for a
            symmetric loss.

    Returns:
        loss: [S, B] / [B], or 0-d if reduced.
        rank: int64 [S, B] / [B].
        dq, dk, dtemperature: gradients of the reduced loss, or of each query's loss with reduction "none", with respect
            to q, to k as the positive, and, as one term per query, to τ.
        state: softmax statistics for `backward_sweep`, [directions, 3, S·B]; two directions if symmetric, else one.
        Outputs that are not requested are None. Floating-point outputs are float64 if an input is, else float32.
    """
    return _implementation(settings.implementation).forward(inputs, settings, output_mask)


def backward_sweep(
    inputs: Inputs,
    settings: Settings,
    grad_output: Tensor,
    state: Tensor,
    wrt_q: bool,
    wrt_keys: bool,
    with_dtemperature: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients of the negatives and, if the loss is symmetric, of q and τ.

    Args:
        grad_output: gradient of the loss, 0-d or [S, B] / [B].
        state: from `forward`.
        wrt_q, with_dtemperature: whether to compute the gradients of q and τ; False unless the loss is symmetric.
        wrt_keys: whether to compute the gradient of the queue (without a queue, of k).

    Returns:
        dq, dkeys: shape and dtype of q, and of the queue or k; 0 in unfilled slots of a queue.
        dtemperature: gradient with respect to τ, one term per query, [S·B].
        Outputs that are not requested are None.
    """
    implementation = _implementation(settings.implementation)
    return implementation.backward_sweep(inputs, settings, grad_output, state, wrt_q, wrt_keys, with_dtemperature)


# Operators that are opaque to torch.compile. An operator cannot take a tuple of mixed types, so Inputs and Settings are
# flattened.
ARGUMENTS = (
    "Tensor q, Tensor? temperature, Tensor k, Tensor? queue, Tensor? valid, Tensor? query_ids, Tensor? negative_ids, "
    "float tau, bool normalize, bool symmetric, str reduction, str implementation"
)


def _unflatten(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return Inputs, Settings and the remaining arguments."""
    first, end = len(Inputs._fields), len(Inputs._fields) + len(Settings._fields)
    return Inputs(*arguments[:first]), Settings(*arguments[first:end]), *arguments[end:]


def _empty_if_none(x: Tensor, outputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Replace None, which an operator cannot return."""
    return tuple(x.new_empty(0) if output is None else output for output in outputs)


@torch.library.custom_op(
    "dcvae_kernels::info_nce",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def forward_operator(q: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _empty_if_none(q, forward(*_unflatten((q, *arguments))))


@torch.library.custom_op(
    "dcvae_kernels::info_nce_backward",
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor grad_output, Tensor state, bool wrt_q, bool wrt_keys, bool with_dtemperature)"
    " -> (Tensor, Tensor, Tensor)",
)
def backward_operator(q: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _empty_if_none(q, backward_sweep(*_unflatten((q, *arguments))))


@forward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings, (with_dq, with_dk, with_dtemperature, with_state, with_rank) = _unflatten(arguments)
    q = inputs.q
    rows = q.shape[:-1]
    dtype = accumulate_dtype(q, inputs.k, inputs.queue)
    empty = partial(q.new_empty, dtype=dtype)
    outputs = (
        empty(() if settings.reduction != "none" else rows),
        q.new_empty(rows, dtype=torch.int64) if with_rank else None,
        empty(q.shape) if with_dq else None,
        empty(q.shape) if with_dk else None,
        empty(rows) if with_dtemperature else None,
        empty((2 if settings.symmetric else 1, 3, rows.numel())) if with_state else None,
    )
    return _empty_if_none(q, outputs)


@backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, _, _, wrt_q, wrt_keys, with_dtemperature = _unflatten(arguments)
    q, keys = inputs.q, inputs.k if inputs.queue is None else inputs.queue
    dtemperature = q.new_empty(q.shape[:-1].numel(), dtype=accumulate_dtype(q, keys)) if with_dtemperature else None
    outputs = q.new_empty(q.shape) if wrt_q else None, keys.new_empty(keys.shape) if wrt_keys else None, dtemperature
    return _empty_if_none(q, outputs)


class FusedInfoNCE(torch.autograd.Function):
    """Loss and rank of `dcvae_kernels.info_nce`; `tensors` are the fields of `Inputs`.

    Second derivatives are those of the reference implementation.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, with_rank: bool, grad_enabled: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        inputs: Inputs = Inputs(*tensors)  # type: ignore[arg-type]
        needs_q, needs_temperature, needs_k, needs_queue = needs = [
            x and grad_enabled for x in ctx.needs_input_grad[3:7]
        ]
        symmetric, in_batch = settings.symmetric, inputs.queue is None
        output_mask = [
            needs_q and not symmetric,
            needs_k and not in_batch,
            needs_temperature and not symmetric,
            needs_queue or (in_batch and needs_k) or (symmetric and any(needs)),
            with_rank,
        ]
        compiling = torch.compiler.is_compiling()
        if compiling:
            loss, rank, *gradients_and_state = forward_operator(*inputs, *settings, output_mask)
            rank = rank if with_rank else None
        else:
            loss, rank, *gradients_and_state = forward(inputs, settings, output_mask)
        q, temperature, *keys = inputs
        # Frozen keys are not saved, because the backward pass does not need them and they can be overwritten before it.
        frozen = not (in_batch or needs_k or needs_queue)
        ctx.save_for_backward(*gradients_and_state, q, temperature, *([None] * len(keys) if frozen else keys))
        ctx.settings = settings
        ctx.frozen = None
        if frozen and not compiling:
            ctx.frozen = [(x, _version(x)) for x in keys]
        if rank is not None:
            ctx.mark_non_differentiable(rank)
        ctx.set_materialize_grads(False)
        return loss, rank

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 10
        compiling = torch.compiler.is_compiling()
        if not compiling and (torch.is_grad_enabled() or is_batched(grad_output)):
            q, temperature, *keys = ctx.saved_tensors[4:]
            keys = keys if ctx.frozen is None else _unchanged(ctx.frozen)
            inputs: Inputs = Inputs(q, temperature, *keys)  # type: ignore[arg-type]
            gradients = _differentiable_gradients(inputs, ctx.settings, ctx.needs_input_grad[3:7], grad_output)
            return None, None, None, *gradients, None, None, None
        dq, dk, dtemperature, state, *tensors = ctx.saved_tensors
        q, temperature, k, queue = tensors[:4]
        settings = ctx.settings
        needs_q, needs_temperature, needs_k, needs_queue = ctx.needs_input_grad[3:7]

        swept: Sequence[Any] = (None, None, None)
        wrt_q, wrt_keys = settings.symmetric and needs_q, needs_queue or (needs_k and queue is None)
        if settings.symmetric or wrt_keys:
            arguments = grad_output, state, wrt_q, wrt_keys, settings.symmetric and needs_temperature
            if compiling:
                swept = backward_operator(*tensors, *settings, *arguments)
            else:
                swept = backward_sweep(Inputs(*tensors), settings, *arguments)
        if settings.symmetric:
            dq, _, dtemperature = swept
        else:
            dq = _scaled(dq, grad_output, q.dtype) if needs_q else None
            dtemperature = dtemperature * grad_output if needs_temperature else None
        if needs_k and queue is not None:
            dk = _scaled(dk, grad_output, k.dtype)
        return (
            *(None,) * 3,
            dq if needs_q else None,
            dtemperature.sum().to(temperature.dtype) if needs_temperature and dtemperature is not None else None,
            (swept[1] if queue is None else dk) if needs_k else None,
            swept[1] if needs_queue else None,
            *(None,) * 3,
        )


class FrozenPlan(NamedTuple):
    """A call of the Triton kernels in which at most q requires a gradient.

    Attributes:
        forward: takes Inputs and τ, and returns the same as `forward`.
        settings: as given, but with any τ.
        with_dq: whether q requires a gradient.
    """

    forward: Callable[[Inputs, float], tuple[Any, ...]]
    settings: Settings
    with_dq: bool


def plan_frozen(inputs: Inputs, settings: Settings, with_dq: bool, with_rank: bool) -> FrozenPlan | None:
    """Return a plan for inputs with the same layouts as these, or None if rows do not fit into registers."""
    kernels = _implementation("triton")
    plan = kernels.plan_rows(inputs, settings, (with_dq, False, False, False, with_rank))
    return None if plan is None else FrozenPlan(partial(kernels.forward_rows, plan), settings, with_dq)


def frozen_loss(q: Tensor, keys: Sequence[Tensor | None], tau: float, plan: FrozenPlan) -> tuple[Tensor, Tensor | None]:
    """Return the loss and, if planned, the rank. `keys` are the fields of `Inputs` after the temperature."""
    if plan.with_dq:
        return FrozenInfoNCE.apply(q, keys, tau, plan)
    return plan.forward(Inputs(q, None, *keys), tau)[:2]  # type: ignore[arg-type]


class FrozenInfoNCE(torch.autograd.Function):
    """`FusedInfoNCE` for a plan: a short call waits for the CPU, not for the GPU."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Sequence[Tensor | None], tau: float, plan: FrozenPlan
    ) -> tuple[Tensor, Tensor | None]:
        loss, rank, dq, *_ = plan.forward(Inputs(q, None, *keys), tau)  # type: ignore[arg-type]
        ctx.save_for_backward(dq, q)
        ctx.frozen = [(x, 0 if x is None else _version(x)) for x in keys]
        ctx.tau, ctx.plan = tau, plan
        if rank is not None:
            ctx.mark_non_differentiable(rank)
        ctx.set_materialize_grads(False)
        return loss, rank

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        dq, q = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad_output):
            k, queue, *rest = _unchanged(ctx.frozen)
            queue = queue[0] if queue.ndim > q.ndim else queue  # type: ignore[union-attr, index]
            inputs: Inputs = Inputs(q, None, k, queue, *rest)  # type: ignore[arg-type]
            settings = ctx.plan.settings._replace(tau=ctx.tau)
            needs = (True, False, False, False)
            return _differentiable_gradients(inputs, settings, needs, grad_output)[0], None, None, None
        return _scaled(dq, grad_output, q.dtype), None, None, None


def _scaled(gradient: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the gradient of the loss or of each query's loss by its grad_output."""
    gradient = gradient * (grad_output[..., None] if grad_output.ndim else grad_output)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _unchanged(frozen: Sequence[tuple[Tensor | None, int]]) -> list[Tensor | None]:
    """Return tensors that were not saved for backward.

    Raises:
        RuntimeError: one of them was modified after the forward pass.
    """
    if any(_version(x) != version for x, version in frozen):
        raise RuntimeError(
            "the queue was modified after the forward pass, but second derivatives of info_nce need it: "
            "pass clones of the queue's keys, ids and valid"
        )
    return [x for x, _ in frozen]


def _differentiable_gradients(
    inputs: Inputs, settings: Settings, needs: Sequence[bool], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first four inputs from the reference, differentiable in grad mode."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: an input can depend on another one, and partial derivatives hold the others constant.
        aliases: Any = [x if x is None else x.view_as(x) for x in inputs[:4]]
        inputs = Inputs(*aliases, *inputs[4:])  # type: ignore[call-arg]
        loss, _ = reference_loss(inputs, settings, with_rank=False)
    differentiated = [x for x, needed in zip(aliases, needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(loss, differentiated, grad_output, create_graph=create_graph))
    return tuple(next(gradients) if needed else None for needed in needs)


def reference_loss(inputs: Inputs, settings: Settings, with_rank: bool) -> tuple[Tensor, Tensor | None]:
    """Return the reduced loss (the mean over zero queries is 0) and, on request, the rank, from the reference."""
    loss, rank = info_nce_reference(
        inputs.q,
        inputs.k,
        inputs.queue,
        temperature=settings.tau if inputs.temperature is None else inputs.temperature,
        normalize=settings.normalize,
        valid=inputs.valid,
        query_ids=inputs.query_ids,
        negative_ids=inputs.negative_ids,
        symmetric=settings.symmetric,
        with_rank=with_rank,
    )
    if settings.reduction != "none":
        loss = loss.sum() / max(loss.numel(), 1) if settings.reduction == "mean" else loss.sum()
    return loss, rank


def _version(x: Tensor | None) -> int:
    """Number of in-place writes to x; 0 for inference tensors, which do not count them."""
    return 0 if x is None or x.is_inference() else x._version
