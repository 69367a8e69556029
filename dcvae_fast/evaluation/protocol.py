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
from dcvae_fast.evaluation.images import Splits, evenly_spaced, parts, reconstructions, repeated, samples
from dcvae_fast.evaluation.measurement import Measurement, Subject
from dcvae_fast.evaluation.pretrained import Extractor
from dcvae_fast.images import to_bytes
from dcvae_fast.models.dcvae import DCVAE
from dcvae_pipelines import EncodedSet, ImageSet

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
        samples: whether the feature metrics use samples
        repeat_test_split: whether the feature metrics use as many reconstructions as samples, by decoding the test
            split again and again, each time from a new draw from the posterior; otherwise each test image once, from
            the posterior mean
        posterior_mean: whether pixel and perceptual compare reconstructions from the posterior mean; otherwise from a
            draw from the posterior
        clamp: clamp latents of samples to [-clamp, clamp]; None for the setting in the model's configuration
        batch: the number of images is rounded up to a multiple of this
        rounded: whether pixels are rounded to the nearest of 256 values; otherwise down
        note: how the feature metrics differ from the authors' evaluation, or None; `{extractor}` stands for the
            network's name
    """

    samples: bool = True
    repeat_test_split: bool = True
    posterior_mean: bool = True
    clamp: float | None = None
    batch: int = 1
    rounded: bool = True
    note: str | None = None

    def count(self, images: int) -> int:
        """Return `images`, rounded up to a multiple of `batch`."""
        return -(-images // self.batch) * self.batch


PROTOCOLS = {
    "paper": Protocol(),
    "once": Protocol(samples=False, repeat_test_split=False),
    "official": Protocol(
        posterior_mean=False,
        clamp=1.0,
        batch=64,
        rounded=False,
        note="Not exactly comparable with the authors' code: features are those of {extractor}, and real images are the"
        " model's training split. The authors measure FID only, with pytorch-fid's Inception (the weights"
        " pt_inception-2015-12-05; images resized by torch's bilinear interpolation, not TensorFlow 1's) and stored"
        " statistics of CIFAR-10's training split (fid_stats_cifar10_train.npz).",
    ),
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
    | `is` (Inception score) | the same images | – |
    | `pixel`, `perceptual` (VGG16's relu4_3) | reconstructions of the test split | the test split |
    | `ppl` (path length) | 2 · `images` steps on paths between samples | – |
    | `probe` (error of linear classifiers) | posterior means of the test split | those of the training split |

    fid, kid and prc use at most 50,000 images of the training split, evenly spaced. All four feature metrics use
    torch-fidelity's Inception, which resizes images as TensorFlow 1 does.

    Protocols:

    - `paper`: `images` samples from N(0, I), clamped if the model's configuration says so. fid, is, kid and prc use as
      many reconstructions: the test split is decoded again and again, each time from a new draw from the posterior.
      pixel and perceptual reconstruct each test image once, from the posterior mean.
    - `once`: no samples. Each published test image is reconstructed once, from the posterior mean. FID of so few images
      is higher: compare it only with FID of the same images.
    - `official` follows the authors' code. Latents of samples are clamped to [-1, 1]; all reconstructions are draws;
      the number of images is a multiple of 64, 50,048 for 50,000; pixels are rounded down. The authors' Inception is
      pytorch-fid's, which resizes images by torch's bilinear interpolation, and real images are stored statistics of
      CIFAR-10's training split, so FID is not exactly comparable; measurements have a note that says so.

    ppl and probe always follow `paper`.

    Args:
        model: the autoencoder.
        data: its data set; None is allowed for ppl only.
        metrics: a subset of `METRICS`.
        protocol: paper, once or official.
        images: number of samples and of reconstructions for the feature metrics, and maximum number of test images
            for the others.
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


def reconstructed_images(protocol: str, data: Splits) -> ImageSet | EncodedSet:
    """Return the images that a protocol reconstructs."""
    return data.published if protocol == "once" and data.published is not None else data.test


def data_of(metric: str, subject: Subject, protocol: str, data: Splits) -> str | None:
    """Describe the images of a data set that a metric of a subject depends on; None if on none."""
    images = reconstructed_images(protocol, data)
    kind = "test" if images is data.test else "validation"
    used = [f"{len(images):,} {kind} images"] if subject != "samples" else []
    if metric in ("fid", "kid", "precision", "recall", "prc"):
        used.append(f"{min(len(data.train), REAL_IMAGES):,} training images")
    elif subject == "latents":
        used.append(f"{len(data.train):,} training images")
    return f"{data.test.name}: {', '.join(used)}" if used else None


def image_count(metric: str, subject: Subject, protocol: str, data: Splits, images: int) -> int | None:
    """Return the number of images, or of pairs for ppl, that a metric of a subject uses; None if it uses all.

    It is less if images that cannot be decoded are skipped.
    """
    if metric == "ppl":
        return 2 * images
    if subject == "latents":
        return None
    selected, is_feature_metric = PROTOCOLS[protocol], metric in ("fid", "is", "kid", "precision", "recall")
    if subject == "samples" or (is_feature_metric and selected.repeat_test_split):
        return selected.count(images)
    return min(images, len(reconstructed_images(protocol, data)))


def _check(work: "_Work", metrics: Collection[str]) -> None:
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise EvaluationError(f"metrics has {', '.join(unknown)}; known are {', '.join(METRICS)}.")
    if not metrics:
        raise EvaluationError(f"metrics is empty; known are {', '.join(METRICS)}.")
    if work.protocol_name not in PROTOCOLS:
        raise EvaluationError(f"protocol is {work.protocol_name!r}; known are {', '.join(PROTOCOLS)}.")
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
    least = 1 if work.protocol.repeat_test_split else fidelity.MIN_IMAGES
    for split, name, needs in ((data.train, "training", fidelity.MIN_IMAGES), (work.held_out, "test", least)):
        if len(split) < needs and set(metrics) & set(fidelity.FEATURE_METRICS):
            needed = f"fid, is, kid and prc need {needs}"
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

    @property
    def held_out(self) -> ImageSet | EncodedSet:
        return reconstructed_images(self.protocol_name, self.data)

    def measurement(self, metric: str, subject: Subject, value: float, count: int, **more: Any) -> Measurement:
        """Return a measurement with the fields that all measurements of this call share."""
        protocol = more.pop("protocol", self.protocol_name)
        data = None if self.splits is None else data_of(metric, subject, protocol, self.splits)
        fields = {"metric": metric, "subject": subject, "protocol": protocol, "value": value, "count": count, **more}
        return Measurement(**fields, data=data, seed=self.seed)

    def pairs(self, name: str, *, repeat: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test images and their reconstructions, for the feature metrics if `repeat` is set."""
        if repeat:
            indices = repeated(len(self.held_out), self.protocol.count(self.images))
        else:
            indices = evenly_spaced(len(self.held_out), self.images)
        images = parts(self.held_out, indices, self.model.config, self.data.on_corrupt)
        draws = repeat or not self.protocol.posterior_mean
        pairs = reconstructions(self.model, images, self.batch, self.seed if draws else None)
        return self.counted(pairs, name, len(indices), lambda pair: len(pair[0]))

    def counted(self, batches: Iterable[T], name: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
        """Yield the batches, and report progress after each."""
        done = 0
        for batch in batches:
            yield batch
            done += size(batch)
            self.progress(name, done, total)


def _fidelity(work: _Work, metrics: Sequence[str], extractor: Extractor, cache: Path | None) -> Iterator[Measurement]:
    protocol = work.protocol
    real = _real_features(work, extractor, cache) if set(metrics) & set(fidelity.COMPARISON_METRICS) else {}
    note = protocol.note and protocol.note.format(extractor=extractor.name)
    sets: dict[Subject, Iterable[Tensor]] = {}
    if protocol.samples:
        count = protocol.count(work.images)
        clamp = work.model.config.sample_clamp if protocol.clamp is None else protocol.clamp
        generated = samples(work.model, count, work.batch, work.seed, clamp)
        sets["samples"] = work.counted(generated, "samples", count, len)
    pairs = work.pairs("reconstructions", repeat=protocol.repeat_test_split)
    sets["reconstructions"] = (images for _, images in pairs)
    for subject, batches in sets.items():
        features = fidelity.features_of((to_bytes(batch, rounded=protocol.rounded) for batch in batches), extractor)
        for metric in metrics:
            for name, (value, spread, spread_kind) in fidelity.compare(metric, features, real, extractor).items():
                more = {"spread": spread, "spread_kind": spread_kind, "extractor": extractor.name, "note": note}
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
    error, count = perceptual.pixel_error(work.pairs("images compared by pixels"))
    values = perceptual.pixel_distances(error, config.image_channels * config.resolution**2)
    for name, value in values.items():
        yield work.measurement(name, "reconstructions", value, count)


def _perceptual(work: _Work, vgg16: Extractor) -> Iterator[Measurement]:
    distances, count = perceptual.perceptual_distances(work.pairs("images compared by VGG-16"), vgg16)
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
