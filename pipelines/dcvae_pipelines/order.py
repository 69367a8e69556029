"""Which image is shown when, on which rank, and whether it is mirrored."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dcvae_pipelines.source import DataError


class Order:
    """A fresh permutation of the data set for each epoch, shared out among ranks.

    The images shown by all ranks together are numbered 0, 1, 2…; number i belongs to epoch i // per_epoch. A step shows
    the next `batch` × `ranks` numbers, of which rank r takes the r-th `batch`. So an epoch shows every image exactly
    once over all ranks, and batches run across its end. What is shown depends on (seed, number) alone: any position is
    resumed exactly from its number.
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
            batch: images a batch, on each rank; may exceed `count` unless `drop_last`.
            seed: of the permutations and of the mirroring; the same on all ranks.
            rank: this process among `ranks`.
            ranks: processes that share the epochs.
            drop_last: whether an epoch leaves out the last images of its permutation that fill no batch on all ranks.
            device: where `take` puts its answers.

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
        """
        Raises:
            DataError: out of range.
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
        """This rank's batch of the step that begins after `shown` images.

        Returns:
            int64 [2, batch] on the device: each image's index in the data set; 1 where its coin says mirrored, else 0.
        """
        number, parts = shown + self.rank * self.batch, []
        end = number + self.batch
        while number < end:
            epoch, position = divmod(number, self._per_epoch)
            parts.append(self._plan(epoch)[:, position : min(self._per_epoch, position + end - number)])
            number += parts[-1].shape[1]
        return torch.cat(parts, dim=1)

    def share(self, shown: int, skipped: int = 0) -> Iterator[tuple[int, int]]:
        """This rank's images one after the other, from where it is: index and coin of each.

        Args:
            shown: images shown, by all ranks together.
            skipped: images that this rank left out, so that it is further on in its share than what it has shown.
        """
        steps, first = divmod(skipped, self.batch)
        shown += steps * self.step
        while True:
            ids, coins = self.take(shown)[:, first:].tolist()
            yield from zip(ids, coins, strict=True)
            shown, first = shown + self.step, 0

    def _plan(self, epoch: int) -> Tensor:
        """The epoch's permutation and coins, [2, count]: drawn on the CPU, so that they are the same on every device,
        and copied to the device once an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            # A hash, since neighbouring seeds and epochs must not meet: seed + epoch would repeat seed + 1's epochs.
            digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            permutation = torch.randperm(self.count, generator=generator)
            coins = torch.randint(2, (self.count,), generator=generator)
            self._planned = epoch, to_device(torch.stack([permutation, coins]), self._device)
        return self._planned[1]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: from pageable memory it would."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
