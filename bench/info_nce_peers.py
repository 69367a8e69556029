"""Who computes InfoNCE. Each function takes a problem and returns the call that computes its loss.

All normalise q and k, and none keeps anything from one call to the next. Packages are imported when their turn comes.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcvae_kernels import info_nce
from harness import Unavailable, seconds_per_call
from info_nce_cases import TEMPERATURE, Problem

Loss = Callable[[], Tensor]


def ours(problem: Problem) -> Loss:
    symmetric = problem.row.symmetric
    return lambda: info_nce(problem.q, problem.k, problem.queue, temperature=TEMPERATURE, symmetric=symmetric)


def eager(problem: Problem) -> Loss:
    """The loss as everyone writes it; the scales in one batch, which is faster than a loop over them."""
    return lambda: _eager(problem.q, problem.k, problem.queue, problem.row.symmetric)


def compiled(problem: Problem) -> Loss:
    if not problem.q.is_cuda:
        raise Unavailable("left out on a CPU, where compiling needs a C++ compiler and most of the time")
    torch.compiler.reset()  # or the compiler, seeing other shapes than before, would generalise over them
    loss = torch.compile(_eager, dynamic=False)
    return lambda: loss(problem.q, problem.k, problem.queue, problem.row.symmetric)


def _eager(q: Tensor, k: Tensor, queue: Tensor | None, symmetric: bool) -> Tensor:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if queue is not None:
        logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.mT], -1).flatten(0, -2)
        logits /= TEMPERATURE
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
    logits = q @ k.mT
    logits /= TEMPERATURE
    labels = torch.arange(len(q), device=q.device)
    loss = F.cross_entropy(logits, labels)
    return (loss + F.cross_entropy(logits.mT, labels)) / 2 if symmetric else loss


def open_clip(problem: Problem) -> Loss:
    """As open_clip writes it: the scale on the features, a product for each direction."""
    _in_batch_only(problem)
    labels = torch.arange(len(problem.q), device=problem.q.device)

    def loss() -> Tensor:
        q, k = F.normalize(problem.q, dim=-1), F.normalize(problem.k, dim=-1)
        per_query = F.cross_entropy(1 / TEMPERATURE * q @ k.mT, labels)
        if not problem.row.symmetric:
            return per_query
        return (per_query + F.cross_entropy(1 / TEMPERATURE * k @ q.mT, labels)) / 2

    return loss


def info_nce_pytorch(problem: Problem) -> Loss:
    if problem.row.symmetric:
        raise Unavailable("it compares in one direction only")
    package = _imported("info_nce", "info-nce-pytorch")
    return _over_scales(problem, _queues(problem), partial(package.info_nce, temperature=TEMPERATURE))


def lightly(problem: Problem) -> Loss:
    if problem.queue is None:
        raise Unavailable("its in-batch loss is NT-Xent, which also contrasts queries with queries")
    module = _imported("lightly.loss.ntx_ent_loss", "lightly")
    losses = []
    for queue in _queues(problem):
        loss = module.NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(queue.shape))
        loss.memory_bank.bank = queue
        loss.memory_bank._dequeue_and_enqueue = lambda batch: None  # the others do not enqueue either
        losses.append(loss)
    return _over_scales(problem, losses, lambda q, k, loss: loss(q, k))


def inf_cl(problem: Problem) -> Loss:
    """With a queue, its row-wise log-sum-exp; its backward pass then computes the queue's gradient as well, unasked.

    `head_dim` is the size of the pieces that D is cut into; the fastest one is taken.
    """
    if problem.row.batch % 64:
        raise Unavailable("its gradients are NaN unless B is a multiple of 64")
    flash, ring = (_imported(f"inf_cl.{name}", "inf_cl") for name in ("flash", "ring"))
    _cuda_only(problem)
    labels = torch.arange(problem.row.batch, device=problem.q.device)
    inverse_temperature = torch.tensor(1 / TEMPERATURE, device=problem.q.device)

    def loss(q: Tensor, k: Tensor, queue: Tensor | None, head_dim: int) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if queue is None:
            per_query = ring.cal_inf_loss(q, k, labels, inverse_temperature, head_dim)
            if not problem.row.symmetric:
                return per_query
            return (per_query + ring.cal_inf_loss(k, q, labels, inverse_temperature, head_dim)) / 2
        q, k, queue = q.float() / TEMPERATURE, k.float(), queue.float()
        heads = (-1, problem.row.dim // head_dim, head_dim)
        negatives = flash.FlashProb.apply(q.view(heads), queue.view(heads))
        return F.softplus(negatives - (q * k).sum(-1)).mean()

    head_dims = [head_dim for head_dim in (16, 32, 64, 128, 256) if problem.row.dim % head_dim == 0]
    return _fastest(problem, [_over_scales(problem, _queues(problem), partial(loss, head_dim=d)) for d in head_dims])


def liger(problem: Problem) -> Loss:
    """Its fused linear layer and cross-entropy: the keys are the weight, each query's class its own key."""
    _in_batch_only(problem)
    module = _imported("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    _cuda_only(problem)
    fused = module.LigerFusedLinearCrossEntropyLoss()
    labels = torch.arange(len(problem.q), device=problem.q.device)

    def loss() -> Tensor:
        q, k = F.normalize(problem.q, dim=-1), F.normalize(problem.k, dim=-1)
        per_query = fused(k, q / TEMPERATURE, labels)
        return (per_query + fused(q, k / TEMPERATURE, labels)) / 2 if problem.row.symmetric else per_query

    return loss


def attention(problem: Problem) -> Loss:
    """torch's own attention, with the queue as keys and as values: its log-sum-exp is the loss, its output dq."""
    if problem.queue is None:
        raise Unavailable("attention's output gives the gradient in q only, and this row asks for k's too")
    loss: Any = _AttentionInfoNCE.apply
    return lambda: loss(F.normalize(problem.q, dim=-1), F.normalize(problem.k, dim=-1), problem.queue)


class _AttentionInfoNCE(torch.autograd.Function):
    """loss = mean of softplus(m), m = lse − s⁺; so dq = sigmoid(m)·(output − k)/τ, divided by the mean's count."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        heads = [x if x.ndim == 3 else x[None] for x in (q, k, queue)]  # [S, B, D] and [S, K, D]
        output, lse = _attend(heads[0][None], heads[2][None])
        margin = lse - (heads[0] * heads[1]).sum(-1, dtype=torch.float32) / TEMPERATURE
        if ctx.needs_input_grad[0]:
            scale = margin.sigmoid() / (TEMPERATURE * margin.numel())
            ctx.save_for_backward((scale[..., None] * (output - heads[1])).to(q.dtype).view_as(q))
        return F.softplus(margin).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dq,) = ctx.saved_tensors
        return gradients[0].to(dq.dtype) * dq, None, None


def _attend(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with the keys as values, by the fastest kernel for the dtype: its output and log-sum-exp [S, B]."""
    scale = 1 / TEMPERATURE
    aten = torch.ops.aten
    if not q.is_cuda:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, keys, keys, scale=scale)[:2]
    elif q.dtype.itemsize == 2:
        output, lse = aten._scaled_dot_product_flash_attention(q, keys, keys, scale=scale)[:2]
    else:
        output, lse = aten._scaled_dot_product_efficient_attention(q, keys, keys, None, True, scale=scale)[:2]
    return output[0], lse[0, :, : q.shape[2]]  # the last of the three pads its rows


PEERS: dict[str, Callable[[Problem], Loss]] = {
    "ours": ours,
    "eager": eager,
    "torch.compile": compiled,
    "attention": attention,
    "info-nce-pytorch": info_nce_pytorch,
    "lightly": lightly,
    "inf_cl": inf_cl,
    "liger-kernel": liger,
    "open_clip style": open_clip,
}
PACKAGES = ("info-nce-pytorch", "lightly", "inf_cl", "liger-kernel")


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise Unavailable(f"{package} is not installed") from None
        raise


def _in_batch_only(problem: Problem) -> None:
    if problem.queue is not None:
        raise Unavailable("it has no queue")


def _cuda_only(problem: Problem) -> None:
    if not problem.q.is_cuda:
        raise Unavailable("it needs a CUDA device")


def _queues(problem: Problem) -> list[Any]:
    return [problem.queue] if problem.row.scales == 1 else list(problem.queue)  # type: ignore[arg-type]


def _over_scales(problem: Problem, thirds: list[Any], loss: Callable[[Tensor, Tensor, Any], Tensor]) -> Loss:
    """For those who know no scales: the mean of loss(q, k, third) over them, with q and k [B, D]."""
    if problem.row.scales == 1:
        return lambda: loss(problem.q, problem.k, thirds[0])
    # q and k are taken apart in each call: a CUDA graph does not hold what happened before it.
    return lambda: torch.stack([loss(*x) for x in zip(problem.q, problem.k, thirds, strict=True)]).mean()


def _fastest(problem: Problem, losses: list[Loss]) -> Loss:
    """Of variants, the fastest forward and backward; those that raise are passed over unless all do."""
    timed: list[tuple[float, Loss]] = []
    for loss in losses:
        try:
            timed.append((seconds_per_call(lambda loss=loss: torch.autograd.grad(loss(), problem.wanted)), loss))
        except Exception:
            if loss is losses[-1] and not timed:
                raise
    return min(timed, key=lambda pair: pair[0])[1]
