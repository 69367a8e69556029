"""What is measured, and of which images."""

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

# Images of the training split that samples and reconstructions are compared with, at most.
REAL_IMAGES = 50_000

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Of what, done, of how many."""


@dataclass(frozen=True)
class Protocol:
    """How images are made that are measured.

    Attributes:
        clamp: latents of samples to [-clamp, clamp]; None for what the model's configuration says
        posterior_mean: what is decoded to reconstruct, else a draw from the posterior
        batch: the number of images is rounded up to whole batches of so many
        repeat_test_split: whether FID and the like take as many reconstructions as samples, by repeating the test
            split; otherwise each test image is reconstructed once
        rounded: pixels to the nearest of 256 values, else down
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
    progress: Progress = lambda what, done, total: None,
) -> list[Measurement]:
    """Measure a model, on its device, in evaluation mode and without TF32.

    | metric | of | beside |
    |---|---|---|
    | `fid`, `kid`, `prc` (precision, recall) | samples, and reconstructions of the test split | the training split |
    | `is` (Inception score) | the same | nothing |
    | `pixel`, `perceptual` (VGG16's relu4_3) | reconstructions of the test split | the test split |
    | `ppl` (path length) | 2 · `images` steps on paths between samples | nothing |
    | `probe` (error of linear classifiers) | posterior means of the test split | those of the training split |

    Of the training split, fid, kid and prc see 50,000 images spread evenly where it has more.

    Protocol `paper` samples from N(0, I), clamped where the model's configuration says so, and reconstructs each test
    image once, from its posterior's mean. `official` is the authors' code: samples from N(0, I) clamped to [-1, 1];
    reconstructions from draws, for fid and its like with fresh noise each time the test split comes round; whole
    batches of 64, 50,048 for 50,000; pixels rounded down. It has no ppl and no probe: those are always the paper's.

    Args:
        model: the autoencoder.
        data: its data set; only ppl does without.
        metrics: some of `METRICS`.
        protocol: paper or official.
        images: samples, and test images at most.
        batch: images at once, which changes numbers by float32's rounding only; None for what needs little memory.
        seed: of all noise.
        weights: folder with the published weights of Inception, VGG16 and LPIPS; None to have them downloaded.
        cache: folder for the training split's features, kept under a hash of its content; None not to keep them.
        features, vgg16, lpips: other networks to look at images, whose names the measurements give; features come from
            `fidelity.registered_features`.
        report: called with each measurement as soon as it is there.
        progress: called now and then with what is going on, how far it is, and how far it goes.

    Raises:
        EvaluationError: an argument has no meaning, or weights cannot be had.
        DataError: an image cannot be decoded, or does not fit the model.
    """
    if batch is None:
        batch = max(4, min(64, 64 * 128**2 // model.config.resolution**2))
    work = _Work(model.eval(), data, protocol, images, batch, seed, progress)
    _check(work, metrics)
    steps: list[Iterator[Measurement]] = []  # which begin once all networks are there
    if chosen := [metric for metric in fidelity.FEATURE_METRICS if metric in metrics]:
        steps.append(
            _fidelity(work, chosen, _to_model_device(model, features or fidelity.load_features(weights)), cache)
        )
    if "pixel" in metrics:
        steps.append(_pixel(work))
    if "perceptual" in metrics:
        steps.append(_perceptual(work, _to_model_device(model, vgg16 or perceptual.load_vgg16(weights))))
    if "ppl" in metrics:
        steps.append(_path_length(work, _to_model_device(model, lpips or fidelity.load_lpips(weights))))
    if "probe" in metrics:
        steps.append(_probe(work))
    measured = []
    with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for measurement in chain.from_iterable(steps):
            measured.append(measurement)
            report(measurement)
    return measured


def data_of(metric: str, of: Subject, data: Splits) -> str | None:
    """The images of a data set that a metric of a subject depends on, besides the model."""
    used = [f"{len(data.test):,} test images"] if of != "samples" else []
    if metric in ("fid", "kid", "precision", "recall", "prc"):
        used.append(f"{min(len(data.train), REAL_IMAGES):,} training images")
    elif of == "latents":
        used.append(f"{len(data.train):,} training images")
    return f"{data.test.name}: {', '.join(used)}" if used else None


def _check(work: "_Work", metrics: Collection[str]) -> None:
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise EvaluationError(f"metrics has {', '.join(unknown)}; known are {', '.join(METRICS)}.")
    if not metrics:
        raise EvaluationError(f"metrics is empty; known are {', '.join(METRICS)}.")
    if work.protocol not in PROTOCOLS:
        raise EvaluationError(f"protocol is {work.protocol!r}; it must be {' or '.join(PROTOCOLS)}.")
    if work.images < fidelity.FEWEST:
        raise EvaluationError(f"images is {work.images}; it must be at least {fidelity.FEWEST}.")
    if work.batch < 1:
        raise EvaluationError(f"batch is {work.batch}; it must be at least 1.")
    if not 0 <= work.seed < 2**63:
        raise EvaluationError(f"seed is {work.seed}; it must be from 0 to 2⁶³ − 1.")
    config, data = work.model.config, work.splits
    if "ppl" in metrics and config.resolution < 32:
        raise EvaluationError(f"ppl looks at images of 32×32 or more; this model's are {config.resolution} wide.")
    if data is None:
        if set(metrics) != {"ppl"}:
            raise EvaluationError("data is missing; of all metrics, only ppl does without.")
        return
    for split, name in ((data.train, "training"), (data.test, "test")):
        if len(split) < fidelity.FEWEST and set(metrics) & set(fidelity.FEATURE_METRICS):
            needed = f"fid, is, kid and prc need {fidelity.FEWEST}"
            raise EvaluationError(f"{split.name} has {len(split)} {name} images; {needed}.")
        first = next(parts(split, evenly_spaced(len(split), fidelity.FEWEST), config, data.on_corrupt))
        if "probe" in metrics:
            probe.check_labels(first)


def _to_model_device(model: DCVAE, extractor: Extractor) -> Extractor:
    extractor.network.to(model.device)
    return extractor


@dataclass(frozen=True)
class _Work:
    """What `evaluate` was asked for."""

    model: DCVAE
    splits: Splits | None
    protocol: str
    images: int
    batch: int
    seed: int
    progress: Progress

    @property
    def how(self) -> Protocol:
        return PROTOCOLS[self.protocol]

    @property
    def data(self) -> Splits:
        assert self.splits is not None  # or `_check` would have refused
        return self.splits

    def measurement(self, metric: str, of: Subject, value: float, count: int, **more: Any) -> Measurement:
        """Return a measurement with the fields that all measurements of this call share."""
        data = None if self.splits is None else data_of(metric, of, self.splits)
        common = {"protocol": self.protocol, "data": data, "seed": self.seed}
        return Measurement(**{"metric": metric, "of": of, "value": value, "count": count, **common, **more})

    def once(self) -> Tensor:
        """Indices of test images, each at most once, and no more than asked for."""
        return evenly_spaced(len(self.data.test), self.images)

    def pairs(self, indices: Tensor, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images and their reconstructions."""
        images = parts(self.data.test, indices, self.model.config, self.data.on_corrupt)
        seed = None if self.how.posterior_mean else self.seed
        pairs = reconstructions(self.model, images, self.batch, seed)
        return self.counted(pairs, what, len(indices), lambda pair: len(pair[0]))

    def counted(self, batches: Iterable[T], what: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
        """The same batches, with progress shown."""
        done = 0
        for batch in batches:
            yield batch
            done += size(batch)
            self.progress(what, done, total)


def _fidelity(work: _Work, metrics: Sequence[str], extractor: Extractor, cache: Path | None) -> Iterator[Measurement]:
    model, how = work.model, work.how
    real = _real_features(work, extractor, cache) if set(metrics) & set(fidelity.COMPARING) else {}
    count = -(-work.images // how.batch) * how.batch
    clamp = model.config.sample_clamp if how.clamp is None else how.clamp
    drawn = work.counted(samples(model, count, work.batch, work.seed, clamp), "samples", count, len)
    indices = torch.arange(count) % len(work.data.test) if how.repeat_test_split else work.once()
    remade = (reconstructed for _, reconstructed in work.pairs(indices, "reconstructions"))
    sets: dict[Subject, Iterable[Tensor]] = {"samples": drawn, "reconstructions": remade}
    for of, images in sets.items():
        features = fidelity.features_of((to_bytes(some, rounded=how.rounded) for some in images), extractor)
        for metric in metrics:
            for name, (value, spread, spread_is) in fidelity.compare(metric, features, real, extractor).items():
                more = {"spread": spread, "spread_is": spread_is, "extractor": extractor.name}
                yield work.measurement(name, of, value, len(next(iter(features.values()))), **more)


def _real_features(work: _Work, extractor: Extractor, cache: Path | None) -> dict[str, Tensor]:
    data, config = work.data, work.model.config
    indices = evenly_spaced(len(data.train), REAL_IMAGES)
    images = parts(data.train, indices, config, data.on_corrupt)
    pixels = (some for part in images for some in part.images.split(work.batch))
    counted = work.counted(pixels, "training images", len(indices), len)
    return fidelity.real_features(counted, extractor, cache, lambda: fidelity.content_key(data.train, indices, config))


def _pixel(work: _Work) -> Iterator[Measurement]:
    config = work.model.config
    error, count = perceptual.pixel_error(work.pairs(work.once(), "pixels"))
    values = perceptual.pixel_distances(error, config.image_channels * config.resolution**2)
    for name, value in values.items():
        yield work.measurement(name, "reconstructions", value, count)


def _perceptual(work: _Work, vgg16: Extractor) -> Iterator[Measurement]:
    distances, count = perceptual.perceptual_distances(work.pairs(work.once(), "perceptual"), vgg16)
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
    spread_is = "half of the 95 % confidence interval over 5 classifiers, other beginnings and mini-batches"
    more = {"spread": probe.half_width(errors), "spread_is": spread_is, "protocol": "paper"}
    yield work.measurement("probe_error", "latents", errors.mean().item(), len(latents[1][0]), **more)
