"""Data sets that fit in device memory: batches are gathered, mirrored and normalised there, not on the host."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dcvae_pipelines.order import Order
from dcvae_pipelines.pixels import normalize, resize
from dcvae_pipelines.source import Batch, DataError, check_size


class ResidentSource:
    """`Source` of images that are kept on the device as uint8, in the order that `Order` defines."""

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
        """Copy the images to the device.

        Args:
            images: uint8 [N, C, H, W].
            batch: batch size per rank; can exceed N unless `drop_last`.
            seed: seed of the order and flips; the same on all ranks.
            device: device of the images and batches.
            rank: rank of this process.
            ranks: number of processes that share the epochs.
            mirror: whether to flip each image left to right with probability ½, drawn again in each epoch.
            drop_last: whether an epoch drops its last images if they do not fill a batch on all ranks.
            dtype: dtype of the batches, float32 or bfloat16.
            channels_last: whether batches are channels_last instead of contiguous.

        Raises:
            DataError: images of another dtype or shape, or no images; batch or rank out of range.
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
        """Yield batches endlessly: images [B, C, H, W] in [-1, 1] and ids int64 [B], both on the device."""
        while True:
            ids, flips = self._order.take(self._shown)
            self._shown += self._order.step
            images = self._images.index_select(0, ids)
            if self._resolution is not None:
                images = resize(images, self._resolution)
            if self._mirror:  # gathers each image or its flip: on a CPU four times as fast as torch.where
                pairs = torch.stack([images, images.flip(3)], dim=1).flatten(0, 1)
                images = pairs.index_select(0, torch.arange(0, len(pairs), 2, device=ids.device) + flips)
            yield Batch(normalize(images, dtype=self._dtype, channels_last=self._channels_last), ids)

    def state_dict(self) -> dict[str, Any]:
        """Return {"images": images shown by all ranks together, "of": images in the data set}, equal on all ranks."""
        return {"images": self._shown, "of": self._order.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after state["images"] images.

        Raises:
            DataError: the data set has another number of images than when the state was saved.
        """
        check_size(state, self._order.count)
        self._shown = state["images"]

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Set the resolution, and the batch size if given, from the next batch on. The position is unchanged.

        Raises:
            DataError: `resolution` is not between 1 and that of the images, or they are not square; invalid batch.
        """
        height, width = self._images.shape[2:]
        if not 1 <= resolution <= height == width:
            raise DataError(
                "resolution must be from 1 to that of the resident images, which must be square: "
                f"they are {height}×{width}, and it is {resolution}"
            )
        self._resolution = resolution
        if batch is not None:
            self._order.set_batch(batch)
