"""A first-in, first-out queue of keys: the negatives of MoCo and DC-VAE."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvae_kernels.reference import UNKNOWN_ID


class KeyQueue(nn.Module):
    """The last `size` keys of each scale, with the ids of the images they came from.

    Everything is a buffer, so that it moves with `.to`, is saved in `state_dict`, and lives on the device: enqueueing
    neither waits for the device nor keeps a position in Python, and may be captured in a CUDA graph.

        loss = info_nce(q, k, queue.keys, valid=queue.valid, query_ids=ids, negative_ids=queue.ids)
        queue.enqueue(k, ids)

    Keys are stored as given; `info_nce` normalises them. Under DistributedDataParallel keep the queue outside the
    wrapped module if every process is to have its own: it copies the first process's buffers to all.

    Args:
        size: K, slots.
        dim: D, features of a key.
        scales: S, independent sets of keys that are enqueued together.
        seed: None starts empty; an int fills the queue with normalised Gaussian noise, as MoCo does, the same on every
            device.

    Attributes:
        keys: float32 [S, K, D].
        ids: int64 [K]; −1 is unknown.
        valid: int64 0-d, how many slots, counted from the front, are filled.
        cursor: int64 0-d, the slot that is written next.

    Raises:
        ValueError: size, dim or scales below 1.
    """

    keys: Tensor
    ids: Tensor
    valid: Tensor
    cursor: Tensor

    def __init__(self, size: int, dim: int, scales: int = 1, seed: int | None = None) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("scales", scales)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it is {value}")
        self.register_buffer("keys", torch.zeros(scales, size, dim))
        self.register_buffer("ids", torch.full((size,), UNKNOWN_ID))
        self.register_buffer("valid", torch.tensor(0))
        self.register_buffer("cursor", torch.tensor(0))
        if seed is not None:
            noise = torch.randn(scales, size, dim, generator=torch.Generator().manual_seed(seed), device="cpu")
            self.keys.copy_(F.normalize(noise, dim=-1))
            self.valid.fill_(size)

    @torch.no_grad()
    def enqueue(self, k: Tensor, ids: Tensor | None = None) -> None:
        """Replaces the oldest keys by a batch, as if its rows were written one after the other.

        Any batch size wraps around; of a batch longer than the queue the last K rows remain. k is detached and cast.

        Args:
            k: [S, B, D], or [B, D] for a queue of one scale; floating point.
            ids: int64 [B], ids of the images; without them the new keys' ids are unknown.

        Raises:
            TypeError: k is not floating point, or ids are not int64.
            ValueError: a wrong shape or device.
        """
        self._check(k, ids)
        k = k if k.ndim == 3 else k[None]
        batch, size = k.shape[1], self.keys.shape[1]
        dropped = max(batch - size, 0)  # index_copy_ leaves undefined which of two rows for one slot wins
        slots = (self.cursor + torch.arange(dropped, batch, device=k.device)) % size
        self.keys.index_copy_(1, slots, k[:, dropped:].to(self.keys.dtype))
        if ids is None:
            self.ids.index_fill_(0, slots, UNKNOWN_ID)
        else:
            self.ids.index_copy_(0, slots, ids[dropped:])
        self.cursor.add_(batch).remainder_(size)
        self.valid.add_(batch).clamp_(max=size)

    def _check(self, k: Tensor, ids: Tensor | None) -> None:
        scales, _, dim = self.keys.shape
        if not k.is_floating_point():
            raise TypeError(f"k must be floating point; it is {k.dtype}")
        if k.ndim not in (2, 3) or k.shape[-1] != dim or (k.shape[0] if k.ndim == 3 else 1) != scales:
            expected = f"[{scales}, B, {dim}]" + (f" or [B, {dim}]" if scales == 1 else "")
            raise ValueError(f"k must be {expected}; it is {list(k.shape)}")
        if ids is not None and ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64; they are {ids.dtype}")
        if ids is not None and ids.shape != k.shape[-2:-1]:
            raise ValueError(f"ids must be [{k.shape[-2]}]; they are {list(ids.shape)}")
        for name, x in (("k", k), ("ids", ids)):
            if x is not None and x.device != self.keys.device:
                raise ValueError(f"{name} must be on the queue's device, {self.keys.device}; it is on {x.device}")

    def extra_repr(self) -> str:
        scales, size, dim = self.keys.shape
        return f"size={size}, dim={dim}, scales={scales}"
