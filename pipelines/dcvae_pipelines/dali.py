"""Images decoded by NVIDIA DALI during training, on the GPU or the CPU."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dcvae_pipelines.encoded import EncodedSet
from dcvae_pipelines.image import Box, check_channels, decode, read_header
from dcvae_pipelines.optional import import_optional
from dcvae_pipelines.order import Order, to_device
from dcvae_pipelines.pixels import normalize, resize, to_grey
from dcvae_pipelines.source import Batch, DataError, check_size

OnCorrupt = Literal["stop", "skip"]

# Formats and modes that DALI decodes as Pillow does (on the CPU bit for bit), if the image is upright, has 8 bits per
# channel and one frame. Pillow decodes all other images, and any image that DALI rejects.
_DALI_DECODES = {
    "JPEG": ("L", "RGB"),
    "MPO": ("L", "RGB"),  # JPEG, followed by further pictures
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
}

_File = tuple[bytes, Box]
"""Encoded image that DALI can decode, and the square of it to show."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reading:
    """Image of this rank's share whose file is being read.

    Attributes:
        index: index in the data set
        flip: 1 if the image is mirrored, else 0
        file: the file to wait for; None if the image is known to be undecodable
    """

    index: int
    flip: int
    file: "Future[_File] | None"


@dataclass(frozen=True)
class _Group:
    """Batch that DALI is decoding.

    Attributes:
        indices: indices of its images in the data set
        flips: flip of each image, as in `_Reading`
        files: its encoded images
        skipped: number of images left out while it was collected
    """

    indices: list[int]
    flips: list[int]
    files: list[_File]
    skipped: int


class DaliSource:
    """`Source` of encoded images, in the order that `Order` defines.

    Threads read files ahead, DALI decodes them (JPEG on the GPU, with its hardware decoder if available), and torch
    resizes, mirrors and normalises the images on the device. The state is a number of images and contains nothing of
    DALI's, so it can be saved after any batch and loaded for another resolution or number of ranks.
    """

    def __init__(
        self,
        images: EncodedSet,
        *,
        resolution: int,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        channels: int = 3,
        mirror: bool = False,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        threads: int | None = None,
        prefetch: int = 2,
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        """Prepare the source; reading starts with the first batch.

        Args:
            images: the data set.
            resolution: height and width of the images shown, in pixels, until `set_resolution`. Smaller images count as
                undecodable, also after `set_resolution`.
            batch: batch size per rank.
            seed: seed of the order and flips; the same on all ranks.
            device: device of the batches; a GPU also decodes.
            rank: rank of this process.
            ranks: number of processes that share the epochs.
            channels: 3 for RGB, 1 for grey.
            mirror: whether to flip each image left to right with probability ½, drawn again in each epoch.
            drop_last: whether an epoch drops its last images if they do not fill a batch on all ranks.
            dtype: dtype of the batches, float32 or bfloat16.
            channels_last: whether batches are channels_last instead of contiguous.
            threads: number of decoding threads, and of reading threads; None: this process's cores divided by `ranks`.
            prefetch: number of batches decoded ahead.
            on_corrupt: for an image that cannot be read or decoded, "stop" raises DataError when it would be shown;
                "skip" leaves it out with a warning, and shows the next image of the order instead.

        Raises:
            DataError: no images; a setting out of range; DALI is not installed.
        """
        if len(images) == 0:
            raise DataError(f"{images.name}: the data set is empty")
        check_channels(channels)
        if prefetch < 1 or (threads is not None and threads < 1):
            raise DataError(f"prefetch and threads must be at least 1, not {prefetch} and {threads}")
        import_optional("nvidia.dali", "nvidia-dali-cuda130")
        self._images, self._device = images, torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._order = Order(len(images), batch=batch, seed=seed, rank=rank, ranks=ranks, drop_last=drop_last)
        self._channels, self._mirror, self._on_corrupt = channels, mirror, on_corrupt
        self._dtype, self._channels_last = dtype, channels_last
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // ranks)
        self._prefetch, self._min_side = prefetch, resolution
        self._readers: Any = None
        self._shown = self._skipped = 0
        self._ranks = ranks
        self._left_out: set[int] = set()
        self._by_pillow: set[int] = set()
        self._stop()
        self.set_resolution(resolution)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches endlessly: images [B, C, R, R] in [-1, 1] and ids int64 [B], both on the device.

        Raises:
            DataError: an image, named in the message, cannot be read or decoded, or no image can.
        """
        try:
            while True:
                yield self._next()
        finally:  # the iterator was closed
            self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return {"images": images shown by all ranks together, "of": images in the data set, "skipped": images left
        out by this rank, "ranks": number of ranks}."""
        return {"images": self._shown, "of": len(self._images), "skipped": self._skipped, "ranks": self._ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after state["images"] images.

        If images were skipped and the number of ranks has changed, as many images of the epoch as were skipped can be
        shown twice or not at all.

        Raises:
            DataError: the data set has another number of images than when the state was saved.
        """
        check_size(state, len(self._images))
        self._shown = state["images"]
        self._skipped = state["skipped"] if state.get("ranks") == self._ranks else 0
        self._stop()

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Set the resolution, and the batch size if given, from the next batch on. The position is unchanged.

        Images decoded ahead are kept unless the batch size changes.

        Raises:
            DataError: `resolution` or `batch` is below 1.
        """
        if resolution < 1:
            raise DataError(f"resolution must be at least 1, not {resolution}")
        self._resolution = resolution
        if batch is not None and batch != self._order.batch:
            self._order.set_batch(batch)
            self._stop()

    def _next(self) -> Batch:
        while True:
            pipeline = self._start() if self._pipeline is None else self._pipeline
            try:
                (decoded,) = pipeline.run(self._stream())
                break
            except StopIteration:  # `_feed` failed, and the batches before are consumed
                raise self._error from None
            except RuntimeError as error:  # raised by DALI for one of its images, without naming it
                groups = self._decoding
                self._stop()
                self._find_undecodable(groups, error)
        group = self._decoding.popleft()
        images = [decoded[i] for i in range(len(decoded))]
        squares = [
            torch.from_dlpack(image)[top : top + side, left : left + side]
            for image, (_, (top, left, side)) in zip(images, group.files, strict=True)
        ]
        ids, flips = to_device(torch.tensor([group.indices, group.flips]), self._device)
        images = (self._finish_on_gpu if self._device.type == "cuda" else self._finish_on_cpu)(squares, flips)
        self._shown += self._order.step
        self._skipped += group.skipped
        return Batch(images, ids)

    def _finish(self, squares_BHHC: Tensor, flips: Tensor) -> Tensor:
        images = squares_BHHC.permute(0, 3, 1, 2)
        if self._channels == 1:
            images = to_grey(images)
        mirrored = flips if self._mirror else None
        return normalize(resize(images, self._resolution), mirrored, self._dtype, self._channels_last)

    def _finish_on_cpu(self, squares: list[Tensor], flips: Tensor) -> Tensor:
        """Finish images in parallel, one per thread; whole batches need more copies and use fewer cores."""
        shape = (len(squares), self._channels, self._resolution, self._resolution)
        images = torch.empty(shape, dtype=self._dtype, memory_format=self._layout)

        def finish(i: int) -> None:
            images[i] = self._finish(squares[i][None], flips[i : i + 1])[0]

        list(self._readers.map(finish, range(len(squares))))
        return images

    def _finish_on_gpu(self, squares: list[Tensor], flips: Tensor) -> Tensor:
        """Finish images of equal size together."""
        finished: dict[int, Tensor] = {}
        for side in {len(square) for square in squares}:
            group = [i for i, square in enumerate(squares) if len(square) == side]
            same_size = torch.stack([squares[i] for i in group])
            if len(group) == len(squares):
                return self._finish(same_size, flips)
            finished.update(zip(group, self._finish(same_size, torch.stack([flips[i] for i in group])), strict=True))
        return torch.stack([finished[i] for i in range(len(squares))]).contiguous(memory_format=self._layout)

    # --- reading, and feeding DALI ---

    def _start(self) -> Any:
        """Start to read and decode after the images already shown, and return the pipeline."""
        self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._share = self._order.share(self._shown, self._skipped)
        for _ in range(2 * self._order.batch):  # one batch is fed while the next is read
            self._read_one_more()
        self._pipeline = _decoder(self._feed, self._order.batch, self._threads, self._prefetch, self._device_id())
        return self._pipeline

    def _stop(self) -> None:
        """Discard everything read and decoded ahead, and end the threads."""
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)
        self._readers = self._pipeline = None
        self._reading: deque[_Reading] = deque()
        self._decoding: deque[_Group] = deque()
        self._error = DataError(f"{self._images.name}: nothing is being read")

    def _read_one_more(self) -> None:
        index, flip = next(self._share)
        file = None if index in self._left_out else self._readers.submit(self._read, index)
        self._reading.append(_Reading(index, flip, file))

    def _read(self, index: int) -> _File:
        """Read an image and its square; called by the reading threads."""
        name, encoded = self._images.image_name(index), self._images.read(index)
        header = read_header(encoded, name)
        is_plain = not (header.rotated or header.animated or header.deep or index in self._by_pillow)
        square = self._images.square(index, header.width, header.height, self._min_side)
        if is_plain and header.mode in _DALI_DECODES.get(header.format, ()):
            return encoded, square
        return _as_ppm(decode(encoded, name, channels=3)), square

    def _feed(self) -> list[_File]:
        """Return the next batch for DALI."""
        indices, flips, files, skipped = [], [], [], 0
        while len(indices) < self._order.batch:
            reading = self._reading.popleft()
            self._read_one_more()
            try:
                file = self._await_file(reading)
            except DataError as error:
                self._error = error  # raised by `_next` when this batch is due
                raise StopIteration from None
            if file is None:
                skipped += 1
            else:
                indices.append(reading.index)
                flips.append(reading.flip)
                files.append(file)
        self._decoding.append(_Group(indices, flips, files, skipped))
        return files

    def _await_file(self, reading: _Reading) -> _File | None:
        """Return the file once it is read, or None if the image is left out.

        Raises:
            DataError: see `_leave_out`.
        """
        try:
            return None if reading.file is None else reading.file.result()
        except DataError as error:
            self._leave_out(reading.index, error)
            return None

    # --- undecodable images ---

    def _leave_out(self, index: int, error: DataError) -> None:
        """Leave out an image from now on.

        Raises:
            DataError: `on_corrupt` is "stop", or no image remains.
        """
        if self._on_corrupt == "stop":
            raise error
        if index not in self._left_out:
            _log.warning("left out: %s", error)
        self._left_out.add(index)
        if len(self._left_out) == len(self._images):
            raise DataError(f"{self._images.name}: none of the {len(self._images):,} images can be decoded")

    def _find_undecodable(self, groups: Iterable[_Group], error: RuntimeError) -> None:
        """Find the first batch that DALI cannot decode; assign its undecodable images to Pillow, or leave them out.

        Raises:
            DataError: see `_leave_out`.
            RuntimeError: `error`, if it is not caused by an image.
        """
        for group in groups:
            undecodable = [i for i, file in enumerate(group.files) if not self._is_decodable(file)]
            pillow_errors = [self._pillow_error(group, i) for i in undecodable]
            if len(undecodable) == len(group.files) > 1 and not any(pillow_errors):
                break  # the images are not the cause: out of memory, for example
            for i, pillow_error in zip(undecodable, pillow_errors, strict=True):
                if pillow_error is None:
                    self._by_pillow.add(group.indices[i])
                else:
                    self._leave_out(group.indices[i], pillow_error)
            if undecodable:
                return
        raise error

    def _is_decodable(self, file: _File) -> bool:
        decoder = _decoder(lambda: [file], 1, 1, 1, self._device_id())
        try:
            decoder.run()
        except RuntimeError:
            return False
        return True

    def _pillow_error(self, group: _Group, i: int) -> DataError | None:
        try:
            decode(group.files[i][0], self._images.image_name(group.indices[i]), channels=3)
        except DataError as error:
            return error
        return None

    def _device_id(self) -> int | None:
        return self._device.index if self._device.type == "cuda" else None

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None


def _decoder(feed: Callable[[], list[_File]], batch: int, threads: int, prefetch: int, device_id: int | None) -> Any:
    """Build a DALI pipeline that decodes the batches returned by `feed` to images uint8 [H, W, C]."""
    import numpy as np

    dali: Any = import_optional("nvidia.dali", "nvidia-dali-cuda130")
    fn, types = dali.fn, dali.types

    def arrays() -> list[np.ndarray]:
        return [np.frombuffer(encoded, np.uint8) for encoded, _ in feed()]

    @dali.pipeline_def(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch)
    def decoder() -> Any:
        return fn.decoders.image(
            fn.external_source(source=arrays, dtype=types.UINT8, ndim=1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # the same chroma on the GPU as on the CPU
        )

    pipeline = decoder()
    pipeline.build()
    return pipeline


def _as_ppm(image: Any) -> bytes:
    """Encode a PIL.Image.Image of mode RGB, uncompressed."""
    return f"P6 {image.width} {image.height} 255\n".encode() + image.tobytes()
