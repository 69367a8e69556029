"""The interface between data and training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class DataError(ValueError):
    """Data that is missing, unreadable or unsuited; the message is one sentence that a user can act on."""


@dataclass(frozen=True)
class Batch:
    """Images and their numbers, both on the training device.

    Attributes:
        images: float32, or bfloat16 if the source was asked for it, [B, C, H, W] in [-1, 1]
        ids: int64 [B], index of each image in its data set
    """

    images: Tensor
    ids: Tensor


class Source(Protocol):
    """An endless, resumable stream of batches; one process of several sees its own share of it."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, starting after the last one shown."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream. Every batch handed out counts as shown, the one the caller holds included."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a position that `state_dict` gave, with exactly the batches that would have followed it."""
        ...

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Show images at resolution × resolution pixels from the next batch on, and `batch` of them if that is given.

        The position in the stream stays.

        Raises:
            DataError: this source cannot show them at that resolution.
        """
        ...


def check_size(state: Mapping[str, Any], count: int) -> None:
    """
    Raises:
        DataError: the state was saved of a data set with another number of images, so that its order is another.
    """
    if state.get("of", count) != count:
        raise DataError(
            f"the data set has {count:,} images now and had {state['of']:,} when this position was saved; "
            "bring back the same images, or begin a new run"
        )
