"""Snapshots of a run in progress: image grids and held-out metrics."""

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

# Number of held-out images in the grids.
GRID_IMAGES = 32


class Snapshots(NamedTuple):
    """Held-out data for the snapshots of a run.

    Attributes:
        images: held-out images for grids, uint8 [N, C, H, W]
        held_out: computes held-out metrics; None if `log.held_out` is 0
    """

    images: Tensor
    held_out: HeldOut | None


def open_snapshots(config: Config, train_set: ImageSet | EncodedSet, device: torch.device) -> Snapshots:
    """Decode the held-out images of a run.

    Raises:
        ConfigError, DataError: see `open_data` and `HeldOut`.
    """
    count = held_out_images(config)
    test_set = first_images(config, open_data(config, "test"), max(GRID_IMAGES, count))
    held_out = HeldOut(config, train_set, test_set, device) if count else None
    return Snapshots(test_set.images[:GRID_IMAGES], held_out)


def measure_held_out(step: TrainStep, log: Log, held_out: HeldOut) -> None:
    """Log held-out metrics of the EMA model, computed in float32."""
    with evaluating(step.networks), uncompiled():
        log.held_out(step.images, held_out.measure(current_model(step)))


def write_grids(step: TrainStep, log: Log, held_out: Tensor) -> None:
    """Log reconstructions and interpolations of held-out images uint8 [N, C, H, W], and samples of fixed latents."""
    config = step.config
    generator = torch.Generator().manual_seed(derive_seed(config.train.seed, "grids"))
    indices = torch.arange(GRID_IMAGES) % len(held_out)  # repeats images if there are few
    images = normalize(resize(held_out, step.resolution)[indices].to(step.device))
    with evaluating(step.networks), uncompiled():
        model = current_model(step)
        reconstructions = model.reconstruct(images, sample_posterior=False)
        pairs = torch.stack([images, reconstructions], dim=1)  # images above reconstructions, 8 per row
        rows = pairs.unflatten(0, (-1, 8)).transpose(1, 2).flatten(0, 2)
        log.grid("reconstructions", step.images, rows, columns=8)
        samples = model.sample(64, generator=generator)
        log.grid("samples", step.images, samples, columns=8)
        if config.model.grows:
            log.growth(samples[:8])
        between = interpolate(model, images[:8], images[1:9]).flatten(0, 1)
        log.grid("interpolations", step.images, between, columns=10)


def current_model(step: TrainStep) -> DCVAE:
    """Return the current model in evaluation mode: the encoder and the EMA of the decoder."""
    config = step.config.model
    if config.grows:
        config = replace(config, resolution=step.resolution, alpha=step.alpha)
    with torch.device("meta"):  # its networks are replaced below, and need no memory
        model = DCVAE(config)
    model.encoder, model.decoder = step.networks.encoder, step.networks.decoder_ema
    return model.eval()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager for evaluation mode. Restores the mode of every submodule afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode
