"""What InfoNCE's benchmark poses: the rows with their floors, their inputs, and what is right."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import MODES, Unavailable

TEMPERATURE = 0.07

# Of the loss, relative to it or to 1 if that is more, and of a gradient, by Frobenius norm. The float32 ones admit
# implementations that compute in tf32; the result files hold each one's own errors.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (3e-2, 5e-2), "float16": (3e-2, 5e-2)}


@dataclass(frozen=True)
class Row:
    """One problem: queries and keys [B, D], or [S, B, D] if there are scales; a queue [K, D] or [S, K, D], or none.

    Without a queue the negatives are the batch's other keys, and the gradient is asked in q and k instead of q alone.
    """

    name: str
    batch: int
    queue: int | None
    dim: int
    dtype: str
    scales: int = 1
    symmetric: bool = False

    @property
    def keys(self) -> int:
        """Keys that each query is compared with."""
        return self.queue or self.batch

    def flops(self, mode: str) -> int:
        """The products that cannot be avoided: the scores, and one as large for each gradient."""
        gradients = 0 if mode == "forward" else 1 if self.queue else 2
        return (1 + gradients) * 2 * self.scales * self.batch * self.keys * self.dim

    def bytes(self, mode: str) -> int:
        """What must move: each input read once, each gradient written once."""
        gradients = 0 if mode == "forward" else 1 if self.queue else 2
        vectors = self.scales * ((2 + gradients) * self.batch + (self.queue or 0))
        return vectors * self.dim * getattr(torch, self.dtype).itemsize

    def shrunk(self) -> "Row":
        """For a CPU, which only rehearses."""
        return replace(self, batch=min(self.batch, 128), queue=self.queue and min(self.queue, 1024))

    def description(self) -> dict[str, Any]:
        floors = {mode: {"bytes": self.bytes(mode), "flops": self.flops(mode)} for mode in MODES}
        return {**asdict(self), "floors": floors}


ROWS = (
    Row("dcvae", 128, 8096, 16, "float32", scales=2),
    Row("dcvae-b1024", 1024, 8096, 16, "float32", scales=2),
    Row("large", 4096, 65536, 128, "bfloat16"),
    Row("clip", 32768, None, 512, "bfloat16", symmetric=True),
    Row("moco-fp32", 256, 65536, 128, "float32"),
    Row("moco-bf16", 256, 65536, 128, "bfloat16"),
    Row("simclr-fp32", 4096, None, 128, "float32"),
    Row("simclr-bf16", 4096, None, 128, "bfloat16"),
)


@dataclass(frozen=True)
class Problem:
    """The inputs of a row. The queue holds unit vectors already, as queues do; q and k are yet to be normalised."""

    row: Row
    q: Tensor
    k: Tensor
    queue: Tensor | None

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """What the gradient is asked in."""
        return (self.q,) if self.row.queue else (self.q, self.k)

    def scales(self) -> list["Problem"]:
        """Each scale as a problem of its own, on views of the same tensors."""
        if self.row.scales == 1:
            return [self]
        queues = [None] * self.row.scales if self.queue is None else list(self.queue)
        row = replace(self.row, scales=1)
        return [Problem(row, *tensors) for tensors in zip(self.q, self.k, queues, strict=True)]


def make_problem(row: Row, device: torch.device) -> Problem:
    """Random directions, with a cosine of about 0.45 between a query and its key."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, row.dtype)

    def noise(count: int) -> Tensor:
        shape = (count, row.dim) if row.scales == 1 else (row.scales, count, row.dim)
        return torch.randn(shape, generator=generator)

    q = noise(row.batch)
    k = q + 2 * noise(row.batch)
    queue = F.normalize(noise(row.queue), dim=-1).to(device, dtype) if row.queue else None
    q = q.to(device, dtype).requires_grad_()
    k = k.to(device, dtype).requires_grad_(not row.queue)
    return Problem(row, q, k, queue)


def reference(problem: Problem, chunk: int = 4096) -> tuple[Tensor, ...]:
    """The loss and its gradients in float64, in chunks of queries so that no row is too large."""
    scales = problem.scales()
    parts = [_reference_of_one(scale, chunk) for scale in scales]
    loss = torch.stack([part[0] for part in parts]).mean()
    gradients = [torch.stack(gradient) / len(scales) for gradient in zip(*(part[1:] for part in parts), strict=True)]
    return loss, *(gradient.view_as(problem.q) for gradient in gradients)


def _reference_of_one(problem: Problem, chunk: int) -> tuple[Tensor, ...]:
    q, k = (x.detach().double().requires_grad_() for x in (problem.q, problem.k))
    queue = None if problem.queue is None else problem.queue.double()
    wanted = (q, k) if queue is None else (q,)
    directions = ((q, k), (k, q)) if problem.row.symmetric else ((q, k),)
    total = [q.new_zeros(()), *(torch.zeros_like(x) for x in wanted)]
    for queries, keys in directions:
        for start in range(0, len(q), chunk):
            rows = slice(start, start + chunk)
            query, key = F.normalize(queries, dim=-1)[rows], F.normalize(keys, dim=-1)
            positive = (query * key[rows]).sum(-1) / TEMPERATURE
            scores = query @ (key if queue is None else queue).mT / TEMPERATURE
            everything = scores.logsumexp(-1) if queue is None else torch.logaddexp(scores.logsumexp(-1), positive)
            loss = (everything - positive).sum() / (len(directions) * len(q))
            for sum_, part in zip(total, (loss.detach(), *torch.autograd.grad(loss, wanted)), strict=True):
                sum_ += part
    return tuple(total)


def errors(row: Row, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    """How far a loss, and gradients if there are any, are from the reference.

    Raises:
        Unavailable: further than the row's dtype explains, or not of the right shape.
    """
    loss_tolerance, gradient_tolerance = TOLERANCES[row.dtype]
    loss, *gradients = (output.double() for output in outputs)
    if loss.shape != ():
        raise Unavailable(f"its loss is of shape {list(loss.shape)}, not a number")
    found = {"loss_error": ((loss - expected[0]).abs() / expected[0].abs().clamp_min(1)).item()}
    if not found["loss_error"] <= loss_tolerance:  # `not` catches NaN
        raise Unavailable(f"its loss is {loss.item():.6g}, which should be {expected[0].item():.6g}")
    if gradients:
        pairs = zip(gradients, expected[1:], strict=True)
        found["gradient_error"] = max(((x - y).norm() / y.norm()).item() for x, y in pairs)
        if not found["gradient_error"] <= gradient_tolerance:
            raise Unavailable(f"its gradient is wrong by {found['gradient_error']:.1%}")
    return {name: float(f"{error:.3g}") for name, error in found.items()}
