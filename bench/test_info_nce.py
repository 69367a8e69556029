"""InfoNCE: ours compared with plain PyTorch and with every package that computes it.

Forward runs without autograd; forward_backward computes the gradient in q and, without a queue, in k. The outputs
of every implementation are first compared with a float64 reference.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from dcvae_kernels import info_nce
from harness import MODES, Outputs, Unavailable, imported, make_call, relative_errors
from results import Document, Target

TEMPERATURE = 0.07
# Largest relative error of the loss and of a gradient (by Frobenius norm). The bounds for float32 admit implementations
# that compute in tf32; the result files hold the actual errors.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (3e-2, 5e-2), "float16": (3e-2, 5e-2)}


# --- problems ---


@dataclass(frozen=True)
class Row:
    """Queries and keys [B, D], or [S, B, D] if there are scales, and a queue [K, D] or [S, K, D].

    Without a queue the negatives of a query are the other keys of the batch.
    """

    name: str
    batch: int
    queue: int | None
    dim: int
    dtype: str
    scales: int = 1
    symmetric: bool = False
    targets: tuple[Target, ...] = ()

    def shrunk(self) -> "Row":
        return replace(self, batch=min(self.batch, 128), queue=self.queue and min(self.queue, 1024))

    def floor(self, mode: str) -> dict[str, int]:
        """Return the FLOPs of the unavoidable products and the bytes of inputs read and gradients written once."""
        gradients = 0 if mode == "forward" else 1 if self.queue else 2
        products = (1 + gradients) * self.scales * self.batch * (self.queue or self.batch)
        vectors = self.scales * ((2 + gradients) * self.batch + (self.queue or 0))
        return {"bytes": vectors * self.dim * getattr(torch, self.dtype).itemsize, "flops": 2 * products * self.dim}

    def description(self) -> Document:
        fields = ("name", "batch", "queue", "dim", "dtype", "scales", "symmetric")
        return {**{f: getattr(self, f) for f in fields}, "floors": {mode: self.floor(mode) for mode in MODES}}


def faster_than_others(required: float) -> Target:
    return Target("times faster than the fastest other, replayed", required, against="others", timing="graph")


LARGE = (
    faster_than_others(1.5),
    Target("share of the measured bfloat16 matrix rate", 0.5, "rate", "bfloat16", "graph"),
    Target("times less extra memory than eager", 100, "memory"),
)
DCVAE = (faster_than_others(5), Target("times faster than eager, called from Python", 10))
CLIP = (
    faster_than_others(1),
    Target("times faster than eager, replayed", 2, timing="graph"),
    Target("times less extra memory than eager", 8, "memory"),
)
COMMON = (faster_than_others(1.5),)
ROWS = (
    Row("dcvae", 128, 8096, 16, "float32", scales=2, targets=DCVAE),
    Row("dcvae-b1024", 1024, 8096, 16, "float32", scales=2),
    Row("large", 4096, 65536, 128, "bfloat16", targets=LARGE),
    Row("clip", 32768, None, 512, "bfloat16", symmetric=True, targets=CLIP),
    Row("moco-fp32", 256, 65536, 128, "float32", targets=COMMON),
    Row("moco-bf16", 256, 65536, 128, "bfloat16", targets=COMMON),
    Row("simclr-fp32", 4096, None, 128, "float32", targets=COMMON),
    Row("simclr-bf16", 4096, None, 128, "bfloat16", targets=COMMON),
)


@dataclass(frozen=True)
class Problem:
    """Inputs of a row: q and k are not normalised, the queue is.

    Attributes:
        inputs: tensors in which gradients are computed
    """

    row: Row
    q: Tensor
    k: Tensor
    queue: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.q,) if self.row.queue else (self.q, self.k)


def make_problem(row: Row, device: torch.device) -> Problem:
    """Draw random directions, with a cosine of about 0.45 between a query and its key."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, row.dtype)

    def noise(count: int) -> Tensor:
        shape = (count, row.dim) if row.scales == 1 else (row.scales, count, row.dim)
        return torch.randn(shape, generator=generator)

    q = noise(row.batch)
    k = q + 2 * noise(row.batch)
    queue = F.normalize(noise(row.queue), dim=-1).to(device, dtype) if row.queue else None
    q = q.to(device, dtype).requires_grad_()
    return Problem(row, q, k.to(device, dtype).requires_grad_(not row.queue), queue)


def reference(problem: Problem, chunk: int = 4096) -> Outputs:
    """Return the loss and its gradients in float64, computed in chunks of queries to save memory."""
    q, k = (x.detach().double().requires_grad_() for x in (problem.q, problem.k))
    queue = None if problem.queue is None else problem.queue.double()
    inputs = (q,) if problem.row.queue else (q, k)
    totals = [q.new_zeros(()), *(torch.zeros_like(x) for x in inputs)]
    directions = ((q, k), (k, q)) if problem.row.symmetric else ((q, k),)
    for queries, keys in directions:
        for start in range(0, q.shape[-2], chunk):
            query, key = (F.normalize(x, dim=-1) for x in (queries, keys))
            query, own = (x[..., start : start + chunk, :] for x in (query, key))
            positive = (query * own).sum(-1) / TEMPERATURE
            lse = (query @ (key if queue is None else queue).mT / TEMPERATURE).logsumexp(-1)
            if queue is not None:
                lse = torch.logaddexp(lse, positive)
            loss = (lse - positive).sum() / (len(directions) * q[..., 0].numel())
            for total, part in zip(totals, (loss.detach(), *torch.autograd.grad(loss, inputs)), strict=True):
                total += part
    return totals[:1], totals[1:]


def errors(row: Row, outputs: Outputs, expected: Outputs) -> Document:
    return relative_errors("loss", outputs, expected, TOLERANCES[row.dtype])


# --- implementations: each takes a problem and returns the call that computes its loss ---

Loss = Callable[[], Tensor]


def ours(problem: Problem) -> Loss:
    symmetric = problem.row.symmetric
    return lambda: info_nce(problem.q, problem.k, problem.queue, temperature=TEMPERATURE, symmetric=symmetric)


def cross_entropy(q: Tensor, k: Tensor, queue: Tensor | None, symmetric: bool) -> Tensor:
    """InfoNCE as the cross-entropy of logits. 1/τ scales the small q: scaling the logits would copy them."""
    q, k = F.normalize(q, dim=-1) / TEMPERATURE, F.normalize(k, dim=-1)
    if queue is not None:
        logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.mT], -1).flatten(0, -2)
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
    logits, labels = q @ k.mT, torch.arange(len(q), device=q.device)
    loss = F.cross_entropy(logits, labels)
    return (loss + F.cross_entropy(logits.mT, labels)) / 2 if symmetric else loss


def log_sum_exp(q: Tensor, k: Tensor, queue: Tensor | None, symmetric: bool) -> Tensor:
    """InfoNCE as log-sum-exp minus the positive logit: more operations, but no copy of the logits."""
    q, k = F.normalize(q, dim=-1) / TEMPERATURE, F.normalize(k, dim=-1)
    if queue is not None:
        positive = (q * k).sum(-1)
        return (torch.logaddexp((q @ queue.mT).logsumexp(-1), positive) - positive).mean()
    logits = q @ k.mT
    lse = (logits.logsumexp(-1) + logits.logsumexp(-2)) / 2 if symmetric else logits.logsumexp(-1)
    return (lse - logits.diagonal()).mean()


FORMULATIONS = (cross_entropy, log_sum_exp)


def eager(problem: Problem) -> Loss:
    """Plain PyTorch: the faster of both formulations. Scales are one batch, which is faster than a loop over them."""
    return _fastest(problem, [partial(f, *_arguments(problem)) for f in FORMULATIONS])


def compiled(problem: Problem) -> Loss:
    harness.require_gpu("left out on a CPU, where compiling needs a C++ compiler and most of the time")
    torch.compiler.reset()  # otherwise the compiler generalises over the shapes of earlier rows
    return _fastest(problem, [partial(torch.compile(f, dynamic=False), *_arguments(problem)) for f in FORMULATIONS])


def both_ways(problem: Problem, one_way: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """In-batch loss of normalised q and k; if the row is symmetric, the mean of both directions."""
    if problem.queue is not None:
        raise Unavailable("it has no queue")

    def loss() -> Tensor:
        q, k = F.normalize(problem.q, dim=-1), F.normalize(problem.k, dim=-1)
        return (one_way(q, k) + one_way(k, q)) / 2 if problem.row.symmetric else one_way(q, k)

    return loss


def open_clip(problem: Problem) -> Loss:
    """open_clip's code: features are scaled, and each direction has its own product."""
    labels = torch.arange(problem.row.batch, device=problem.q.device)
    return both_ways(problem, lambda q, k: F.cross_entropy(1 / TEMPERATURE * q @ k.mT, labels))


def info_nce_pytorch(problem: Problem) -> Loss:
    if problem.row.symmetric:
        raise Unavailable("it compares in one direction only")
    package = imported("info_nce", "info-nce-pytorch")
    return _over_scales(problem, _queues(problem), partial(package.info_nce, temperature=TEMPERATURE))


def lightly(problem: Problem) -> Loss:
    if problem.queue is None:
        raise Unavailable("its in-batch loss is NT-Xent, which also contrasts queries with queries")
    module = imported("lightly.loss.ntx_ent_loss", "lightly")
    losses = []
    for queue in _queues(problem):
        loss = module.NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(queue.shape))
        loss.memory_bank.bank = queue
        loss.memory_bank._dequeue_and_enqueue = lambda batch: None  # the others do not enqueue either
        losses.append(loss)
    return _over_scales(problem, losses, lambda q, k, loss: loss(q, k))


def inf_cl(problem: Problem) -> Loss:
    """With a queue, its row-wise log-sum-exp, whose backward pass also computes the gradient of the queue.

    `head_dim` is the size of the pieces into which it cuts D; the fastest one is used.
    """
    if problem.row.batch % 64:
        raise Unavailable("its gradients are NaN unless B is a multiple of 64")
    flash, ring = (imported(f"inf_cl.{name}", "inf_cl") for name in ("flash", "ring"))
    harness.require_gpu("it needs a CUDA device")
    labels = torch.arange(problem.row.batch, device=problem.q.device)
    inverse_temperature = torch.tensor(1 / TEMPERATURE, device=problem.q.device)

    def with_queue(q: Tensor, k: Tensor, queue: Tensor, head_dim: int) -> Tensor:
        q, k = F.normalize(q, dim=-1).float() / TEMPERATURE, F.normalize(k, dim=-1).float()
        heads = (-1, problem.row.dim // head_dim, head_dim)
        negatives = flash.FlashProb.apply(q.view(heads), queue.float().view(heads))
        return F.softplus(negatives - (q * k).sum(-1)).mean()

    def make(head_dim: int) -> Loss:
        if problem.queue is not None:
            return _over_scales(problem, _queues(problem), partial(with_queue, head_dim=head_dim))
        return both_ways(problem, lambda q, k: ring.cal_inf_loss(q, k, labels, inverse_temperature, head_dim))

    head_dims = [head_dim for head_dim in (16, 32, 64, 128, 256) if problem.row.dim % head_dim == 0]
    return _fastest(problem, [make(head_dim) for head_dim in head_dims])


def liger(problem: Problem) -> Loss:
    """Its fused linear layer and cross-entropy: the keys are the weight, and a query's class is its own key."""
    if problem.queue is not None:
        raise Unavailable("it has no queue")
    module = imported("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    harness.require_gpu("it needs a CUDA device")
    fused = module.LigerFusedLinearCrossEntropyLoss()
    labels = torch.arange(problem.row.batch, device=problem.q.device)
    return both_ways(problem, lambda q, k: fused(k, q / TEMPERATURE, labels))


def attention(problem: Problem) -> Loss:
    """torch's attention with the queue as keys and values: its log-sum-exp gives the loss, its output dq."""
    if problem.queue is None:
        raise Unavailable("attention's output gives the gradient in q only, and this row asks for k's too")
    loss: Any = _AttentionInfoNCE.apply
    return lambda: loss(F.normalize(problem.q, dim=-1), F.normalize(problem.k, dim=-1), problem.queue)


class _AttentionInfoNCE(torch.autograd.Function):
    """loss = mean of softplus(m) with m = lse − s⁺; hence dq = sigmoid(m)·(output − k)/τ, divided by the count."""

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
    """Attention with the keys as values, by the fastest kernel for the dtype: output and log-sum-exp [S, B]."""
    scale, aten = 1 / TEMPERATURE, torch.ops.aten
    if not q.is_cuda:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, keys, keys, scale=scale)[:2]
    elif q.dtype.itemsize == 2:
        output, lse = aten._scaled_dot_product_flash_attention(q, keys, keys, scale=scale)[:2]
    else:
        output, lse = aten._scaled_dot_product_efficient_attention(q, keys, keys, None, True, scale=scale)[:2]
    return output[0], lse[0, :, : q.shape[2]]  # the last kernel pads lse


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


def _arguments(problem: Problem) -> tuple[Any, ...]:
    return problem.q, problem.k, problem.queue, problem.row.symmetric


def _queues(problem: Problem) -> list[Any]:
    return [problem.queue] if problem.row.scales == 1 else list(problem.queue)  # type: ignore[arg-type]


def _over_scales(problem: Problem, thirds: list[Any], loss: Callable[[Tensor, Tensor, Any], Tensor]) -> Loss:
    """Mean of loss(q, k, third) over the scales, for packages that have no scales."""
    if problem.row.scales == 1:
        return lambda: loss(problem.q, problem.k, thirds[0])
    # q and k are split in each call: a CUDA graph does not contain what happened before it.
    return lambda: torch.stack([loss(*x) for x in zip(problem.q, problem.k, thirds, strict=True)]).mean()


def _fastest(problem: Problem, losses: list[Loss]) -> Loss:
    """Return the loss that is fastest forward and backward."""
    calls = [lambda loss=loss: torch.autograd.grad(loss(), problem.inputs) for loss in losses]
    return losses[harness.fastest(calls)]


# --- the benchmark ---

pytestmark = harness.timed(0.3, 0.01, 5)
BENCHMARK = harness.Benchmark("info_nce", ROWS, PEERS, PACKAGES)
# The targets' cases come first: forward and backward of ours and eager PyTorch in all rows, then of the others.
OTHERS = [peer for peer in PEERS if peer not in ("ours", "eager")]


@harness.cases(
    ((row, peer, "forward_backward") for row in ROWS for peer in ("ours", "eager")),
    ((row, peer, "forward_backward") for row in ROWS for peer in OTHERS),
    ((row, peer, "forward") for row in ROWS for peer in PEERS),
)
def test_info_nce(row: Row, peer: str, mode: str, fill: Callable[..., None]) -> None:
    fill(row, peer, mode, measure)


def measure(cell: Document, benchmark: Any, row: Row, peer: str, mode: str) -> None:
    problem, expected = prepared(row)
    call = call_of(problem, PEERS[peer](problem), mode)
    harness.measure_op(cell, benchmark, call, lambda run: errors(row, run(), expected))


@functools.lru_cache(maxsize=1)
def prepared(row: Row) -> tuple[Problem, Outputs]:
    """Inputs of a row and its reference, kept while the row's cases run."""
    harness.free_memory()
    problem = make_problem(row, harness.DEVICE)
    return problem, reference(problem)


def call_of(problem: Problem, loss: Loss, mode: str) -> Callable[[], Outputs]:
    return make_call(mode, lambda: [loss()], problem.inputs)
