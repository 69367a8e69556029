"""InfoNCE without logits in memory: its gradients, for both implementations, and its operators for torch.compile.

While the forward pass sweeps the negatives it knows all that the gradient of the queries needs: with weights p and
negatives n, Σ p·n beside Σ p. So it computes that gradient too, and the backward pass only multiplies by what arrives.
Only negatives that want a gradient of their own, and the symmetric loss, are swept again in the backward pass.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dcvae_kernels import chunked
from dcvae_kernels.choice import is_batched
from dcvae_kernels.reference import accumulate_dtype, info_nce_reference


def _implementation(name: str) -> ModuleType:
    if name == "torch":
        return chunked
    from dcvae_kernels.triton import info_nce as triton_info_nce  # Triton may be absent

    return triton_info_nce


def forward(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    valid: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: Tensor | None,
    number: float,
    normalize: bool,
    symmetric: bool,
    reduction: str,
    wanted: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and whatever else is `wanted`: the flags are for dq, dk, dtemperature, state and rank.

    Args: as for `dcvae_kernels.info_nce`, but queue None is in-batch, and τ is `number` where there is no tensor.

    Returns:
        loss: [S, B] / [B], or 0-d if reduced.
        rank: int64 [S, B] / [B].
        dq, dk, dtemperature: derivatives of the loss (of each row's, or of the mean or sum) by q, by k as the positive,
            and, row by row, by τ. Not to be wanted of a symmetric loss.
        state: [directions, 3, S·B], what `backward_sweep` needs to know of the queries; two directions if symmetric.
        What is not wanted is empty. Floating point is float32, or float64 where an input is.
    """
    implementation = _implementation(impl)
    return implementation.forward(
        q, k, queue, valid, query_ids, negative_ids, temperature, number, normalize, symmetric, reduction, wanted
    )


def backward_sweep(
    incoming: Tensor,
    q: Tensor,
    k: Tensor,
    valid: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: Tensor | None,
    number: float,
    normalize: bool,
    in_batch: bool,
    factor: float,
    state: Tensor,
    of_keys: bool,
    with_dtemperature: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """factor · Σ incoming · ∂loss/∂k, with of_keys, or ∂q: the pull of all pairs that the loss of `state` compares.

    Args:
        incoming: the gradient that arrives at the queries' losses, 0-d or [S, B] / [B].
        q, k: queries and the keys that they were compared with, [S, B, D] and [S, K, D], or without S.
        valid: how many keys take part; the others get 0.
        in_batch: row i of k is the positive of row i of q; else none of them is.
        state: from `forward`. Of two directions, keys are compared with queries too.

    Returns:
        dk or dq, in its dtype.
        dtemperature: the same by τ, row by row [S·K] or [S·B]; empty if not wanted.
    """
    implementation = _implementation(impl)
    return implementation.backward_sweep(
        incoming, q, k, valid, query_ids, key_ids, temperature, number, normalize, in_batch, factor, state, of_keys,
        with_dtemperature,
    )  # fmt: skip


# To the compiler the two are operators that it does not look into.
forward_operator = torch.library.custom_op("dcvae_kernels::info_nce", forward, mutates_args=())
backward_operator = torch.library.custom_op("dcvae_kernels::info_nce_backward", backward_sweep, mutates_args=())


@forward_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    valid: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: Tensor | None,
    number: float,
    normalize: bool,
    symmetric: bool,
    reduction: str,
    wanted: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(q, k, queue)
    rows, with_features = q.shape[:-1], q.shape
    sizes = [with_features, with_features, rows, (2 if symmetric else 1, 3, rows.numel())]
    dq, dk, dtemperature, state = (
        q.new_empty(size if flag else (0,), dtype=dtype) for size, flag in zip(sizes, wanted[:4], strict=True)
    )
    loss = q.new_empty(rows if reduction == "none" else (), dtype=dtype)
    rank = q.new_empty(rows if wanted[4] else (0,), dtype=torch.int64)
    return loss, rank, dq, dk, dtemperature, state


@backward_operator.register_fake
def _(
    incoming: Tensor,
    q: Tensor,
    k: Tensor,
    valid: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: Tensor | None,
    number: float,
    normalize: bool,
    in_batch: bool,
    factor: float,
    state: Tensor,
    of_keys: bool,
    with_dtemperature: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    x = k if of_keys else q
    dtemperature = x.new_empty(x.shape[:-1].numel() if with_dtemperature else 0, dtype=accumulate_dtype(q, k))
    return x.new_empty(x.shape), dtemperature


class FusedInfoNCE(torch.autograd.Function):
    """The loss and the rank of `dcvae_kernels.info_nce`. Second derivatives are those of the plain definition."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        queue: Tensor | None,
        temperature: Tensor | None,
        valid: Tensor | None,
        query_ids: Tensor | None,
        negative_ids: Tensor | None,
        number: float,
        normalize: bool,
        symmetric: bool,
        reduction: str,
        with_rank: bool,
        impl: str,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_q, needs_k, needs_queue, needs_temperature = needs = [
            x and grad_enabled for x in ctx.needs_input_grad[:4]
        ]
        with_state = needs_queue or (queue is None and needs_k) or (symmetric and any(needs))
        wanted = [
            needs_q and not symmetric,
            needs_k and queue is not None,
            needs_temperature and not symmetric,
            with_state,
            with_rank,
        ]
        run = forward_operator if torch.compiler.is_compiling() else forward
        loss, rank, *known = run(
            q, k, queue, valid, query_ids, negative_ids, temperature, number, normalize, symmetric, reduction,
            wanted, impl,
        )  # fmt: skip
        # Frozen keys are not needed again, and may be overwritten before the backward pass.
        keys = (k, queue, valid, query_ids, negative_ids)
        frozen = queue is not None and not needs_queue and not needs_k
        ctx.save_for_backward(q, temperature, *known, *((None,) * 5 if frozen else keys))
        ctx.options = (number, normalize, symmetric, reduction, impl)
        ctx.in_batch = queue is None
        ctx.frozen = None
        if frozen and not torch.compiler.is_compiling():
            ctx.frozen = [(x, _version(x)) for x in keys]
        ctx.mark_non_differentiable(rank)
        ctx.set_materialize_grads(False)
        return loss, rank

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if incoming is None:
            return (None,) * 14
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_batched(incoming)):
            return *_differentiable_gradients(ctx, incoming), *(None,) * 10
        q, temperature, dq, dk, dtemperature, state, k, queue, valid, query_ids, negative_ids = ctx.saved_tensors
        number, normalize, symmetric, reduction, impl = ctx.options
        needs_q, needs_k, needs_queue, needs_temperature = ctx.needs_input_grad[:4]
        factor = 1 / max(q.shape[:-1].numel(), 1) if reduction == "mean" else 1.0
        options = (temperature, number, normalize, ctx.in_batch, factor / 2 if symmetric else factor, state)
        run = backward_operator if torch.compiler.is_compiling() else backward_sweep

        def of_keys(keys: Tensor) -> Tensor:
            return run(incoming, q, keys, valid, query_ids, negative_ids, *options, True, False, impl)[0]

        dqueue = of_keys(queue) if needs_queue else None
        if symmetric and (needs_q or needs_temperature):
            dq, dtemperature = run(
                incoming, q, k, valid, query_ids, negative_ids, *options, False, needs_temperature, impl
            )
        elif needs_q or needs_temperature:
            dq = (dq * incoming[..., None]).to(q.dtype) if needs_q else dq
            dtemperature = dtemperature * incoming if needs_temperature else dtemperature
        if needs_k:
            dk = of_keys(k) if ctx.in_batch else (dk * incoming[..., None]).to(k.dtype)
        return (
            dq if needs_q else None,
            dk if needs_k else None,
            dqueue,
            dtemperature.sum().to(temperature.dtype) if needs_temperature else None,
            *(None,) * 10,
        )


def _differentiable_gradients(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by q, k, queue and temperature from the plain definition; in grad mode, with a graph."""
    q, temperature, _, _, _, _, *keys = ctx.saved_tensors
    number, normalize, symmetric, reduction, _ = ctx.options
    if ctx.frozen is not None:
        if any(_version(x) != version for x, version in ctx.frozen):
            raise RuntimeError(
                "the queue was overwritten since the forward pass, and second derivatives of info_nce need it: "
                "give it copies of the queue's keys, ids and valid"
            )
        keys = [x for x, _ in ctx.frozen]
    k, queue, valid, query_ids, negative_ids = keys
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because the inputs may depend on each other, and these are the derivatives with the others held.
        aliases: Any = [x if x is None else x.view_as(x) for x in (q, k, queue, temperature)]
        q, k, queue, temperature = aliases
        loss, _ = info_nce_reference(
            q,
            k,
            queue,
            temperature=number if temperature is None else temperature,
            normalize=normalize,
            valid=valid,
            query_ids=query_ids,
            negative_ids=negative_ids,
            symmetric=symmetric,
            with_rank=False,
        )
        loss = reduced(loss, reduction)
    inputs: Any = [x for x, needs in zip((q, k, queue, temperature), ctx.needs_input_grad, strict=False) if needs]
    gradients = iter(torch.autograd.grad(loss, inputs, incoming, create_graph=create_graph))
    return tuple(next(gradients) if needs else None for needs in ctx.needs_input_grad[:4])


def _version(x: Tensor | None) -> int:
    """Counts the writes to x; always 0 where they are not counted."""
    return 0 if x is None or x.is_inference() else x._version


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Summed, averaged (over no query: 0), or as it is."""
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()
