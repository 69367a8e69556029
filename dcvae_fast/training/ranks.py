"""The processes that train together, one for each GPU: who they are, and what they tell each other.

`torchrun` and `deepspeed` start them, and say so in the environment.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dcvae_fast.errors import ConfigError, RankError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. What `count` > 1 processes do here, all have to do.

    Attributes:
        rank: its number
        count: how many there are
        local: its number on its machine
        local_count: how many there are on its machine
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and speaks."""
        return self.rank == 0

    def worst(self, status: int) -> int:
        """The highest status of all ranks. Does not wait for GPUs."""
        if self.count == 1:
            return status
        statuses = torch.tensor(status)
        dist.all_reduce(statuses, dist.ReduceOp.MAX)
        return int(statuses)

    def all(self, value: T) -> list[T]:
        """Everyone's value, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """
        Raises:
            ConfigError: one of these named values is another on this rank than on the first.
            RankError: another rank has another.
        """
        theirs = self.from_first(values)
        with self.together():
            for name, value in values.items():
                if value != theirs[name]:
                    raise ConfigError(f"{name} is {value!r} on rank {self.rank}, but {theirs[name]!r} on rank 0.")

    def sum_(self, tensors: Sequence[Tensor], divisor: int = 1) -> None:
        """Replaces tensors of one type by their sums over all ranks, divided by a number; one collective."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        flat /= divisor
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view(x.shape))

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one type by their means over all ranks; one collective."""
        self.sum_(tensors, self.count)

    def gathered(self, x: Tensor, dim: int = 0) -> Tensor:
        """Everyone's tensor, of the same shape, concatenated along `dim` by rank. No gradient."""
        if self.count == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's share of what `gathered` gives."""
        return x.chunk(self.count, dim)[self.rank]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, each rank works by itself; at the end all go on, or none does.

        Raises:
            Exception: what was raised inside, by the lowest rank that failed.
            RankError: another rank than this one failed.
        """
        problem = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            problem = error
        failed = [rank for rank, found in enumerate(self.all(problem is not None)) if found]
        if not failed:
            return
        if problem is not None and self.rank == failed[0]:
            raise problem
        raise RankError(f"rank {failed[0]} has failed.") from problem


ALONE = Ranks()


def join() -> Ranks:
    """Meets the other processes, if this one was started as one of several.

    Raises:
        ConfigError: the environment does not say which of how many, or they could not be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"  # torchrun, DeepSpeed
    try:
        rank, count, local, local_count = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_size)
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE asks for several processes, but the rest of the environment is not as torchrun or deepspeed"
            f" set it ({error})."
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        if not dist.is_initialized():
            connect()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"rank {rank} of {count} could not meet the others ({error}).") from error
    return Ranks(rank, count, local, local_count)


def connect(**how: Any) -> None:
    """Makes torch's process group: GPUs talk by NCCL, and processes, about everything else, by gloo."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **how)


def met() -> bool:
    """Whether this process has met others, or DeepSpeed."""
    return dist.is_initialized()


def leave(code: int) -> None:
    """Ends this process with an exit code if it has met others. Threads of the collectives, to which libraries hold on,
    would now and then abort it in the end."""
    if met():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
