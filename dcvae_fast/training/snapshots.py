"""Snapshots of a run in progress: image grids, and metrics of held-out images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcvae_fast.config import Config
from dcvae_fast.evaluation.latent import interpolate
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.training.compiled import uncompiled
from dcvae_fast.training.data import first_images, open_data
from dcvae_fast.training.held_out import HeldOut, held_out_images
from dcvae_fast.training.log import Log
from dcvae_fast.training.seeding import derive_seed
from dcvae_fast.training.step import TrainStep
from dcvae_pipelines import EncodedSet, ImageSet
from dcvae_pipelines.pixels import normalize, resize

# Held-out images in the grids.
GRID_IMAGES = 32


class Snapshots(NamedTuple):
    """Held-out data for the snapshots of a run.

    Attributes:
        images: held-out images uint8 [N, C, H, W], for grids
        held_out: measures; None if `log.held_out` is 0
    """

    images: Tensor
    held_out: HeldOut | None


def open_snapshots(config: Config, train_set: ImageSet | EncodedSet, device: torch.device) -> Snapshots:
    """Decode held-out images of a run that trains on `train_set`.

    Raises:
        ConfigError, DataError: see `open_data` and `HeldOut`.
    """
    count = held_out_images(config)
    test_set = first_images(config, open_data(config, "test"), max(GRID_IMAGES, count))
    held_out = HeldOut(config, train_set, test_set, device) if count else None
    return Snapshots(test_set.images[:GRID_IMAGES], held_out)


def measure_held_out(step: TrainStep, log: Log, held_out: HeldOut) -> None:
    """Log metrics of held-out images, in float32 and by the decoder's average."""
    with evaluating(step.networks), uncompiled():
        log.held_out(step.images, held_out.measure(current_model(step)))


def write_grids(step: TrainStep, log: Log, held_out: Tensor) -> None:
    """Log reconstructions and interpolations of held-out images uint8 [N, C, H, W], and samples of fixed latents."""
    config = step.config
    generator = torch.Generator().manual_seed(derive_seed(config.train.seed, "grids"))
    chosen = torch.arange(GRID_IMAGES) % len(held_out)  # repeated if there are few
    images = normalize(resize(held_out, step.resolution)[chosen].to(step.device))
    with evaluating(step.networks), uncompiled():
        model = current_model(step)
        reconstructions = model.reconstruct(images, sample_posterior=False)
        pairs = torch.stack([images, reconstructions], dim=1)  # original above reconstruction, 8 a row
        rows = pairs.unflatten(0, (-1, 8)).transpose(1, 2).flatten(0, 2)
        log.grid("reconstructions", step.images, rows, columns=8)
        samples = model.sample(64, generator=generator)
        log.grid("samples", step.images, samples, columns=8)
        if config.model.grows:
            log.growth(samples[:8])
        between = interpolate(model, images[:8], images[1:9]).flatten(0, 1)
        log.grid("interpolations", step.images, between, columns=10)


def current_model(step: TrainStep) -> DCVAE:
    """Return what the run has learned so far, in evaluation mode: its encoder, and the average of its decoder."""
    config = step.config.model
    if config.grows:
        config = replace(config, resolution=step.resolution, alpha=step.alpha)
    with torch.device("meta"):  # its own networks are replaced, and need no memory
        model = DCVAE(config)
    model.encoder, model.decoder = step.networks.encoder, step.networks.decoder_ema
    return model.eval()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and afterwards every submodule back into the mode it was in."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode
