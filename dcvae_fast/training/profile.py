"""Profile a few iterations: a trace, and a table of the most expensive operations."""

import logging
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dcvae_fast.config import Config
from dcvae_fast.training.graphs import WARM_UPS
from dcvae_pipelines.atomic import atomic_write

logger = logging.getLogger(__name__)

FOLDER, TRACE_FILE, TABLE_FILE = "profile", "trace.json", "top20.txt"
ROWS = 20


class Profiler:
    """Profiles two iterations that update the autoencoder, and those in between, after compilation and graph capture.

    Compilation and capture of rarer kinds of iterations, and growth, can fall into the profiled time.
    """

    def __init__(self, folder: Path, config: Config, device: torch.device):
        """
        Args:
            folder: run folder; trace.json (for Perfetto or chrome://tracing) and top20.txt are written to its subfolder
                `profile`.
        """
        self._folder, self._device = folder / FOLDER, device
        period = config.train.n_critic if config.loss.has_gan else 1
        self._wait, self._iterations = (WARM_UPS + 2) * period, 2 * period
        self._seen, self._images, self._start = 0, 0, 0.0
        self._profile: profile | None = None

    def before(self) -> None:
        """Call before each iteration."""
        if self._seen == self._wait:
            on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.start()
            self._start = self._now()

    def after(self, images: int) -> None:
        """Call after each iteration, with its number of images."""
        self._seen += 1
        if self._profile is not None:
            self._images += images
            if self._seen == self._wait + self._iterations:
                self._write(self._profile, self._now() - self._start)
                self._profile = None

    def close(self) -> None:
        """Stop profiling if training ends early."""
        if self._profile is not None:
            self._profile.stop()
        if self._seen < self._wait + self._iterations:
            logger.info(f"Nothing was profiled: profiling needs {self._wait + self._iterations} iterations.")

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _write(self, profiled: profile, seconds: float) -> None:
        profiled.stop()
        self._folder.mkdir(exist_ok=True)
        profiled.export_chrome_trace(str(self._folder / TRACE_FILE))
        on_gpu = self._device.type == "cuda"
        sort_by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=sort_by, row_limit=ROWS, max_name_column_width=60)
        summary = f"{self._iterations} iterations, {self._images:,} images, {seconds:.3f} s while being profiled"
        if on_gpu:
            summary += f"; the GPU was busy for {busy_seconds(profiled) / seconds:.0%} of the time"
        atomic_write(self._folder / TABLE_FILE, f"{summary}\n{table}")
        logger.info(f"{summary}\n{table}\nWrote {TRACE_FILE} and {TABLE_FILE} to {self._folder}.")


def busy_seconds(profiled: profile) -> float:
    """Return the time in seconds during which at least one kernel, copy or fill was running on a GPU."""
    device = torch.autograd.DeviceType.CUDA
    events = [e for e in profiled.events() or [] if e.device_type == device and not e.is_user_annotation]
    busy, last_end = 0.0, 0.0
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    return busy / 1e6
