"""Gather the rows of all ranks of a process group, differentiably to any order, and give every row an id.

The batch is dimension -2, and gathered rows are in rank order. W is the world size. The two operators are each other's
transpose, so the backward pass of one applies the other to the incoming gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcvae_kernels.reference import UNKNOWN_ID


class Gather(torch.autograd.Function):
    """All-gather [..., B, D] to [..., W·B, D]; the gradient is summed over the ranks."""

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
    """Sum [..., W·B, D] over the ranks and return this rank's rows, [..., B, D]."""

    @staticmethod
    def forward(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        world_size = group.size()
        parts = x.unflatten(-2, (world_size, x.shape[-2] // world_size)).movedim(-3, 0).contiguous()
        local = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(local, parts.flatten(0, 1), group=group)
        return local

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
    """All-gather [..., B, D] to [..., W·B, D], differentiably."""
    return Gather.apply(x, group)


def gather_ids(
    ids: Tensor | None, rows: int, device: torch.device, group: "dist.ProcessGroup"
) -> tuple[Tensor, Tensor]:
    """Return the ids of this rank's rows, [B], and of all ranks' rows, [W·B]. Rows of unknown id get a unique one.

    A query and its positive key then share an id, so excluding equal ids also excludes the positive from the negatives.
    """
    first = group.rank() * rows
    all_ids = torch.arange(group.size() * rows, device=device)
    if ids is not None:
        ids = gather(ids[:, None], group)[:, 0]
        all_ids = torch.where(ids == UNKNOWN_ID, all_ids + torch.iinfo(torch.int64).min, ids)
    return all_ids[first : first + rows], all_ids
