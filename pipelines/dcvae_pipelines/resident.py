"""Data sets that fit the device's memory: gathered, mirrored and normalised there, with no work on the host."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dcvae_pipelines.source import Batch, DataError


class ResidentSource:
    """A `Source` over images that live on the device as uint8.

    The images shown by all ranks together are numbered 0, 1, 2…; number i belongs to epoch i // per_epoch, and each
    epoch is a fresh permutation of the data set. A step shows the next `batch` × `ranks` numbers, of which rank r
    takes the r-th `batch`. So an epoch shows every image exactly once over all ranks, and batches run across its end.
    What is shown depends on (seed, number) alone: any position is resumed exactly from its number.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        mirror: bool = False,
        drop_last: bool = False,
    ) -> None:
        """Puts the images on the device.

        Args:
            images: uint8 [N, C, H, W].
            batch: images a batch, on each rank; may exceed N unless `drop_last`.
            seed: of the order and of the mirroring; the same on all ranks.
            device: where images live and batches appear.
            rank: this process among `ranks`.
            ranks: processes that share the epochs.
            mirror: whether to flip each image left to right with probability ½, drawn afresh each epoch.
            drop_last: whether an epoch leaves out the last images of its permutation that fill no batch on all ranks.

        Raises:
            DataError: images of another type or shape, or none; batch or rank out of range.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise DataError(f"images must be uint8 [N, C, H, W] with N > 0, not {images.dtype} {list(images.shape)}")
        if batch < 1:
            raise DataError(f"batch must be at least 1, not {batch}")
        if not 0 <= rank < ranks:
            raise DataError(f"rank must be at least 0 and below ranks = {ranks}, not {rank}")
        if drop_last and batch * ranks > len(images):
            raise DataError(
                f"drop_last leaves no batch: batch × ranks = {batch} × {ranks} exceeds the {len(images)} images; "
                "choose a smaller batch"
            )
        self._images = images.to(device)
        self._batch, self._rank, self._step = batch, rank, batch * ranks
        self._seed, self._mirror = seed, mirror
        self._per_epoch = len(images) // self._step * self._step if drop_last else len(images)
        self._shown = 0
        self._planned: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches: images float32 [B, C, H, W] in [-1, 1], ids int64 [B], both on the device."""
        while True:
            batch = self._batch_from(self._shown + self._rank * self._batch)
            self._shown += self._step
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """{"images": number of images shown, by all ranks together}; the same on all ranks."""
        return {"images": self._shown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after state["images"] images."""
        self._shown = state["images"]

    def set_resolution(self, resolution: int) -> None:
        """Accepts the images' own resolution only.

        Raises:
            DataError: any other; resident images are not resized.
        """
        height, width = self._images.shape[2:]
        if (height, width) != (resolution, resolution):
            raise DataError(f"resolution must be that of the resident images, {height}×{width}, not {resolution}")

    def _batch_from(self, number: int) -> Batch:
        """The batch whose first image has this number."""
        end, parts = number + self._batch, []
        while number < end:
            epoch, position = divmod(number, self._per_epoch)
            parts.append(self._plan(epoch)[:, position : min(self._per_epoch, position + end - number)])
            number += parts[-1].shape[1]
        ids, flips = torch.cat(parts, dim=1)
        images = self._images[ids]
        if self._mirror:
            images = torch.where(flips.bool()[:, None, None, None], images.flip(3), images)
        return Batch(images.float().div_(127.5).sub_(1), ids)

    def _plan(self, epoch: int) -> Tensor:
        """int64 [2, N] on the device: the epoch's permutation, and 1 where an image is mirrored, 0 where not.

        Drawn on the CPU, so that the order is the same on every device, and copied there once an epoch.
        """
        if self._planned is None or self._planned[0] != epoch:
            # A hash, since neighbouring seeds and epochs must not meet: seed + epoch would repeat seed + 1's epochs.
            digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            count = len(self._images)
            plan = torch.stack(
                [torch.randperm(count, generator=generator), torch.randint(2, (count,), generator=generator)]
            )
            if self._images.is_cuda:
                plan = plan.pin_memory()  # from pageable memory the copy would wait for the device
            self._planned = epoch, plan.to(self._images.device, non_blocking=True)
        return self._planned[1]
