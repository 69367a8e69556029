"""First-in, first-out queue of keys, the negatives of MoCo and DC-VAE."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvae_kernels.reference import UNKNOWN_ID


class KeyQueue(nn.Module):
    """The last `size` keys of each scale, with the ids of the images they came from.

    All state is in buffers: it moves with `.to`, is saved in `state_dict`, and stays on the device. `enqueue` does not
    synchronise with the device and can be captured in a CUDA graph.

        loss = info_nce(q, k, queue.keys, valid=queue.valid, query_ids=ids, negative_ids=queue.ids)
        queue.enqueue(k, ids)

    Keys are stored without normalisation; `info_nce` normalises them. DistributedDataParallel broadcasts the buffers of
    rank 0: keep the queue outside the wrapped module if each rank needs its own.

    Args:
        size: number of slots, K.
        dim: number of features of a key, D.
        scales: number of independent sets of keys that are enqueued together, S.
        seed: None for an empty queue, or an int to fill it with normalised Gaussian noise, as MoCo does. The noise is
            the same on every device.

    Attributes:
        keys: float32 [S, K, D].
        ids: int64 [K], −1 if unknown.
        valid: int64 0-d, number of filled slots; they come first.
        cursor: int64 0-d, slot to write next.

    Raises:
        ValueError: size, dim or scales is below 1.
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
        """Replace the oldest keys by a batch of any size, as if its rows were written one after the other.

        If the batch is larger than the queue, its last K rows remain. k is detached and cast to the dtype of the queue.

        Args:
            k: [S, B, D], or [B, D] if the queue has one scale; floating point.
            ids: int64 [B], ids of the images; None if unknown.

        Raises:
            TypeError: k is not floating point, or ids are not int64.
            ValueError: wrong shape or device.
        """
        self._check(k, ids)
        k = k if k.ndim == 3 else k[None]
        batch, size = k.shape[1], self.keys.shape[1]
        dropped = max(batch - size, 0)  # the result of index_copy_ is undefined if an index occurs twice
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
