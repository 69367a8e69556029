"""Data sets that fit the device's memory: gathered, mirrored and normalised there, with no work on the host."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dcvae_pipelines.order import Order
from dcvae_pipelines.pixels import normalize, resize
from dcvae_pipelines.source import Batch, DataError, check_size


class ResidentSource:
    """A `Source` over images that live on the device as uint8, in the order that `Order` describes."""

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
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
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
            dtype: of the batches, float32 or bfloat16.
            channels_last: memory format of the batches.

        Raises:
            DataError: images of another type or shape, or none; batch or rank out of range.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise DataError(f"images must be uint8 [N, C, H, W] with N > 0, not {images.dtype} {list(images.shape)}")
        self._order = Order(
            len(images), batch=batch, seed=seed, rank=rank, ranks=ranks, drop_last=drop_last, device=device
        )
        self._images = images.to(device)
        self._mirror, self._dtype, self._channels_last = mirror, dtype, channels_last
        self._shown = 0
        self._resolution: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches: images [B, C, H, W] in [-1, 1], ids int64 [B], both on the device."""
        while True:
            ids, coins = self._order.take(self._shown)
            self._shown += self._order.step
            images = self._images.index_select(0, ids)
            if self._resolution is not None:
                images = resize(images, self._resolution)
            if self._mirror:  # gathers each image or its mirror image: on a CPU four times as fast as torch.where
                both = torch.stack([images, images.flip(3)], dim=1).flatten(0, 1)
                images = both.index_select(0, torch.arange(0, len(both), 2, device=ids.device) + coins)
            yield Batch(normalize(images, dtype=self._dtype, channels_last=self._channels_last), ids)

    def state_dict(self) -> dict[str, Any]:
        """{"images": number of images shown, by all ranks together, "of": images in the data set}; the same on all
        ranks."""
        return {"images": self._shown, "of": self._order.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after state["images"] images.

        Raises:
            DataError: the data set has another number of images than when the state was saved.
        """
        check_size(state, self._order.count)
        self._shown = state["images"]

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Shows images at this resolution, which may be lower than their own, and as many a batch, from the next on.

        Raises:
            DataError: it is higher than the images' own, or lower and they are not square; batch out of range.
        """
        height, width = self._images.shape[2:]
        if not (resolution == height == width or 1 <= resolution < height == width):
            raise DataError(
                f"resolution must be at most that of the resident images, {height}×{width}, not {resolution}"
            )
        self._resolution = resolution
        if batch is not None:
            self._order.set_batch(batch)
