"""Data-parallel processes, one per GPU: ranks, collectives, device choice.

`torchrun` and `deepspeed` start the processes and describe them in environment variables.
"""

import logging
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
    """Rank of this process and its collectives. All methods but `shard` are collectives: all ranks must call them.

    Attributes:
        rank: index of this process
        world_size: number of processes
        local_rank: index of this process on its machine
        local_world_size: number of processes on its machine
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0

    def all_reduce_max(self, status: int) -> int:
        """Return the maximum over all ranks, without waiting for GPUs."""
        if self.world_size == 1:
            return status
        statuses = torch.tensor(status)
        dist.all_reduce(statuses, dist.ReduceOp.MAX)
        return int(statuses)

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Check that named values are the same on all ranks.

        Raises:
            ConfigError: a value differs between this rank and rank 0.
            RankError: a value differs on another rank.
        """
        expected = self.broadcast(values)
        with self.raise_on_all_ranks():
            for name, value in values.items():
                if value != expected[name]:
                    raise ConfigError(f"{name} is {value!r} on rank {self.rank}, but {expected[name]!r} on rank 0.")

    def all_reduce_sum_(self, tensors: Sequence[Tensor], divisor: int = 1) -> None:
        """Replace tensors of one dtype by their sums over all ranks divided by `divisor`, in one collective."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        flat /= divisor
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view(x.shape))

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their means over all ranks, in one collective."""
        self.all_reduce_sum_(tensors, self.world_size)

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Concatenate the tensors of all ranks along `dim` in rank order; all must have the same shape. No gradient."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def shard(self, x: Tensor) -> Tensor:
        """Return this rank's part of a tensor that is the same on all ranks: the inverse of `all_gather`."""
        return x.chunk(self.world_size)[self.rank]

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context manager whose block each rank runs by itself; if a rank fails, all ranks raise at its end.

        Raises:
            Exception: on the lowest rank that failed, its own exception.
            RankError: on all other ranks.
        """
        own_error = None
        try:
            yield
        except Exception as error:
            if self.world_size == 1:
                raise
            own_error = error
        failed = [rank for rank, has_failed in enumerate(self.all_gather_object(own_error is not None)) if has_failed]
        if not failed:
            return
        if own_error is not None and self.rank == failed[0]:
            raise own_error
        raise RankError(f"rank {failed[0]} has failed.") from own_error


SINGLE = Ranks()


def init_distributed() -> Ranks:
    """Connect to the other ranks if a launcher has started several. Ranks > 0 log warnings only.

    Raises:
        ConfigError: environment variables are missing, or the other ranks cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return SINGLE
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"  # torchrun, DeepSpeed
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_size)
    try:
        ranks = Ranks(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(names)} are not all set to integers ({error});"
            " start the processes with torchrun or deepspeed."
        ) from error
    if not ranks.is_first:
        logging.getLogger("dcvae_fast").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    try:
        if not is_distributed():
            init_process_group()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.world_size} could not connect to the other ranks ({error})."
        ) from error
    return ranks


def init_process_group(**kwargs: Any) -> None:
    """Create torch's process group: NCCL for GPU tensors, gloo for CPU tensors and objects."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **kwargs)


def is_distributed() -> bool:
    """Return whether this process has a process group; a single process has one if it uses DeepSpeed."""
    return dist.is_initialized()


def exit_process(code: int) -> None:
    """End this process without cleanup if it has a process group, whose threads sometimes abort a normal exit."""
    if is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pick_device(name: str, ranks: Ranks = SINGLE) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:1` etc.; with several ranks, each has its own GPU.

    Raises:
        ConfigError: the device is not available, or there are fewer GPUs than ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world_size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f"the device is {name!r}, but each of {ranks.world_size} ranks needs its own: use --train.device cuda."
            )
        # Slurm can restrict each process to its own GPU.
        sees_own_only = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        if ranks.local_world_size > torch.cuda.device_count() and not sees_own_only:
            raise ConfigError(
                f"{ranks.local_world_size} ranks on this machine, but it has {torch.cuda.device_count()} GPUs."
            )
        name = f"cuda:{0 if sees_own_only else ranks.local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither")
        torch.empty(0, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)  # some libraries use the current device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device is {name!r}, which is not available here; use auto or cpu.") from error
    return device
