"""The rows of all ranks of a process group: gathered with gradients of any order, and told apart by ids.

The batch is dimension -2, and global rows are in the order of the ranks. The two operators are each other's transpose,
so the derivative of one is the other, applied to what arrives.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcvae_kernels.reference import UNKNOWN_ID


class Gather(torch.autograd.Function):
    """[..., B, D] of each rank to [..., W·B, D] of all W; the gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        parts = x.new_empty(group.size(), *x.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)
        return parts.movedim(0, -3).flatten(-3, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ReduceScatter.apply(grad_output, ctx.group), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, int]:
        return Gather.apply(x.movedim(in_dims[0], 0), group), 0


class ReduceScatter(torch.autograd.Function):
    """The own rows, [..., B, D], of the sum of the [..., W·B, D] of all W ranks."""

    @staticmethod
    def forward(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ranks = group.size()
        parts = x.unflatten(-2, (ranks, x.shape[-2] // ranks)).movedim(-3, 0).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group)
        return own

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(grad_output, ctx.group), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, int]:
        return ReduceScatter.apply(x.movedim(in_dims[0], 0), group), 0


def gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """[..., B, D] of each rank to [..., W·B, D] of all W ranks."""
    return Gather.apply(x, group)


def gather_ids(
    ids: Tensor | None, rows: int, device: torch.device, group: "dist.ProcessGroup"
) -> tuple[Tensor, Tensor]:
    """Ids of the own rows [B] and of all ranks' [W·B]: those given, and one of its own for each row of unknown id.

    So a row has the id of its own key, and leaving out equal ids leaves out that key too.
    """
    first = group.rank() * rows
    everyone = torch.arange(group.size() * rows, device=device)
    if ids is not None:
        ids = gather(ids[:, None], group)[:, 0]
        everyone = torch.where(ids == UNKNOWN_ID, everyone + torch.iinfo(torch.int64).min, ids)
    return everyone[first : first + rows], everyone
