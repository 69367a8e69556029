"""Held-out metrics, measured periodically during training."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.backends import cudnn

from dcvae_fast.config import Config
from dcvae_fast.errors import ConfigError, DivergedError, EvaluationError
from dcvae_fast.evaluation.images import evenly_spaced, parts, reconstructions, samples
from dcvae_fast.evaluation.perceptual import inference_batch_size, pixel_error
from dcvae_fast.evaluation.probe import linear_probe, posterior_means
from dcvae_fast.images import to_bytes
from dcvae_fast.models.dcvae import DCVAE
from dcvae_fast.training.data import first_images
from dcvae_fast.training.seeding import derive_seed
from dcvae_pipelines import EncodedSet, ImageSet
from dcvae_pipelines.pixels import resize

# Training images for the linear probe: number per held-out image, and maximum.
PROBE_SHARE, PROBE_IMAGES = 5, 5000


def held_out_images(config: Config) -> int:
    """Return `log.held_out`; by default 1,000 images at 32×32, and fewer at higher resolutions (the same total number
    of pixels, at least 64 images)."""
    if config.log.held_out is not None:
        return config.log.held_out
    return max(64, min(1000, 1000 * 32**2 // config.model.resolution**2))


class HeldOut:
    """Measures models on held-out images, at the model's current resolution."""

    def __init__(self, config: Config, train_set: ImageSet | EncodedSet, test_set: ImageSet, device: torch.device):
        """
        Args:
            train_set: training set. The linear probe is trained on a part of it, and FID compares with a part of it.
            test_set: held-out images, decoded at the final resolution.

        Raises:
            ConfigError: `log.fid_images` is set, but the weights of FID's network are not available.
            DataError: an image cannot be decoded.
        """
        self._config, count = config, held_out_images(config)
        self._test_set = first_images(config, test_set, count)
        self._probe_set = None
        if test_set.labels is not None:
            self._probe_set = first_images(config, train_set, min(PROBE_IMAGES, PROBE_SHARE * count))
        self._train_set, self._inception = None, None
        if config.log.fid_images:
            self._train_set = train_set
            from dcvae_fast.evaluation.fidelity import load_features

            try:
                self._inception = load_features(Path(config.log.weights) if config.log.weights else None)
            except EvaluationError as error:
                raise ConfigError(
                    f"log.fid_images is {config.log.fid_images}, but {error} For training, set --log.weights."
                ) from error
            self._inception.network.to(device)
        self._real_features: dict[int, Tensor] = {}  # features of training images, by resolution

    @cudnn.flags(enabled=True, allow_tf32=False)
    def measure(self, model: DCVAE) -> dict[str, float]:
        """Return pixel_mse (on [-1, 1]), probe_accuracy if there are labels, and fid if `log.fid_images` is set.

        TF32 is disabled.

        Args:
            model: a model in evaluation mode.

        Raises:
            DivergedError: reconstructions are not finite.
        """
        resolution = model.config.resolution
        batch_size = inference_batch_size(resolution)
        test_set = _resized(self._test_set, resolution)
        error, _ = pixel_error(reconstructions(model, [test_set], batch_size))
        if not math.isfinite(error):
            raise DivergedError(f"reconstructions of held-out images are not finite (pixel error {error}).")
        metrics = {"pixel_mse": error}
        if self._probe_set is not None and self._probe_set.labels is not None:
            sets = (_resized(self._probe_set, resolution), test_set)
            latents = [posterior_means(model, [images], batch_size) for images in sets]
            metrics["probe_accuracy"] = 1 - linear_probe(*latents, trials=1, device=model.device).item()
        if self._inception is not None:
            metrics["fid"] = self._fid(model, max(16, batch_size))
        return metrics

    def _fid(self, model: DCVAE, batch_size: int) -> float:
        """FID between samples of fixed latents and the same number of training images."""
        from dcvae_fast.evaluation.fidelity import features_of, frechet_distance, layer_for

        config, train_set, inception = self._config, self._train_set, self._inception
        assert train_set is not None and inception is not None
        count, resolution = config.log.fid_images, model.config.resolution
        layer = layer_for(inception.network, "fid")
        if resolution not in self._real_features:
            indices = evenly_spaced(len(train_set), count)
            real_images = parts(train_set, indices, model.config, config.data.on_corrupt)
            batches = (batch for part in real_images for batch in part.images.split(batch_size))
            self._real_features = {resolution: features_of(batches, inception)[layer]}
        fake = samples(model, count, batch_size, derive_seed(config.train.seed, "fid"), model.config.sample_clamp)
        return frechet_distance(features_of(map(to_bytes, fake), inception)[layer], self._real_features[resolution])


def _resized(images: ImageSet, resolution: int) -> ImageSet:
    return replace(images, images=resize(images.images, resolution))
