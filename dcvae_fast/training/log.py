"""Logging: metrics.jsonl, TensorBoard, progress lines and image grids.

Training waits for the device only for log lines, held-out metrics, grids and checkpoints, while it is profiled, and in
float16 for the loss scale.
"""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dcvae_fast.distributed import SINGLE, Ranks
from dcvae_fast.errors import DivergedError
from dcvae_fast.images import make_grid, png_bytes, to_bytes
from dcvae_fast.run_folder import GRIDS, METRICS_FILE, read_metrics
from dcvae_pipelines.atomic import atomic_write, replacing

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"


class Log:
    """Accumulates metrics on the device; `write` writes their means over iterations and ranks.

    Only the first rank writes.
    """

    def __init__(self, folder: Path, images: int, total: int, ranks: Ranks = SINGLE):
        """Continue the log of a run after `images` of `total` images. Later records are dropped."""
        self.folder, self.total, self._ranks = folder, total, ranks
        if ranks.is_first:
            from torch.utils.tensorboard import SummaryWriter

            _drop_after(folder, images)
            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=images + 1)
        self._restart(images)

    def _restart(self, images: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._images, self._time, self._waited = images, time.perf_counter(), 0.0

    def add(self, metrics: dict[str, Tensor], waited: float = 0.0) -> None:
        """Add the scalars of one iteration without waiting for the device, and the seconds it waited for its images."""
        self._waited += waited
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def write(self, images: int) -> None:
        """Write means since the last call, after `images` images, and log a progress line.

        Raises:
            DivergedError: a mean is not finite.
        """
        names = sorted(self._sums)
        if not names:
            return
        sums = torch.stack([self._sums[name].float() for name in names]).cpu()  # waits for the device
        self._ranks.all_reduce_mean_([sums])
        means = {name: value / self._counts[name] for name, value in zip(names, sums.tolist(), strict=True)}
        with self._ranks.raise_on_all_ranks():
            for name, value in means.items():
                if not math.isfinite(value):
                    raise DivergedError(
                        f"{self.folder}: {name} became {value} between {self._images:,} and {images:,} images."
                    )
            if self._ranks.is_first:
                self._record(images, means)
        self._restart(images)

    def _record(self, images: int, means: dict[str, float]) -> None:
        seconds = time.perf_counter() - self._time
        rate, waiting = (images - self._images) / seconds, self._waited / seconds
        self._append(images, {"images_per_second": rate, "waiting_for_data": waiting, **means})
        logger.info(_progress_line(images, self.total, rate, waiting, means))

    def _append(self, images: int, record: dict[str, float]) -> None:
        with open(self.folder / METRICS_FILE, "a") as file:
            file.write(json.dumps({"images": images, **record}) + "\n")
        for name, value in record.items():
            self._tensorboard.add_scalar(name, value, images)

    def held_out(self, images: int, metrics: dict[str, float]) -> None:
        """Write held-out metrics as `held_out/NAME` in a separate record, and log them."""
        self._append(images, {f"held_out/{name}": value for name, value in metrics.items()})
        names = {"pixel_mse": "pixel error", "probe_accuracy": "probe accuracy"}
        logger.info("held out: " + ", ".join(f"{names.get(name, name)} {value:.4g}" for name, value in metrics.items()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from images_per_second and waiting_for_data."""
        for value in list(self._sums.values())[-1:]:
            value.cpu()  # waits for the device, so that training is not still running in the pause
        start = time.perf_counter()
        try:
            yield
        finally:
            self._time += time.perf_counter() - start

    def grid(self, name: str, images: int, tiles: Tensor, columns: int) -> Path:
        """Write images [N, C, H, W] in [-1, 1] to RUN/grids/NAME-IMAGES.png and TensorBoard, and return the file."""
        grid = make_grid(tiles, columns)
        path = self.folder / GRIDS / f"{name}-{images:012d}.png"
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, png_bytes(grid))
        self._tensorboard.add_image(name, grid, images)
        return path

    def growth(self, samples: Tensor) -> Path:
        """Write samples [N, C, R, R] of the current resolution to RUN/grids/growth.png, and return the file. The image
        has one row per resolution, scaled to the size of the largest."""
        from PIL import Image

        rows = self.folder / GRIDS / "growth"
        rows.mkdir(parents=True, exist_ok=True)
        atomic_write(rows / f"{samples.shape[-1]:04d}.png", png_bytes(torch.cat(list(to_bytes(samples).cpu()), dim=2)))
        images = [Image.open(path) for path in sorted(rows.glob("*.png"))]
        height = max(64, max(image.height for image in images))
        width = len(samples) * height
        sheet = Image.new("RGB", (width, len(images) * height))
        for number, image in enumerate(images):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (0, number * height))
        path = self.folder / GRIDS / "growth.png"
        with replacing(path) as file:
            sheet.save(file, format="PNG")
        return path

    def close(self) -> None:
        if self._ranks.is_first:
            self._tensorboard.close()


def _progress_line(images: int, total: int, rate: float, waiting: float, means: dict[str, float]) -> str:
    remaining = max(0, total - images) / rate
    parts = [f"{images:,} / {total:,} images", f"{rate:,.0f} images/s", f"{_duration(remaining)} left"]
    parts.append(f"waiting for data {waiting:.0%}" if waiting >= 0.05 else "")
    parts.append(f"pixel error {means['pixel_mse']:.4f}" if "pixel_mse" in means else "")
    for name, value in means.items():
        if name.startswith("loss/"):
            parts.append(f"{name.removeprefix('loss/')} {value:.3f}")
        elif name.startswith("contrast/top1_"):
            parts.append(f"top-1 {name.removeprefix('contrast/top1_')} {value:.0%}")
    return "  ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _drop_after(folder: Path, images: int) -> None:
    """Drop damaged records from metrics.jsonl, and records that a resumed run writes again."""
    if not (path := folder / METRICS_FILE).is_file():
        return
    records = [record for record in read_metrics(folder) if record["images"] <= images]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if content != path.read_bytes():
        atomic_write(path, content)
