"""A whole run: data → step → logs, grids, checkpoints. To resume, call it again."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcvae_fast.config import Config, ModelConfig, to_dict
from dcvae_fast.errors import ConfigError, DivergedError, RankError
from dcvae_fast.evaluation.latent import interpolate
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.training.checkpoint import load_checkpoint, locked, prepare_run, save_checkpoint, set_newer_aside
from dcvae_fast.training.compiled import uncompiled
from dcvae_fast.training.held_out import HeldOut, held_out_images
from dcvae_fast.training.log import Log, say
from dcvae_fast.training.profile import Profiler
from dcvae_fast.training.ranks import ALONE, Ranks
from dcvae_fast.training.schedule import point
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import Batch, DataError, EncodedSet, ImageSet, Source, decode_images, load_dataset, make_source
from dcvae_pipelines.pixels import resize

# Held-out images in the grids.
GRID_IMAGES = 32

# Within which a repeated signal is the same one.
SAME_SIGNAL_SECONDS = 5

# What a rank says before an iteration: the others do as the worst off.
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


def train(config: Config, folder: Path, ranks: Ranks = ALONE, profiled: bool = False) -> Outcome:
    """Train in the run folder until `train.images` images were shown, or until SIGINT or SIGTERM.

    Continues from the newest intact checkpoint, whatever the number of ranks that wrote it. On a CPU, with the same
    number of threads and ranks, the weights are bitwise those of an uninterrupted run. Of several ranks, only the first
    uses the folder.

    Args:
        profiled: whether a few iterations of the first rank are profiled, into RUN/profile.

    Raises:
        UserError: a setting, the data or the folder is not usable, or training diverged; the message says which.
        DataError: the data set is missing or damaged.
        RankError: another rank raises one of these.
    """
    with ranks.together():
        if config.data.download and ranks.first:  # before the others look for it
            open_data(config, "train")
    with ranks.together():
        device = pick_device(config.train.device, ranks)
        images, test_set, held_out = training_images(config), None, None
        if ranks.first:
            test_set = first_images(config, "test", max(GRID_IMAGES, held_out_images(config)))
            if held_out_images(config):
                held_out = HeldOut(config, images, test_set, device)
        if isinstance(images, ImageSet):  # to the device once, for every source made of it
            images = replace(images, images=images.images.to(device))
        step, source = TrainStep(config, device, ranks), open_source(config, images, device, ranks)
        if ranks.first:
            prepare_run(folder, config)  # only now: a folder is bound to settings that work
    ranks.check_same({f"the number of images in {images.name}": len(images), "DeepSpeed's part": step.engine.settings})
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(locked(folder))
        received = stack.enter_context(stop_signals())
        state = _load(folder, ranks)
        with ranks.together():
            if state is not None:
                step.load_state_dict(state["step"])
                positions = state["sources"]
                source.load_state_dict(positions[ranks.rank if len(positions) == ranks.count else 0])
                source.set_resolution(step.resolution, step.point.batch)
        start, total, intervals = step.images, config.train.images, config.log
        if start >= total:
            return Outcome(start, trained=False)
        say(f"{'Continuing' if start else 'Training'} in {folder} on {device}, from {start:,} to {total:,} images")
        say(f"Gradients by {step.engine.describe()}; Adam by {step.engine.adam}")

        batches, saved, status, problem = iter(source), start, GO, None
        log = stack.enter_context(closing(Log(folder, start, total, ranks)))
        profiler = None
        if profiled and ranks.first:
            profiler = stack.enter_context(closing(Profiler(folder, config, device)))
        while step.images < total:
            if step.point.resolution != step.resolution:
                if step.images > saved:  # to go back to, should anything fail on the way
                    _save(config, folder, step, source.state_dict())
                    saved = step.images
                grow(config, images, step, source)
            if profiler is not None:
                profiler.before()
            before, position, asked = step.images, source.state_dict(), time.perf_counter()
            try:
                batch = next(batches)
            except DataError as error:  # a damaged image: what was learned so far is not to be lost
                problem = error
            waited = time.perf_counter() - asked
            status = ranks.worst(FAILED if problem else STOP if received else GO)
            if status != GO:
                break
            log.add(step(batch), waited)
            if profiler is not None:
                profiler.after(step.images - before)
            finished = step.images >= total
            if finished or _crossed(before, step.images, intervals.every):
                log.write(step.images)
            if finished or _crossed(before, step.images, intervals.metrics_every or intervals.grids_every):
                # Before the checkpoint, after which a run that is killed would not come back to it.
                with log.paused(), ranks.together():
                    if held_out is not None:
                        measure_held_out(log, step, held_out)
            if finished or _crossed(before, step.images, intervals.checkpoint_every):
                _save(config, folder, step, source.state_dict())
                saved = step.images
            if finished or _crossed(before, step.images, intervals.grids_every):
                with log.paused(), ranks.together():
                    if test_set is not None:
                        write_grids(log, step, test_set.images[:GRID_IMAGES])
        if step.images > saved:
            _save(config, folder, step, position)
    if problem is not None:
        raise problem
    if status == FAILED:
        raise RankError("another rank could not read its images.")
    signals = [number for number in ranks.all(received[0] if received else None) if number]
    return Outcome(step.images, trained=True, signal=signals[0] if signals else None)


def grow(config: Config, images: ImageSet | EncodedSet, step: TrainStep, source: Source) -> None:
    """Go on at the next resolution: source, networks, and a queue of keys of images drawn in an order of their own."""
    to = step.point
    count = to.batch * step.ranks.count
    say(f"Growing to {to.resolution}×{to.resolution}, {count} images an iteration")
    step.grow(to)
    source.set_resolution(to.resolution, to.batch)
    seed = derive_seed(config.train.seed, "refill", to.resolution)
    fresh = open_source(config, images, step.device, step.ranks, seed)
    fresh.set_resolution(to.resolution, to.batch)

    def batches() -> Iterator[Batch]:
        drawn = iter(fresh)
        while True:
            with step.ranks.together():
                batch = next(drawn)
            yield batch

    step.refill(batches())


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` … → a device that is there; each of several ranks has its own GPU.

    Raises:
        ConfigError: it is not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.count > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f"the device is {name!r}, but of {ranks.count} ranks each takes its own: --train.device cuda."
            )
        # Slurm may show each process its own GPU only.
        own = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        if ranks.local_count > torch.cuda.device_count() and not own:
            raise ConfigError(
                f"{ranks.local_count} ranks on this machine, but it has {torch.cuda.device_count()} GPUs."
            )
        name = f"cuda:{0 if own else ranks.local}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither")
        torch.empty(0, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)  # or libraries would take the first
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device is {name!r}, which cannot be used here; auto and cpu always can.") from error
    return device


def open_data(config: Config, split: str) -> ImageSet | EncodedSet:
    """A split of the configured data set.

    Raises:
        DataError: it is missing or damaged.
        ConfigError: its images do not fit the networks.
    """
    data, model = config.data, config.model
    images = load_dataset(data.name, data.root, split, data.download)
    if isinstance(images, ImageSet):
        channels, size = images.images.shape[1], images.images.shape[2]
        if channels != model.image_channels:
            raise ConfigError(f"model.image_channels is {model.image_channels}, but {data.name} has {channels}.")
        if size != model.resolution:
            raise ConfigError(f"{data.name} has images of {size}×{size}, but the networks are for {model.resolution}.")
    return images


def first_images(config: Config, split: str, count: int, resolution: int | None = None) -> ImageSet:
    """The first `count` images of a split, or fewer if there are fewer, decoded as the networks see them, in the end if
    no other resolution is given.

    Raises:
        DataError: the split is missing or damaged, or one of the images and `data.on_corrupt` is stop.
        ConfigError: its images do not fit the networks.
    """
    data, model = config.data, config.model
    return decode_images(
        open_data(config, split),
        count,
        resolution=resolution or model.resolution,
        channels=model.image_channels,
        on_corrupt=data.on_corrupt,
    )


def training_images(config: Config) -> ImageSet | EncodedSet:
    """The training split; decoded, where `data.resident` says so.

    Raises:
        DataError: the split is missing or damaged, or is to be decoded, and one of its images cannot be.
        ConfigError: its images do not fit the networks.
    """
    images, model = open_data(config, "train"), config.model
    if not config.data.resident or isinstance(images, ImageSet):
        return images
    say(f"Decoding {len(images):,} images once")
    return decode_images(images, len(images), resolution=model.resolution, channels=model.image_channels)


def open_source(
    config: Config,
    images: ImageSet | EncodedSet,
    device: torch.device,
    ranks: Ranks = ALONE,
    seed: int | None = None,
) -> Source:
    """Batches for training, this rank's share of them, as they are at the beginning; `seed` is of their order, else the
    configuration's.

    Raises:
        DataError: there are fewer images than ranks, or than a setting needs.
    """
    data, model, train, start = config.data, config.model, config.train, point(config, 0, ranks.count)
    if ranks.count > len(images):
        raise DataError(f"{images.name} has fewer images, {len(images)}, than there are ranks, {ranks.count}.")
    source = make_source(
        images,
        resolution=model.resolution,
        channels=model.image_channels,
        batch=start.batch,
        seed=train.seed if seed is None else seed,
        device=device,
        rank=ranks.rank,
        ranks=ranks.count,
        mirror=data.mirror,
        drop_last=data.drop_last,
        threads=data.threads or max(1, len(os.sched_getaffinity(0)) // ranks.local_count),
        prefetch=data.prefetch,
        on_corrupt=data.on_corrupt,
    )
    source.set_resolution(start.resolution)
    return source


def model_at(config: Config, step: TrainStep) -> ModelConfig:
    """The networks' configuration at the point to which they have grown."""
    if not config.model.grows:
        return config.model
    return replace(config.model, resolution=step.resolution, alpha=step.alpha)


def current_model(config: Config, step: TrainStep) -> DCVAE:
    """What the run has learned so far, in evaluation mode: its encoder, and the average of its decoder."""
    with torch.device("meta"):  # its own networks are replaced, and need no memory
        model = DCVAE(model_at(config, step))
    model.encoder, model.decoder = step.networks.encoder, step.networks.decoder_average
    return model.eval()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode; afterwards every submodule is in the mode it was in."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


def write_grids(log: Log, step: TrainStep, held_out: Tensor) -> None:
    """Reconstructions and interpolations of the held-out images uint8 [N, C, H, W], and samples of fixed latents."""
    config, device = step.config, step.device
    generator = torch.Generator().manual_seed(derive_seed(config.train.seed, "grids"))
    chosen = torch.arange(GRID_IMAGES) % len(held_out)  # over again where there are few
    images = resize(held_out, step.resolution)[chosen].to(device).float() / 127.5 - 1
    with evaluating(step.networks), uncompiled():
        model = current_model(config, step)
        reconstructions = model.reconstruct(images, sample_posterior=False)
        pairs = torch.stack([images, reconstructions], dim=1)  # original above reconstruction, 8 a row
        rows = pairs.unflatten(0, (-1, 8)).transpose(1, 2).flatten(0, 2)
        log.grid("reconstructions", step.images, rows, columns=8)
        samples = model.sample(64, generator=generator)
        log.grid("samples", step.images, samples, columns=8)
        if config.model.grows:
            log.growth(samples[:8])
        log.grid("interpolations", step.images, interpolate(model, images[:8], images[1:9]).flatten(0, 1), columns=10)


def measure_held_out(log: Log, step: TrainStep, held_out: HeldOut) -> None:
    """Log metrics of held-out images, in float32 and by the decoder's average."""
    with evaluating(step.networks), uncompiled():
        log.held_out(step.images, held_out.measure(current_model(step.config, step)))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM are noted in the list instead of ending the process; a second one ends it, unless it
    follows at once: launchers and schedulers may both pass the same one on."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    first: dict[int, float] = {}

    def note(number: int, frame: object) -> None:
        if number in first:
            if time.monotonic() - first[number] > SAME_SIGNAL_SECONDS:
                signal.signal(number, previous[number])
                signal.raise_signal(number)
            return
        first[number] = time.monotonic()
        received.append(number)
        say(f"\n{signal.Signals(number).name}: saving a checkpoint, then stopping")

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _crossed(before: int, now: int, interval: int) -> bool:
    return now // interval > before // interval


def _load(folder: Path, ranks: Ranks) -> dict[str, Any] | None:
    """The newest intact checkpoint, if there is one, read by the first rank."""
    state = None
    with ranks.together():
        if ranks.first and (state := load_checkpoint(folder)):
            set_newer_aside(folder, state["step"]["images"])
    return ranks.from_first(state)


def _save(config: Config, folder: Path, step: TrainStep, position: dict[str, Any]) -> None:
    ranks = step.ranks
    values = [*step.networks.parameters(), *(x for x in step.networks.buffers() if x.is_floating_point())]
    norms = torch._foreach_norm(values)
    state = {"config": to_dict(config), "step": step.state_dict(), "sources": ranks.all(position)}
    with ranks.together():
        if not torch.stack(norms).isfinite().all():
            raise DivergedError(f"{folder}: a weight is no longer a finite number after {step.images:,} images.")
        if ranks.first:
            save_checkpoint(folder, step.images, state, config.log.keep)
