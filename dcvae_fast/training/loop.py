"""A whole run: data → step → logs, grids, checkpoints. To resume, call it again."""

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

# What each rank reports before an iteration; all do what the highest asks for.
GO, STOP, FAILED = range(3)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        images: images shown so far, over all calls
        trained: whether this call showed any
        signal: the signal that stopped it, if one did
    """

    images: int
    trained: bool
    signal: int | None = None


@dataclass
class Run:
    """A run in progress on one rank.

    Attributes:
        config, folder: its settings and files
        images: what it is trained on
        source: batches of them, this rank's share
        step: an iteration, with the networks
        snapshots: grids and held-out metrics, on the first rank
    """

    config: Config
    folder: Path
    images: ImageSet | EncodedSet
    source: Source
    step: TrainStep
    snapshots: Snapshots | None


def train(config: Config, folder: Path, ranks: Ranks = SINGLE, profiled: bool = False) -> Outcome:
    """Train in the run folder until `train.images` images were shown, or until SIGINT or SIGTERM.

    Continues from the newest intact checkpoint, whatever the number of ranks that wrote it. On a CPU, with the same
    number of threads and ranks, the weights are bitwise those of an uninterrupted run. With several ranks, only the
    first uses the folder. Messages are logged at INFO; `console.configure_logging` prints them.

    Args:
        config: all settings.
        folder: the run folder.
        ranks: the processes that train together.
        profiled: whether a few iterations of the first rank are profiled, into RUN/profile.

    Raises:
        UserError: a setting, the data or the folder is not usable, or training diverged; the message says which.
        DataError: the data set is missing or damaged.
        RankError: another rank raises one of these.
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
        verb = "Continuing" if start else "Training"
        logger.info(f"{verb} in {folder} on {step.device}, from {start:,} to {total:,} images")
        logger.info(f"Gradients by {step.engine.describe()}; Adam by {step.engine.adam_name}")
        log = stack.enter_context(closing(Log(folder, start, total, ranks)))
        profiler = None
        if profiled and ranks.is_first:
            profiler = stack.enter_context(closing(Profiler(folder, config, step.device)))
        # Where stderr is not a terminal, the log's lines show the progress.
        advance = stack.enter_context(progress_bar("images", total, initial=start, lines=False))
        _iterate(run, log, profiler, received, advance)
    signals = [number for number in ranks.all_gather_object(received[0] if received else None) if number]
    return Outcome(step.images, trained=True, signal=signals[0] if signals else None)


def _open(config: Config, folder: Path, ranks: Ranks) -> Run:
    """Open the data, build the networks, and make or check the run folder."""
    with ranks.raise_on_all_ranks():
        if config.data.download and ranks.is_first:  # before the other ranks look for the files
            open_data(config, "train")
    with ranks.raise_on_all_ranks():
        device = pick_device(config.train.device, ranks)
        images = training_images(config)
        snapshots = open_snapshots(config, images, device) if ranks.is_first else None
        if isinstance(images, ImageSet):  # once, for all sources that are made of it
            images = replace(images, images=images.images.to(device))
        step, source = TrainStep(config, device, ranks), open_source(config, images, device, ranks)
        if ranks.is_first:
            prepare_run(folder, config)  # last, so that only settings that work make a folder
    ranks.check_same({f"the number of images in {images.name}": len(images), "DeepSpeed's part": step.engine.settings})
    return Run(config, folder, images, source, step, snapshots)


def _resume(run: Run) -> None:
    """Load the newest intact checkpoint, if there is one; the first rank reads it."""
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
    """Train until all images are shown, a signal is received, or a rank fails; leave a checkpoint in any case.

    Args:
        received: signals received so far, a list that grows.
        advance: called with the number of images of each iteration.
    """
    step, source, ranks = run.step, run.source, run.step.ranks
    total, every = run.config.train.images, run.config.log
    batches, saved, status, problem = iter(source), step.images, GO, None
    while step.images < total:
        if step.schedule.resolution != step.resolution:
            if step.images > saved:  # a checkpoint to resume from if growing fails
                _save(run, source.state_dict())
                saved = step.images
            grow(run)
        if profiler is not None:
            profiler.before()

        # The next batch. A damaged image must not cost what was learned so far: all ranks then save and stop.
        before, position, asked = step.images, source.state_dict(), time.perf_counter()
        try:
            batch = next(batches)
        except DataError as error:
            problem = error
        waited = time.perf_counter() - asked
        status = ranks.all_reduce_max(FAILED if problem else STOP if received else GO)
        if status != GO:
            break

        log.add(step(batch), waited)
        advance(min(step.images, total) - before)
        if profiler is not None:
            profiler.after(step.images - before)

        def is_due(interval: int, before: int = before) -> bool:
            return step.images >= total or step.images // interval > before // interval

        if is_due(every.every):
            log.write(step.images)
        if is_due(every.metrics_every or every.grids_every):
            # Before the checkpoint is saved: a run that is killed in between measures when it resumes.
            with log.paused(), ranks.raise_on_all_ranks():
                if run.snapshots is not None and run.snapshots.held_out is not None:
                    measure_held_out(step, log, run.snapshots.held_out)
        if is_due(every.checkpoint_every):
            _save(run, source.state_dict())
            saved = step.images
        if is_due(every.grids_every):
            with log.paused(), ranks.raise_on_all_ranks():
                if run.snapshots is not None:
                    write_grids(step, log, run.snapshots.images)
    if step.images > saved:
        _save(run, position)
    if problem is not None:
        raise problem
    if status == FAILED:
        raise RankError("another rank could not read its images.")


def grow(run: Run) -> None:
    """Continue at the next resolution: source, networks, and a queue of keys of images in an order of their own."""
    step, to = run.step, run.step.schedule
    logger.info(f"Growing to {to.resolution}×{to.resolution}, {to.batch * step.ranks.world_size} images an iteration")
    step.grow(to)
    run.source.set_resolution(to.resolution, to.batch)
    seed = derive_seed(run.config.train.seed, "refill", to.resolution)
    fresh = open_source(run.config, run.images, step.device, step.ranks, seed)
    fresh.set_resolution(to.resolution, to.batch)

    def batches() -> Iterator[Batch]:
        drawn = iter(fresh)
        while True:
            with step.ranks.raise_on_all_ranks():
                batch = next(drawn)
            yield batch

    step.refill(batches())


def _save(run: Run, position: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        position: of this rank's source.

    Raises:
        DivergedError: a weight is not finite. The check waits for the device.
    """
    step, ranks = run.step, run.step.ranks
    values = [*step.networks.parameters(), *(x for x in step.networks.buffers() if x.is_floating_point())]
    norms = torch._foreach_norm(values)
    positions = ranks.all_gather_object(position)
    state = {"config": to_dict(run.config), "step": step.state_dict(), "sources": positions}
    with ranks.raise_on_all_ranks():
        if not torch.stack(norms).isfinite().all():
            raise DivergedError(f"{run.folder}: a weight is not finite after {step.images:,} images.")
        if ranks.is_first:
            save_checkpoint(run.folder, step.images, state, run.config.log.keep)
