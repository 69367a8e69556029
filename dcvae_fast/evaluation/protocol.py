"""Metrics, and the protocols that select their images."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.backends import cudnn

from dcvae_fast.errors import EvaluationError
from dcvae_fast.evaluation import fidelity, perceptual, probe
from dcvae_fast.evaluation.images import Splits, evenly_spaced, parts, reconstructions, samples
from dcvae_fast.evaluation.measurement import Measurement, Subject
from dcvae_fast.evaluation.pretrained import Extractor
from dcvae_fast.images import to_bytes
from dcvae_fast.models.dcvae import DCVAE

METRICS = (*fidelity.FEATURE_METRICS, "pixel", "perceptual", "ppl", "probe")

# Maximum number of training images that samples and reconstructions are compared with.
REAL_IMAGES = 50_000

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the number done and the total."""


@dataclass(frozen=True)
class Protocol:
    """How the images to measure are generated.

    Attributes:
        clamp: clamp latents of samples to [-clamp, clamp]; None for the setting in the model's configuration
        posterior_mean: whether reconstructions decode the posterior mean; otherwise a draw from the posterior
        batch: the number of images is rounded up to a multiple of this
        repeat_test_split: whether the feature metrics use as many reconstructions as samples, by repeating the test
            split; otherwise each test image is reconstructed once
        rounded: whether pixels are rounded to the nearest of 256 values; otherwise down
    """

    clamp: float | None
    posterior_mean: bool
    batch: int
    repeat_test_split: bool
    rounded: bool


PROTOCOLS = {
    "paper": Protocol(clamp=None, posterior_mean=True, batch=1, repeat_test_split=False, rounded=True),
    "official": Protocol(clamp=1.0, posterior_mean=False, batch=64, repeat_test_split=True, rounded=False),
}


def evaluate(
    model: DCVAE,
    data: Splits | None,
    metrics: Collection[str] = ("fid", "is", "pixel", "perceptual"),
    *,
    protocol: str = "paper",
    images: int = 50_000,
    batch: int | None = None,
    seed: int = 0,
    weights: Path | None = None,
    cache: Path | None = None,
    features: Extractor | None = None,
    vgg16: Extractor | None = None,
    lpips: Extractor | None = None,
    report: Callable[[Measurement], None] = lambda measurement: None,
    progress: Progress = lambda name, done, total: None,
) -> list[Measurement]:
    """Measure a model, on its device, in evaluation mode and without TF32.

    | metric | measured | compared with |
    |---|---|---|
    | `fid`, `kid`, `prc` (precision, recall) | samples, and reconstructions of the test split | the training split |
    | `is` (Inception score) | samples, and reconstructions of the test split | – |
    | `pixel`, `perceptual` (VGG16's relu4_3) | reconstructions of the test split | the test split |
    | `ppl` (path length) | 2 · `images` steps on paths between samples | – |
    | `probe` (error of linear classifiers) | posterior means of the test split | those of the training split |

    fid, kid and prc use at most 50,000 images of the training split, evenly spaced.

    Protocol `paper` samples from N(0, I), clamped if the model's configuration says so, and reconstructs each test
    image once, from the posterior mean. `official` follows the authors' code: samples from N(0, I) clamped to [-1, 1];
    reconstructions from draws, for the feature metrics with new noise in each repetition of the test split; multiples
    of 64 images, 50,048 for 50,000; pixels rounded down. ppl and probe always follow `paper`.

    Args:
        model: the autoencoder.
        data: its data set; None is allowed for ppl only.
        metrics: a subset of `METRICS`.
        protocol: paper or official.
        images: number of samples, and maximum number of test images.
        batch: batch size, which changes results only by float32 rounding; None for one that needs little memory.
        seed: seed of all noise.
        weights: folder with the published weights of Inception, VGG16 and LPIPS; None to download them.
        cache: folder to cache the training split's features, under a hash of its content; None for no cache.
        features, vgg16, lpips: networks to use instead, named in the measurements; `features` is created by
            `fidelity.registered_features`.
        report: called with each measurement as soon as it is made.
        progress: called periodically, see `Progress`.

    Raises:
        EvaluationError: an argument is invalid, or weights are missing, damaged or cannot be downloaded.
        DataError: an image cannot be decoded, or does not fit the model.
    """
    if batch is None:
        batch = max(4, min(64, 64 * 128**2 // model.config.resolution**2))
    work = _Work(model.eval(), data, protocol, images, batch, seed, progress)
    _check(work, metrics)
    steps: list[Iterator[Measurement]] = []  # generators: they run once all networks are loaded
    if feature_metrics := [metric for metric in fidelity.FEATURE_METRICS if metric in metrics]:
        extractor = _to_model_device(model, features or fidelity.load_features(weights))
        steps.append(_fidelity(work, feature_metrics, extractor, cache))
    if "pixel" in metrics:
        steps.append(_pixel(work))
    if "perceptual" in metrics:
        steps.append(_perceptual(work, _to_model_device(model, vgg16 or perceptual.load_vgg16(weights))))
    if "ppl" in metrics:
        steps.append(_path_length(work, _to_model_device(model, lpips or fidelity.load_lpips(weights))))
    if "probe" in metrics:
        steps.append(_probe(work))
    measurements = []
    with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for measurement in chain.from_iterable(steps):
            measurements.append(measurement)
            report(measurement)
    return measurements


def data_of(metric: str, subject: Subject, data: Splits) -> str | None:
    """Describe the images of a data set that a metric of a subject depends on; None if on none."""
    used = [f"{len(data.test):,} test images"] if subject != "samples" else []
    if metric in ("fid", "kid", "precision", "recall", "prc"):
        used.append(f"{min(len(data.train), REAL_IMAGES):,} training images")
    elif subject == "latents":
        used.append(f"{len(data.train):,} training images")
    return f"{data.test.name}: {', '.join(used)}" if used else None


def _check(work: "_Work", metrics: Collection[str]) -> None:
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise EvaluationError(f"metrics has {', '.join(unknown)}; known are {', '.join(METRICS)}.")
    if not metrics:
        raise EvaluationError(f"metrics is empty; known are {', '.join(METRICS)}.")
    if work.protocol_name not in PROTOCOLS:
        raise EvaluationError(f"protocol is {work.protocol_name!r}; it must be {' or '.join(PROTOCOLS)}.")
    if work.images < fidelity.MIN_IMAGES:
        raise EvaluationError(f"images is {work.images}; it must be at least {fidelity.MIN_IMAGES}.")
    if work.batch < 1:
        raise EvaluationError(f"batch is {work.batch}; it must be at least 1.")
    if not 0 <= work.seed < 2**63:
        raise EvaluationError(f"seed is {work.seed}; it must be between 0 and 2⁶³ − 1.")
    config, data = work.model.config, work.splits
    if "ppl" in metrics and config.resolution < 32:
        raise EvaluationError(f"ppl needs images of 32×32 or more; this model's are {config.resolution} wide.")
    if data is None:
        if set(metrics) != {"ppl"}:
            raise EvaluationError("data is missing; only ppl can be measured without it.")
        return
    for split, name in ((data.train, "training"), (data.test, "test")):
        if len(split) < fidelity.MIN_IMAGES and set(metrics) & set(fidelity.FEATURE_METRICS):
            needed = f"fid, is, kid and prc need {fidelity.MIN_IMAGES}"
            raise EvaluationError(f"{split.name} has {len(split)} {name} images; {needed}.")
        first = next(parts(split, evenly_spaced(len(split), fidelity.MIN_IMAGES), config, data.on_corrupt))
        if "probe" in metrics:
            probe.check_labels(first)


def _to_model_device(model: DCVAE, extractor: Extractor) -> Extractor:
    extractor.network.to(model.device)
    return extractor


@dataclass(frozen=True)
class _Work:
    """Arguments of `evaluate`."""

    model: DCVAE
    splits: Splits | None
    protocol_name: str
    images: int
    batch: int
    seed: int
    progress: Progress

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.protocol_name]

    @property
    def data(self) -> Splits:
        assert self.splits is not None  # ensured by `_check`
        return self.splits

    def measurement(self, metric: str, subject: Subject, value: float, count: int, **more: Any) -> Measurement:
        """Return a measurement with the fields that all measurements of this call share."""
        data = None if self.splits is None else data_of(metric, subject, self.splits)
        common = {"protocol": self.protocol_name, "data": data, "seed": self.seed}
        fields = {"metric": metric, "subject": subject, "value": value, "count": count, **common, **more}
        return Measurement(**fields)

    def test_indices(self) -> Tensor:
        """Return the indices of at most `images` test images."""
        return evenly_spaced(len(self.data.test), self.images)

    def pairs(self, indices: Tensor, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test images and their reconstructions."""
        images = parts(self.data.test, indices, self.model.config, self.data.on_corrupt)
        seed = None if self.protocol.posterior_mean else self.seed
        pairs = reconstructions(self.model, images, self.batch, seed)
        return self.counted(pairs, name, len(indices), lambda pair: len(pair[0]))

    def counted(self, batches: Iterable[T], name: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
        """Yield the batches, and report progress after each."""
        done = 0
        for batch in batches:
            yield batch
            done += size(batch)
            self.progress(name, done, total)


def _fidelity(work: _Work, metrics: Sequence[str], extractor: Extractor, cache: Path | None) -> Iterator[Measurement]:
    model, protocol = work.model, work.protocol
    real = _real_features(work, extractor, cache) if set(metrics) & set(fidelity.COMPARISON_METRICS) else {}
    count = -(-work.images // protocol.batch) * protocol.batch
    clamp = model.config.sample_clamp if protocol.clamp is None else protocol.clamp
    generated = work.counted(samples(model, count, work.batch, work.seed, clamp), "samples", count, len)
    indices = torch.arange(count) % len(work.data.test) if protocol.repeat_test_split else work.test_indices()
    reconstructed = (images for _, images in work.pairs(indices, "reconstructions"))
    sets: dict[Subject, Iterable[Tensor]] = {"samples": generated, "reconstructions": reconstructed}
    for subject, batches in sets.items():
        features = fidelity.features_of((to_bytes(batch, rounded=protocol.rounded) for batch in batches), extractor)
        for metric in metrics:
            for name, (value, spread, spread_kind) in fidelity.compare(metric, features, real, extractor).items():
                more = {"spread": spread, "spread_kind": spread_kind, "extractor": extractor.name}
                yield work.measurement(name, subject, value, len(next(iter(features.values()))), **more)


def _real_features(work: _Work, extractor: Extractor, cache: Path | None) -> dict[str, Tensor]:
    data, config = work.data, work.model.config
    indices = evenly_spaced(len(data.train), REAL_IMAGES)
    images = parts(data.train, indices, config, data.on_corrupt)
    pixels = (batch for part in images for batch in part.images.split(work.batch))
    counted = work.counted(pixels, "training images", len(indices), len)
    return fidelity.real_features(counted, extractor, cache, lambda: fidelity.content_key(data.train, indices, config))


def _pixel(work: _Work) -> Iterator[Measurement]:
    config = work.model.config
    error, count = perceptual.pixel_error(work.pairs(work.test_indices(), "images compared by pixels"))
    values = perceptual.pixel_distances(error, config.image_channels * config.resolution**2)
    for name, value in values.items():
        yield work.measurement(name, "reconstructions", value, count)


def _perceptual(work: _Work, vgg16: Extractor) -> Iterator[Measurement]:
    distances, count = perceptual.perceptual_distances(
        work.pairs(work.test_indices(), "images compared by VGG-16"), vgg16
    )
    for name, value in distances.items():
        yield work.measurement(name, "reconstructions", value, count, extractor=vgg16.name)


def _path_length(work: _Work, lpips: Extractor) -> Iterator[Measurement]:
    pairs = 2 * work.images
    lengths = perceptual.path_lengths(work.model, lpips, pairs, work.batch, work.seed)
    value = perceptual.trimmed_mean(torch.cat(list(work.counted(lengths, "path lengths", pairs, len))))
    yield work.measurement("ppl", "samples", value, pairs, protocol="paper", extractor=lpips.name)


def _probe(work: _Work) -> Iterator[Measurement]:
    model, data = work.model, work.data
    latents = []
    for split, name in ((data.train, "training latents"), (data.test, "test latents")):
        images = parts(split, torch.arange(len(split)), model.config, data.on_corrupt)
        latents.append(probe.posterior_means(model, work.counted(images, name, len(split), len), work.batch))
    errors = 100 * probe.linear_probe(*latents, seed=work.seed, device=model.device)
    spread_kind = "half of the 95 % confidence interval over 5 classifiers with other initialisations and mini-batches"
    more = {"spread": probe.half_width(errors), "spread_kind": spread_kind, "protocol": "paper"}
    yield work.measurement("probe_error", "latents", errors.mean().item(), len(latents[1][0]), **more)
