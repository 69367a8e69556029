"""Order of the images: which rank shows which image when, and whether it is mirrored."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dcvae_pipelines.source import DataError


class Order:
    """A new permutation of the data set for each epoch, divided among ranks.

    The images shown by all ranks together are numbered 0, 1, 2…; number i belongs to epoch i // per_epoch. A step shows
    the next `batch` × `ranks` numbers, and rank r the r-th `batch` of them. An epoch shows every image exactly once
    over all ranks, and batches continue across its end. The order depends on (seed, number) alone, so any position can
    be resumed exactly from its number.
    """

    def __init__(
        self,
        count: int,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            count: images in the data set.
            batch: batch size per rank; can exceed `count` unless `drop_last`.
            seed: seed of the permutations and flips; the same on all ranks.
            rank: rank of this process.
            ranks: number of processes that share the epochs.
            drop_last: whether an epoch drops its last images if they do not fill a batch on all ranks.
            device: device of the results of `take`.

        Raises:
            DataError: batch or rank out of range.
        """
        if not 0 <= rank < ranks:
            raise DataError(f"rank must be at least 0 and below ranks = {ranks}, not {rank}")
        self.count, self.rank, self._ranks = count, rank, ranks
        self._seed, self._drop_last, self._device = seed, drop_last, torch.device(device)
        self._planned: tuple[int, Tensor] | None = None
        self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        """Set the batch size per rank.

        Raises:
            DataError: it is out of range.
        """
        if batch < 1:
            raise DataError(f"batch must be at least 1, not {batch}")
        if self._drop_last and batch * self._ranks > self.count:
            raise DataError(
                f"drop_last leaves no batch: batch × ranks = {batch} × {self._ranks} exceeds the {self.count} images; "
                "choose a smaller batch"
            )
        self.batch, self.step = batch, batch * self._ranks
        self._per_epoch = self.count // self.step * self.step if self._drop_last else self.count

    def take(self, shown: int) -> Tensor:
        """Return this rank's batch of the step that begins after `shown` images.

        Returns:
            int64 [2, batch] on the device: the index of each image in the data set; 1 if it is mirrored, else 0.
        """
        number, parts = shown + self.rank * self.batch, []
        end = number + self.batch
        while number < end:
            epoch, position = divmod(number, self._per_epoch)
            parts.append(self._plan(epoch)[:, position : min(self._per_epoch, position + end - number)])
            number += parts[-1].shape[1]
        return torch.cat(parts, dim=1)

    def share(self, shown: int, skipped: int = 0) -> Iterator[tuple[int, int]]:
        """Yield index and flip of this rank's images, one by one.

        Args:
            shown: images shown before, by all ranks together.
            skipped: images that this rank left out before, in addition to those it has shown.
        """
        steps, first = divmod(skipped, self.batch)
        shown += steps * self.step
        while True:
            ids, flips = self.take(shown)[:, first:].tolist()
            yield from zip(ids, flips, strict=True)
            shown, first = shown + self.step, 0

    def _plan(self, epoch: int) -> Tensor:
        """Return the epoch's permutation and flips, [2, count].

        They are drawn on the CPU, to be the same for every device, and copied to the device once per epoch.
        """
        if self._planned is None or self._planned[0] != epoch:
            # Hashed: with the seed `seed + epoch`, runs of neighbouring seeds would share most of their permutations.
            digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            permutation = torch.randperm(self.count, generator=generator)
            flips = torch.randint(2, (self.count,), generator=generator)
            self._planned = epoch, to_device(torch.stack([permutation, flips]), self._device)
        return self._planned[1]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without blocking the host, which requires pinned memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
