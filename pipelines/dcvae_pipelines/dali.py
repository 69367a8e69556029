"""Images decoded by NVIDIA DALI as they are needed: on the GPU where there is one, else on the CPU."""

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

# What DALI decodes as Pillow does, on the CPU to the last bit, if it is upright, has 8 bits and one frame. Everything
# else is decoded by Pillow, and so is what DALI turns out not to take.
_DALI_DECODES = {
    "JPEG": ("L", "RGB"),
    "MPO": ("L", "RGB"),  # JPEG, with further pictures behind the first
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
}

_File = tuple[bytes, Box]
"""An encoded image as DALI can decode it, and the square of it that is shown."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reading:
    """The next image of this rank's share of the order, while its file is being read.

    Attributes:
        index: its number in the data set
        coin: 1 where it is mirrored, else 0
        file: None where the image is known to be undecodable
    """

    index: int
    coin: int
    file: "Future[_File] | None"


@dataclass(frozen=True)
class _Group:
    """A batch while DALI decodes it.

    Attributes:
        indices: numbers of its images in the data set
        coins: of each image, as in `_Reading`
        files: its images, encoded
        skipped: number of images left out among these
    """

    indices: list[int]
    coins: list[int]
    files: list[_File]
    skipped: int


class DaliSource:
    """A `Source` over encoded images, in the order that `Order` describes.

    Files are read ahead by threads, decoded by DALI (JPEG on the GPU, by its hardware decoder where it has one), then
    resized, mirrored and normalised by torch on the device. The state is a number of images and no state of DALI's, so
    that it holds at any batch, and for another resolution and another number of ranks too.
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
        """Nothing is read before the first batch is asked for.

        Args:
            images: the data set.
            resolution: height and width of the images shown, in pixels, until `set_resolution`; images that have fewer
                count as undecodable.
            batch: images a batch, on each rank.
            seed: of the order and of the mirroring; the same on all ranks.
            device: where batches appear; a GPU decodes, too.
            rank: this process among `ranks`.
            ranks: processes that share the epochs.
            channels: 3 for RGB, 1 for grey.
            mirror: whether to flip each image left to right with probability ½, drawn afresh each epoch.
            drop_last: whether an epoch leaves out the last images of its permutation that fill no batch on all ranks.
            dtype: of the batches, float32 or bfloat16.
            channels_last: memory format of the batches.
            threads: that decode, and as many that read; None for the cores of this process, shared among the ranks.
            prefetch: batches decoded ahead.
            on_corrupt: what to do about an image that cannot be read or decoded: `stop` raises DataError when its turn
                comes, `skip` leaves it out with a warning, and the next one of the order takes its place.

        Raises:
            DataError: no images; a setting out of range; DALI is missing.
        """
        if len(images) == 0:
            raise DataError(f"{images.name}: there are no images")
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
        self._prefetch, self._least = prefetch, resolution
        self._readers: Any = None
        self._shown = self._skipped = 0
        self._ranks = ranks
        self._left_out: set[int] = set()
        self._by_pillow: set[int] = set()
        self._stop()
        self.set_resolution(resolution)

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches: images [B, C, R, R] in [-1, 1], ids int64 [B], both on the device.

        Raises:
            DataError: an image cannot be read or decoded; the message names it. Or none of them can.
        """
        try:
            while True:
                yield self._next()
        finally:  # nobody listens any more
            self._stop()

    def state_dict(self) -> dict[str, Any]:
        """{"images": number of images shown, by all ranks together, "of": images in the data set, "skipped": images
        left out by this rank, "ranks": how many there are}."""
        return {"images": self._shown, "of": len(self._images), "skipped": self._skipped, "ranks": self._ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after state["images"] images.

        Where images were skipped, and there were another number of ranks, as many images of the epoch may be shown
        twice or not at all.

        Raises:
            DataError: the data set has another number of images than when the state was saved.
        """
        check_size(state, len(self._images))
        self._shown = state["images"]
        self._skipped = state["skipped"] if state.get("ranks") == self._ranks else 0
        self._stop()

    def set_resolution(self, resolution: int, batch: int | None = None) -> None:
        """Show images at resolution × resolution pixels from the next batch on, and `batch` of them if that is given.

        Images decoded ahead are kept, unless the size of the batch changes.

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
            except StopIteration:  # `_feed` has nothing more, and all that it fed has been handed out
                raise self._problem from None
            except RuntimeError as error:  # DALI's, about one of the images it holds; it does not say which
                groups = self._decoding
                self._stop()
                self._find_undecodable(groups, error)
        group = self._decoding.popleft()
        images = [decoded[i] for i in range(len(decoded))]
        squares = [
            torch.from_dlpack(image)[top : top + side, left : left + side]
            for image, (_, (top, left, side)) in zip(images, group.files, strict=True)
        ]
        ids, coins = to_device(torch.tensor([group.indices, group.coins]), self._device)
        images = (self._finish_on_gpu if self._device.type == "cuda" else self._finish_on_cpu)(squares, coins)
        self._shown += self._order.step
        self._skipped += group.skipped
        return Batch(images, ids)

    def _finish(self, squares_BHHC: Tensor, coins: Tensor) -> Tensor:
        images = squares_BHHC.permute(0, 3, 1, 2)
        if self._channels == 1:
            images = to_grey(images)
        mirrored = coins if self._mirror else None
        return normalize(resize(images, self._resolution), mirrored, self._dtype, self._channels_last)

    def _finish_on_cpu(self, squares: list[Tensor], coins: Tensor) -> Tensor:
        """One by one, each by one thread: batches would be copied more often, and by fewer cores."""
        shape = (len(squares), self._channels, self._resolution, self._resolution)
        images = torch.empty(shape, dtype=self._dtype, memory_format=self._layout)

        def finish(i: int) -> None:
            images[i] = self._finish(squares[i][None], coins[i : i + 1])[0]

        list(self._readers.map(finish, range(len(squares))))
        return images

    def _finish_on_gpu(self, squares: list[Tensor], coins: Tensor) -> Tensor:
        """All of a size at once."""
        finished: dict[int, Tensor] = {}
        for side in {len(square) for square in squares}:
            chosen = [i for i, square in enumerate(squares) if len(square) == side]
            same_size = torch.stack([squares[i] for i in chosen])
            if len(chosen) == len(squares):
                return self._finish(same_size, coins)
            finished.update(zip(chosen, self._finish(same_size, torch.stack([coins[i] for i in chosen])), strict=True))
        return torch.stack([finished[i] for i in range(len(squares))]).contiguous(memory_format=self._layout)

    # --- what goes into DALI ---

    def _start(self) -> Any:
        """The pipeline; begins to read and to decode after the images that were shown."""
        self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._share = self._order.share(self._shown, self._skipped)
        for _ in range(2 * self._order.batch):  # one batch is fed while the next is read
            self._read_one_more()
        self._pipeline = _decoder(self._feed, self._order.batch, self._threads, self._prefetch, self._device_id())
        return self._pipeline

    def _stop(self) -> None:
        """Drops all that was read and decoded ahead, and ends the threads."""
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)
        self._readers = self._pipeline = None
        self._reading: deque[_Reading] = deque()
        self._decoding: deque[_Group] = deque()
        self._problem = DataError(f"{self._images.name}: nothing is being read")

    def _read_one_more(self) -> None:
        index, coin = next(self._share)
        file = None if index in self._left_out else self._readers.submit(self._read, index)
        self._reading.append(_Reading(index, coin, file))

    def _read(self, index: int) -> _File:
        """Run by the reading threads."""
        name, encoded = self._images.image_name(index), self._images.read(index)
        header = read_header(encoded, name)
        is_plain = not (header.rotated or header.animated or header.deep or index in self._by_pillow)
        if is_plain and header.mode in _DALI_DECODES.get(header.format, ()):
            return encoded, self._images.square(index, header.width, header.height, self._least)
        image = decode(encoded, name, channels=3)
        return _as_ppm(image), self._images.square(index, image.width, image.height, self._least)

    def _feed(self) -> list[_File]:
        """The next batch for DALI."""
        indices, coins, files, skipped = [], [], [], 0
        while len(indices) < self._order.batch:
            reading = self._reading.popleft()
            self._read_one_more()
            try:
                file = self._file(reading)
            except DataError as problem:
                self._problem = problem  # raised when the turn of this batch has come
                raise StopIteration from None
            if file is None:
                skipped += 1
            else:
                indices.append(reading.index)
                coins.append(reading.coin)
                files.append(file)
        self._decoding.append(_Group(indices, coins, files, skipped))
        return files

    def _file(self, reading: _Reading) -> _File | None:
        """Return the file once it is read, or None if the image is left out.

        Raises:
            DataError: see `_leave_out`.
        """
        try:
            return None if reading.file is None else reading.file.result()
        except DataError as problem:
            self._leave_out(reading.index, problem)
            return None

    # --- what cannot be decoded ---

    def _leave_out(self, index: int, problem: DataError) -> None:
        """
        Raises:
            DataError: it is not to be left out, or there is nothing else left.
        """
        if self._on_corrupt == "stop":
            raise problem
        if index not in self._left_out:
            _log.warning("left out: %s", problem)
        self._left_out.add(index)
        if len(self._left_out) == len(self._images):
            raise DataError(f"{self._images.name}: none of the {len(self._images):,} images can be decoded")

    def _find_undecodable(self, groups: Iterable[_Group], error: RuntimeError) -> None:
        """Find the first batch that DALI cannot decode, and leave its undecodable images to Pillow, or leave them out.

        Raises:
            DataError: see `_leave_out`.
            RuntimeError: `error`, if no image is its cause.
        """
        for group in groups:
            undecodable = [i for i, file in enumerate(group.files) if not self._is_decodable(file)]
            problems = [self._pillows_problem(group, i) for i in undecodable]
            if len(undecodable) == len(group.files) > 1 and not any(problems):
                break  # DALI decodes nothing, and not for the images: out of memory, say
            for i, problem in zip(undecodable, problems, strict=True):
                if problem is None:
                    self._by_pillow.add(group.indices[i])
                else:
                    self._leave_out(group.indices[i], problem)
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

    def _pillows_problem(self, group: _Group, i: int) -> DataError | None:
        try:
            decode(group.files[i][0], self._images.image_name(group.indices[i]), channels=3)
        except DataError as problem:
            return problem
        return None

    def _device_id(self) -> int | None:
        return self._device.index if self._device.type == "cuda" else None

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None


def _decoder(feed: Callable[[], list[_File]], batch: int, threads: int, prefetch: int, device_id: int | None) -> Any:
    """A DALI pipeline, built: what `feed` returns, batch by batch → images uint8 [H, W, C]."""
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
            jpeg_fancy_upsampling=True,  # chroma on the GPU as on the CPU
        )

    pipeline = decoder()
    pipeline.build()
    return pipeline


def _as_ppm(image: Any) -> bytes:
    """A PIL.Image.Image of mode RGB, uncompressed."""
    return f"P6 {image.width} {image.height} 255\n".encode() + image.tobytes()
