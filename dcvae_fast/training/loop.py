"""The training loop: data → step → logs, grids, checkpoints. Calling `train` again resumes the run."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dcvae_fast.config import Config, to_dict
from dcvae_fast.distributed import SINGLE, Ranks, pick_device
from dcvae_fast.errors import DivergedError, RankError
from dcvae_fast.progress import progress_bar
from dcvae_fast.run_folder import load_checkpoint, locked, prepare_run, quarantine_newer, save_checkpoint
from dcvae_fast.training.data import open_data, open_source, training_images
from dcvae_fast.training.log import Log
from dcvae_fast.training.profile import Profiler
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.signals import stop_signals
from dcvae_fast.training.snapshots import Snapshots, measure_held_out, open_snapshots, write_grids
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch, DataError, EncodedSet, ImageSet, Source

logger = logging.getLogger(__name__)

# Status of a rank before each iteration. All ranks act on the maximum.
GO, STOP, FAILED = range(3)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a call of `train`.

    Attributes:
        images: images shown so far, over all calls
        trained: whether this call trained at all
        signal: the signal that stopped training, if any
    """

    images: int
    trained: bool
    signal: int | None = None


@dataclass
class Run:
    """A run in progress on one rank.

    Attributes:
        config: all settings
        folder: run folder
        images: training set
        source: this rank's share of the training batches
        step: the networks and the training iteration
        snapshots: held-out data for grids and metrics; None on other ranks than the first
    """

    config: Config
    folder: Path
    images: ImageSet | EncodedSet
    source: Source
    step: TrainStep
    snapshots: Snapshots | None


def train(config: Config, folder: Path, ranks: Ranks = SINGLE, profiled: bool = False) -> Outcome:
    """Train in the run folder until `train.images` images have been shown, or until SIGINT or SIGTERM.

    Training resumes from the newest intact checkpoint, written by any number of ranks. On a CPU, with the same numbers
    of threads and ranks, the weights are bitwise equal to those of an uninterrupted run. Only the first rank uses the
    folder. Messages are logged at INFO; `console.configure_logging` prints them.

    Args:
        config: all settings.
        folder: run folder.
        ranks: the processes that train together.
        profiled: whether to profile a few iterations of the first rank and write the results to RUN/profile.

    Raises:
        UserError: a setting, the data or the folder is unusable, or training diverged; the message says which.
        DataError: the data set is missing or damaged.
        RankError: another rank raised one of these.
    """
    run = _open(config, folder, ranks)
    step, total = run.step, config.train.images
    with ExitStack() as stack:
        with ranks.raise_on_all_ranks():
            if ranks.is_first:
                stack.enter_context(locked(folder))
        received = stack.enter_context(stop_signals())
        _resume(run)
        start = step.images
        if start >= total:
            return Outcome(start, trained=False)
        verb = "Resuming" if start else "Training"
        logger.info(f"{verb} in {folder} on {step.device}, from {start:,} to {total:,} images")
        logger.info(f"Gradients by {step.engine.describe()}; Adam by {step.engine.adam_name}")
        log = stack.enter_context(closing(Log(folder, start, total, ranks)))
        profiler = None
        if profiled and ranks.is_first:
            profiler = stack.enter_context(closing(Profiler(folder, config, step.device)))
        # If stderr is not a terminal, the lines of the log show the progress.
        advance = stack.enter_context(progress_bar("images", total, initial=start, lines=False))
        _iterate(run, log, profiler, received, advance)
    signals = [number for number in ranks.all_gather_object(received[0] if received else None) if number]
    return Outcome(step.images, trained=True, signal=signals[0] if signals else None)


def _open(config: Config, folder: Path, ranks: Ranks) -> Run:
    """Open the data, build the networks, and create or check the run folder."""
    with ranks.raise_on_all_ranks():
        if config.data.download and ranks.is_first:  # download before the other ranks open the files
            open_data(config, "train")
    with ranks.raise_on_all_ranks():
        device = pick_device(config.train.device, ranks)
        images = training_images(config)
        snapshots = open_snapshots(config, images, device) if ranks.is_first else None
        if isinstance(images, ImageSet):  # move once, for all sources made from it
            images = replace(images, images=images.images.to(device))
        step, source = TrainStep(config, device, ranks), open_source(config, images, device, ranks)
        if ranks.is_first:
            prepare_run(folder, config)  # last, so that unusable settings create no folder
    ranks.check_same(
        {f"the number of images in {images.name}": len(images), "DeepSpeed's configuration": step.engine.settings}
    )
    return Run(config, folder, images, source, step, snapshots)


def _resume(run: Run) -> None:
    """Load the newest intact checkpoint, if any. The first rank reads it and broadcasts it."""
    ranks, state = run.step.ranks, None
    with ranks.raise_on_all_ranks():
        if ranks.is_first and (state := load_checkpoint(run.folder)):
            quarantine_newer(run.folder, state["step"]["images"])
    state = ranks.broadcast(state)
    with ranks.raise_on_all_ranks():
        if state is not None:
            run.step.load_state_dict(state["step"])
            positions = state["sources"]
            run.source.load_state_dict(positions[ranks.rank if len(positions) == ranks.world_size else 0])
            run.source.set_resolution(run.step.resolution, run.step.schedule.batch)


def _iterate(
    run: Run, log: Log, profiler: Profiler | None, received: list[int], advance: Callable[[int], object]
) -> None:
    """Train until all images are shown, a signal is received, or a rank cannot read its images; then save a checkpoint.

    Args:
        received: signals received so far; a signal handler appends to it.
        advance: called with the number of images of each iteration.
    """
    step, source, ranks = run.step, run.source, run.step.ranks
    total, log_config = run.config.train.images, run.config.log
    batches, saved, status, data_error = iter(source), step.images, GO, None
    while step.images < total:
        if step.schedule.resolution != step.resolution:
            if step.images > saved:  # to resume from if growing fails
                _save(run, source.state_dict())
                saved = step.images
            grow(run)
        if profiler is not None:
            profiler.before()

        # Read the next batch. If an image is damaged, all ranks save a checkpoint and stop.
        before, position, start = step.images, source.state_dict(), time.perf_counter()
        try:
            batch = next(batches)
        except DataError as error:
            data_error = error
        waited = time.perf_counter() - start
        status = ranks.all_reduce_max(FAILED if data_error else STOP if received else GO)
        if status != GO:
            break

        log.add(step(batch), waited)
        advance(min(step.images, total) - before)
        if profiler is not None:
            profiler.after(step.images - before)

        def is_due(interval: int, before: int = before) -> bool:
            return step.images >= total or step.images // interval > before // interval

        if is_due(log_config.every):
            log.write(step.images)
        if is_due(log_config.metrics_every or log_config.grids_every):
            # Before the checkpoint is saved, so that a run killed in between measures again when it resumes.
            with log.paused(), ranks.raise_on_all_ranks():
                if run.snapshots is not None and run.snapshots.held_out is not None:
                    measure_held_out(step, log, run.snapshots.held_out)
        if is_due(log_config.checkpoint_every):
            _save(run, source.state_dict())
            saved = step.images
        if is_due(log_config.grids_every):
            with log.paused(), ranks.raise_on_all_ranks():
                if run.snapshots is not None:
                    write_grids(step, log, run.snapshots.images)
    if step.images > saved:
        _save(run, position)
    if data_error is not None:
        raise data_error
    if status == FAILED:
        raise RankError("another rank could not read its images.")


def grow(run: Run) -> None:
    """Continue at the next resolution, and fill the queue from a second source, which shuffles with its own seed."""
    step, schedule = run.step, run.step.schedule
    resolution, batch_size = schedule.resolution, schedule.batch
    logger.info(f"Growing to {resolution}×{resolution}, {batch_size * step.ranks.world_size} images per iteration")
    step.grow(schedule)
    run.source.set_resolution(resolution, batch_size)
    seed = derive_seed(run.config.train.seed, "refill", resolution)
    refill_source = open_source(run.config, run.images, step.device, step.ranks, seed)
    refill_source.set_resolution(resolution, batch_size)

    def batches() -> Iterator[Batch]:
        iterator = iter(refill_source)
        while True:
            with step.ranks.raise_on_all_ranks():
                batch = next(iterator)
            yield batch

    step.refill(batches())


def _save(run: Run, position: dict[str, Any]) -> None:
    """Save a checkpoint.

    Args:
        position: state of this rank's source.

    Raises:
        DivergedError: a weight is not finite. The check waits for the device.
    """
    step, ranks = run.step, run.step.ranks
    weights = [*step.networks.parameters(), *(x for x in step.networks.buffers() if x.is_floating_point())]
    norms = torch._foreach_norm(weights)
    positions = ranks.all_gather_object(position)
    state = {"config": to_dict(run.config), "step": step.state_dict(), "sources": positions}
    with ranks.raise_on_all_ranks():
        if not torch.stack(norms).isfinite().all():
            raise DivergedError(f"{run.folder}: a weight is not finite after {step.images:,} images.")
        if ranks.is_first:
            save_checkpoint(run.folder, step.images, state, run.config.log.keep)
