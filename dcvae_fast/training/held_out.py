"""Cheap metrics of a run, measured now and then on images it is not trained on."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.backends import cudnn

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError, DivergedError, EvaluationError
from dcvae_fast.evaluation.images import evenly_spaced, parts, reconstructions, samples
from dcvae_fast.evaluation.perceptual import images_at_once, pixel_error
from dcvae_fast.evaluation.probe import linear_probe, posterior_means
from dcvae_fast.images import to_bytes
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.training.data import first_images
from dcvae_fast.training.seeding import derive_seed
from dcvae_pipelines import EncodedSet, ImageSet
from dcvae_pipelines.pixels import resize

# Training images that the probe learns from: for each held-out one, and at most.
PROBE_SHARE, PROBE_IMAGES = 5, 5000


def held_out_images(config: Config) -> int:
    """How many are measured on: as set, else 1,000 at 32×32, and as many pixels at other resolutions."""
    if config.log.held_out is not None:
        return config.log.held_out
    return max(64, min(1000, 1000 * 32**2 // config.model.resolution**2))


class HeldOut:
    """Measures a model, at whatever resolution it has reached, as these settings say."""

    def __init__(self, config: Config, train_set: ImageSet | EncodedSet, test_set: ImageSet, device: torch.device):
        """
        Args:
            train_set: what is trained on; the probe learns from some of it, FID compares with some of it.
            test_set: decoded, at the last resolution.

        Raises:
            ConfigError: FID is wanted, and the weights of its network cannot be had.
            DataError: an image cannot be decoded.
        """
        self._config, count = config, held_out_images(config)
        self._test_set = first_images(config, test_set, count)
        self._learn_from = None
        if test_set.labels is not None:
            self._learn_from = first_images(config, train_set, min(PROBE_IMAGES, PROBE_SHARE * count))
        self._train_set, self._inception = None, None
        if config.log.fid_images:
            self._train_set = train_set
            from dcvae_fast.evaluation.fidelity import load_features

            try:
                self._inception = load_features(Path(config.log.weights) if config.log.weights else None)
            except EvaluationError as error:
                raise ConfigError(
                    f"log.fid_images is {config.log.fid_images}, but {error} In training, the option is --log.weights."
                ) from error
            self._inception.network.to(device)
        self._real: dict[int, Tensor] = {}  # features of training images, by resolution

    @cudnn.flags(enabled=True, allow_tf32=False)
    def measure(self, model: DCVAE) -> dict[str, float]:
        """Without TF32: pixel_mse (on [-1, 1]), probe_accuracy where there are labels, fid where it is wanted.

        Args:
            model: in evaluation mode.

        Raises:
            DivergedError: the model's images are no longer finite numbers.
        """
        resolution = model.config.resolution
        at_once = images_at_once(resolution)
        test_set = _resized(self._test_set, resolution)
        error, _ = pixel_error(reconstructions(model, [test_set], at_once))
        if not math.isfinite(error):
            raise DivergedError(f"reconstructions of held-out images are no longer finite (pixel error {error}).")
        measured = {"pixel_mse": error}
        if self._learn_from is not None and self._learn_from.labels is not None:
            sets = (_resized(self._learn_from, resolution), test_set)
            latents = [posterior_means(model, [images], at_once) for images in sets]
            measured["probe_accuracy"] = 1 - linear_probe(*latents, trials=1, device=model.device).item()
        if self._inception is not None:
            measured["fid"] = self._fid(model, max(16, at_once))
        return measured

    def _fid(self, model: DCVAE, at_once: int) -> float:
        """Between samples, always of the same latents, and as many training images."""
        from dcvae_fast.evaluation.fidelity import features_of, frechet_distance, layer_for

        config, train_set, inception = self._config, self._train_set, self._inception
        assert train_set is not None and inception is not None
        count, resolution = config.log.fid_images, model.config.resolution
        layer = layer_for(inception.network, "fid")
        if resolution not in self._real:
            chosen = evenly_spaced(len(train_set), count)
            some = parts(train_set, chosen, model.config, config.data.on_corrupt)
            pixels = (batch for part in some for batch in part.images.split(at_once))
            self._real = {resolution: features_of(pixels, inception)[layer]}
        drawn = samples(model, count, at_once, derive_seed(config.train.seed, "fid"), model.config.sample_clamp)
        return frechet_distance(features_of(map(to_bytes, drawn), inception)[layer], self._real[resolution])


def _resized(images: ImageSet, resolution: int) -> ImageSet:
    return replace(images, images=resize(images.images, resolution))
