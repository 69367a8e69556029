"""metrics.jsonl, TensorBoard, the progress line, image grids: the only place of training that waits for the device."""

import io
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dcvae_fast.errors import DivergedError
from dcvae_fast.training.checkpoint import write_aside
from dcvae_fast.training.ranks import ALONE, Ranks

METRICS_FILE, TENSORBOARD, GRIDS = "metrics.jsonl", "tensorboard", "grids"


class Log:
    """Collects metrics on the device, and writes their means over iterations and ranks when told to."""

    def __init__(self, folder: Path, images: int, total: int, ranks: Ranks = ALONE):
        """Continue the log of a run after `images` of `total` images; what was logged beyond them is dropped.

        Only the first of several ranks writes."""
        self.folder, self.total, self._ranks = folder, total, ranks
        if ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            _drop_after(folder / METRICS_FILE, images)
            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=images + 1)
        self._restart(images)

    def _restart(self, images: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._images, self._time, self._waited = images, time.perf_counter(), 0.0

    def add(self, metrics: dict[str, Tensor], waited: float = 0.0) -> None:
        """Add the scalars of one iteration, without waiting for them, and the seconds it had to wait for its images."""
        self._waited += waited
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def write(self, images: int) -> None:
        """Write the means since the last call, after `images` images, and a line to the terminal.

        Raises:
            DivergedError: a mean is not a finite number.
        """
        names = sorted(self._sums)
        if not names:
            return
        sums = torch.stack([self._sums[name].float() for name in names]).cpu()  # waits for the device
        self._ranks.average_([sums])
        means = {name: value / self._counts[name] for name, value in zip(names, sums.tolist(), strict=True)}
        with self._ranks.together():
            if bad := [name for name, value in means.items() if not math.isfinite(value)]:
                raise DivergedError(
                    f"{self.folder}: {bad[0]} became {means[bad[0]]} between {self._images:,} and {images:,} images."
                )
            if self._ranks.first:
                self._record(images, means)
        self._restart(images)

    def _record(self, images: int, means: dict[str, float]) -> None:
        seconds = time.perf_counter() - self._time
        rate, waiting = (images - self._images) / seconds, self._waited / seconds
        self._append(images, {"images_per_second": rate, "waiting_for_data": waiting, **means})
        say(_progress_line(images, self.total, rate, waiting, means))

    def _append(self, images: int, record: dict[str, float]) -> None:
        with open(self.folder / METRICS_FILE, "a") as file:
            file.write(json.dumps({"images": images, **record}) + "\n")
        for name, value in record.items():
            self._tensorboard.add_scalar(name, value, images)

    def held_out(self, images: int, measured: dict[str, float]) -> None:
        """Write metrics of held-out images as `held_out/NAME`, a line of their own, and a line to the terminal."""
        self._append(images, {f"held_out/{name}": value for name, value in measured.items()})
        say("held out: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in measured.items()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count: images a second, and the share of waiting, are those of training alone."""
        for value in list(self._sums.values())[-1:]:
            value.cpu()  # waits for the device, so that no training goes on in the pause
        began = time.perf_counter()
        try:
            yield
        finally:
            self._time += time.perf_counter() - began

    def grid(self, name: str, images: int, tiles: Tensor, columns: int) -> Path:
        """Write images [N, C, H, W] in [-1, 1] as RUN/grids/NAME-IMAGES.png and to TensorBoard; returns the file."""
        sheet = make_grid(tiles, columns)
        path = self.folder / GRIDS / f"{name}-{images:012d}.png"
        path.parent.mkdir(exist_ok=True)
        write_aside(path, png_bytes(sheet))
        self._tensorboard.add_image(name, sheet, images)
        return path

    def growth(self, samples: Tensor) -> Path:
        """Write samples [N, C, R, R] of the present resolution into RUN/grids/growth.png, as a row below those of the
        resolutions before it, all at the size of the largest; returns the file."""
        from PIL import Image

        rows = self.folder / GRIDS / "growth"
        rows.mkdir(parents=True, exist_ok=True)
        write_aside(rows / f"{samples.shape[-1]:04d}.png", png_bytes(torch.cat(list(_to_bytes(samples)), dim=2)))
        images = [Image.open(path) for path in sorted(rows.glob("*.png"))]
        height = max(64, max(image.height for image in images))
        width = len(samples) * height
        sheet = Image.new("RGB", (width, len(images) * height))
        for number, image in enumerate(images):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (0, number * height))
        content = io.BytesIO()
        sheet.save(content, format="PNG")
        path = self.folder / GRIDS / "growth.png"
        write_aside(path, content.getvalue())
        return path

    def close(self) -> None:
        if self._ranks.first:
            self._tensorboard.close()


_remarks: list[str] = []


@contextmanager
def remarked(remark: str | None) -> Iterator[None]:
    """Inside, every line that is said ends in this."""
    _remarks.append(f"  [{remark}]" if remark else "")
    try:
        yield
    finally:
        _remarks.pop()


def say(line: str) -> None:
    """Print a line, on the first of several ranks. Where nobody reads any more (a closed pipe), go on in silence:
    training is not to stop for that."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    try:
        print(line + "".join(_remarks), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open until the end


def make_grid(tiles: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] → a sheet uint8 [3, H', W'], row by row; small ones are enlarged to 64 pixels."""
    from torchvision.utils import make_grid as sheet

    scale = max(1, 64 // tiles.shape[-1])
    pixels = _to_bytes(tiles).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return sheet(pixels, nrow=columns, padding=gap, pad_value=255)


def _to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] → uint8 on the CPU."""
    return images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def png_bytes(sheet: Tensor) -> bytes:
    """uint8 [C, H, W], one channel or three → the bytes of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).squeeze(2).numpy()).save(file, format="PNG")
    return file.getvalue()


def _progress_line(images: int, total: int, rate: float, waiting: float, means: dict[str, float]) -> str:
    left = max(0, total - images) / rate
    parts = [f"{images:,} / {total:,} images", f"{rate:,.0f} images/s", f"{_duration(left)} left"]
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


def _drop_after(path: Path, images: int) -> None:
    """Drop the lines of a run's metrics that a resumed run writes again, and those that are damaged."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _images_of(line) <= images]
    if kept != lines:
        write_aside(path, b"".join(kept))


def _images_of(line: bytes) -> float:
    try:
        return json.loads(line)["images"]
    except (ValueError, KeyError, TypeError):
        return math.inf
