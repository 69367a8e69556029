"""Where the time of iterations goes: a trace of a few of them, and a table of what took longest."""

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
    """Looks on over two steps of the autoencoder, once what iterations usually do is compiled and recorded as a graph.

    Rarer kinds of them, and growth, may fall into that time.
    """

    def __init__(self, folder: Path, config: Config, device: torch.device):
        """
        Args:
            folder: the run's; `profile` in it gets trace.json, for Perfetto or chrome://tracing, and top20.txt.
        """
        self._folder, self._device = folder / FOLDER, device
        period = config.train.n_critic if config.loss.has_gan else 1
        self._wait, self._iterations = (WARM_UPS + 2) * period, 2 * period
        self._seen, self._images, self._began = 0, 0, 0.0
        self._profile: profile | None = None

    def before(self) -> None:
        """An iteration begins."""
        if self._seen == self._wait:
            on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.start()
            self._began = self._now()

    def after(self, images: int) -> None:
        """An iteration on so many images has ended."""
        self._seen += 1
        if self._profile is not None:
            self._images += images
            if self._seen == self._wait + self._iterations:
                self._write(self._profile, self._now() - self._began)
                self._profile = None

    def close(self) -> None:
        """Training ends."""
        if self._profile is not None:
            self._profile.stop()
        if self._seen < self._wait + self._iterations:
            logger.info(f"Nothing was profiled: that takes {self._wait + self._iterations} iterations.")

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _write(self, found: profile, seconds: float) -> None:
        found.stop()
        self._folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(self._folder / TRACE_FILE))
        on_gpu = self._device.type == "cuda"
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        each = f"{self._iterations} iterations, {self._images:,} images, {seconds:.3f} s while being profiled"
        if on_gpu:
            each += f"; the GPU computed for {busy_seconds(found) / seconds:.0%} of it"
        atomic_write(self._folder / TABLE_FILE, f"{each}\n{table}")
        logger.info(
            f"{each}\n{table}\nThe trace is in {self._folder / TRACE_FILE}, this table in {TABLE_FILE} beside it."
        )


def busy_seconds(found: profile) -> float:
    """How long at least one kernel, copy or fill was running on a GPU."""
    device = torch.autograd.DeviceType.CUDA
    events = [e for e in found.events() or [] if e.device_type == device and not e.is_user_annotation]
    busy, until = 0.0, 0.0
    for begin, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6
