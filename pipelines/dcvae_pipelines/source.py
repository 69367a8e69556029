"""The interface between data and training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class DataError(ValueError):
    """Missing, unreadable or unsuitable data; the message is one sentence that a user can act on."""


@dataclass(frozen=True)
class Batch:
    """Images and their indices, both on the training device.

    Attributes:
        images: float32 or bfloat16 [B, C, H, W] in [-1, 1]
        ids: int64 [B], index of each image in its data set
    """

    images: Tensor
    ids: Tensor


class Source(Protocol):
    """Endless, resumable stream of batches; each rank receives its own share."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches endlessly, starting after the last batch shown."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream. All batches yielded so far count as shown, including the latest."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position returned by `state_dict`, with exactly the batches that would have followed."""
        ...

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Set the resolution, and the batch size if given, from the next batch on. The position is unchanged.

        Raises:
            DataError: this source cannot show images at that resolution.
        """
        ...


def check_size(state: Mapping[str, Any], count: int) -> None:
    """Check that a position was saved for a data set of `count` images; the order depends on it.

    Raises:
        DataError: it was saved for a data set with another number of images.
    """
    if state.get("of", count) != count:
        raise DataError(
            f"the data set has {count:,} images now and had {state['of']:,} when this position was saved; "
            "restore the same images, or start a new run"
        )
