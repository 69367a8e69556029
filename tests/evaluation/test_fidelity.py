"""FID, IS, KID, precision and recall compared with torch-fidelity and SciPy; streamed images; the feature cache."""

import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils.data import Dataset

from dcvae_fast.config import ModelConfig
from dcvae_fast.evaluation import evaluate, images
from dcvae_fast.evaluation.fidelity import content_key, features_of, frechet_distance
from dcvae_fast.evaluation.images import evenly_spaced, parts, repeated
from dcvae_fast.evaluation.protocol import PROTOCOLS, data_of, image_count
from dcvae_fast.images import to_bytes
from dcvae_pipelines import DataError, load_dataset
from image_files import write_noise

ALL = ("fid", "is", "kid", "prc")


def values(measurements):
    return {(m.metric, m.subject): m.value for m in measurements}


def by_scipy(features, real):
    moments = [(x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False)) for x in (features, real)]
    (mean, covariance), (real_mean, real_covariance) = moments
    root = np.real(np.asarray(scipy.linalg.sqrtm(covariance @ real_covariance)))
    return ((mean - real_mean) ** 2).sum() + np.trace(covariance + real_covariance - 2 * root)


@pytest.mark.parametrize(("count", "size"), [(300, 16), (5000, 64)])
def test_frechet_distance_matches_scipy(count, size):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=generator)
    features = torch.randn(count, size, generator=generator) @ mixing + 0.3
    real = torch.randn(count // 2, size, generator=generator).exp()
    assert frechet_distance(features, real) == pytest.approx(by_scipy(features, real), rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def bytes_of(images, rounded=True):
    pixels = (images + 1) * 127.5
    return (pixels.round() if rounded else pixels.floor()).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def test_feature_metrics_match_torch_fidelity(model, data, features):
    from torch_fidelity import calculate_metrics

    paper, once = (
        evaluate(model, data, ALL, protocol=protocol, images=50, batch=7, seed=4, features=features)
        for protocol in ("paper", "once")
    )
    measurements = [*paper, *once]
    assert {(m.extractor, m.note) for m in measurements} == {("random, not Inception", None)}
    assert {m.metric for m in measurements} == {"fid", "is", "kid", "precision", "recall"}
    assert len(measurements) == 15  # no samples by protocol once
    noise = torch.randn(1024, 6, generator=torch.Generator().manual_seed(4))[:50]
    real = data.test.images.float() / 127.5 - 1
    indices = [*range(37), *(i * 37 // 13 for i in range(13))]  # the 37 test images, and 13 of them again
    images_of = {
        ("samples", "paper"): model.decode(noise),
        ("reconstructions", "paper"): model.decode(model.encode(real[indices]).at(noise)),
        ("reconstructions", "once"): model.decode(model.encode(real).mean),
    }
    for key, decoded in images_of.items():
        expected = calculate_metrics(
            input1=Images(bytes_of(decoded)),
            input2=Images(data.train.images),
            feature_extractor=features.name,
            **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
            kid_subset_size=len(decoded),
            save_cpu_ram=True,
            cache=False,
            cuda=False,
            verbose=False,
        )
        actual = {m.metric: m for m in measurements if (m.subject, m.protocol) == key}
        assert actual["fid"].value == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
        assert actual["is"].value == pytest.approx(expected["inception_score_mean"], rel=1e-6)
        assert actual["is"].spread == pytest.approx(expected["inception_score_std"], rel=1e-3, abs=1e-7)
        assert actual["kid"].value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
        assert actual["precision"].value == expected["precision"]
        assert actual["recall"].value == expected["recall"]
        assert {m.count for m in actual.values()} == {len(decoded)}


@torch.no_grad()
def test_official_follows_the_authors_protocol(model, data, features):
    """Clamped samples, repeated draws from the posterior with new noise, whole batches, pixels rounded down."""
    measurements = evaluate(model, data, ["fid"], protocol="official", images=50, seed=4, features=features)
    assert [(m.subject, m.count, m.protocol) for m in measurements] == [
        ("samples", 64, "official"),
        ("reconstructions", 64, "official"),
    ]
    noise = torch.randn(1024, 6, generator=torch.Generator().manual_seed(4))[:64]
    indices = [*range(37), *(i * 37 // 27 for i in range(27))]
    real = data.test.images[indices].float() / 127.5 - 1
    latents = {"samples": noise.clamp(-1, 1), "reconstructions": model.encode(real).at(noise)}
    reference = features_of([data.train.images], features)["pool"]
    for m in measurements:
        generated = features_of([bytes_of(model.decode(latents[m.subject]), rounded=False)], features)["pool"]
        assert m.value == pytest.approx(by_scipy(generated, reference), rel=1e-4)
        assert m.note is not None and "features are those of random, not Inception" in m.note
        assert "pytorch-fid's Inception" in m.note and "fid_stats_cifar10_train.npz" in m.note


def test_pixels_are_rounded_down_in_the_order_of_the_authors_code():
    values = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = values.clone().mul_(127.5).add_(127.5).clamp(0.0, 255.0).to(torch.uint8)
    assert torch.equal(to_bytes(values, rounded=False), expected)


def test_repeated_passes_end_with_evenly_spaced_images():
    assert repeated(4, 10).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 2]
    assert repeated(10, 4).tolist() == [0, 2, 5, 7] and repeated(3, 6).tolist() == [0, 1, 2, 0, 1, 2]
    assert repeated(10_000, 50_048).bincount().unique(return_counts=True)[1].tolist() == [9_952, 48]


def test_published_images_replace_the_test_split_for_once_only(model, data, features):
    published = replace(data.test, images=data.test.images[:11], labels=data.test.labels[:11])
    with_published = replace(data, published=published)
    for protocol, other in (("paper", data), ("official", data), ("once", replace(data, test=published))):
        measured = [
            evaluate(model, splits, ["fid", "pixel"], protocol=protocol, images=50, features=features)
            for splits in (with_published, other)
        ]
        assert values(measured[0]) == values(measured[1])
        assert [m.count for m in measured[0]] == [m.count for m in measured[1]]
    (fid, pixel, *_) = measured[0]
    assert (fid.count, fid.data) == (11, "noise: 11 validation images, 60 training images")
    assert (pixel.count, pixel.data) == (11, "noise: 11 validation images")


def test_image_counts_are_those_of_the_measurements(model, data, features):
    for protocol in PROTOCOLS:
        for size in (20, 50):
            for m in evaluate(model, data, (*ALL, "pixel"), protocol=protocol, images=size, features=features):
                assert m.count == image_count(m.metric, m.subject, protocol, data, size)
                assert m.data == data_of(m.metric, m.subject, protocol, data)
    assert image_count("ppl", "samples", "paper", data, 50) == 100


def test_the_configuration_can_clamp_samples(model, data, features):
    plain, clamped = (
        values(evaluate(model, data, ["fid"], images=20, features=features))
        for model.config in (model.config, replace(model.config, sample_clamp=0.1))
    )
    assert plain["fid", "samples"] != clamped["fid", "samples"]
    assert plain["fid", "reconstructions"] == clamped["fid", "reconstructions"]


def test_values_depend_on_the_seed_but_not_on_the_batch_size(model, data, features):
    def measure(batch, seed=0, protocol="paper"):
        return values(
            evaluate(model, data, ALL, images=50, batch=batch, seed=seed, protocol=protocol, features=features)
        )

    for protocol in ("paper", "official"):  # with samples
        first = measure(64, protocol=protocol)
        assert measure(64, protocol=protocol) == first
        assert measure(7, protocol=protocol) == pytest.approx(first, rel=1e-4)
        other = measure(64, 1, protocol)
        assert all(other["fid", subject] != first["fid", subject] for subject in ("samples", "reconstructions"))
    assert measure(64, 1, "once") == measure(64, 0, "once")


def test_features_are_cached_by_content(model, data, features, tmp_path):
    extracted = []

    def measure(data, metrics=("fid",)):
        extracted.clear()
        progress = lambda name, done, total: extracted.append(name)  # noqa: E731
        cache = tmp_path / "cache"
        measurements = evaluate(model, data, metrics, images=20, features=features, cache=cache, progress=progress)
        return values(measurements), "training images" in extracted

    first, extracts = measure(data)
    assert extracts
    assert measure(data) == (first, False)
    assert measure(data, ("fid", "kid"))[1] is False
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])  # as if the disk had been full
    assert measure(data) == (first, True)
    assert measure(data) == (first, False)
    data.train.images[7, 0, 3, 3] ^= 255
    other, extracts = measure(data)
    assert extracts and other != first
    assert measure(replace(data, test=data.train))[1] is False


def test_the_content_key_depends_on_contents_not_on_dates(tmp_path):
    files = load_dataset("folder", write_noise(tmp_path / "images", 24, 40, 50, 3, ending="bmp"))
    indices, config = torch.arange(len(files)), ModelConfig()
    key = content_key(files, indices, config)
    assert content_key(load_dataset("folder", tmp_path / "images"), indices, config) == key
    assert content_key(files, indices[1:], config) != key
    assert content_key(files, indices, replace(config, image_channels=1)) != key
    path = tmp_path / "images" / "20.bmp"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert content_key(files, indices, config) != key


def test_files_are_decoded_in_parts(tmp_path, monkeypatch):
    files = load_dataset("folder", write_noise(tmp_path / "images", 24, 40, 50, 3, ending="bmp"))
    (single,) = parts(files, torch.arange(20), ModelConfig())
    monkeypatch.setattr(images, "PART_BYTES", 3 * 32**2 * 6)
    several = list(parts(files, torch.arange(20), ModelConfig()))
    assert [len(part) for part in several] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([part.images for part in several]), single.images)


def test_decoded_images_are_downscaled_to_the_resolution_of_the_model(data, model):
    small = ModelConfig(architecture="progressive", resolution=16)
    (part,) = parts(data.train, torch.arange(5), small)
    assert part.images.shape == (5, 3, 16, 16)
    with pytest.raises(DataError, match=r"noise has images of \[3, 32, 32\], but the model's are \[1, 32, 32\]"):
        next(parts(data.train, torch.arange(5), ModelConfig(image_channels=1)))
    with pytest.raises(DataError, match="64, 64"):
        next(parts(data.train, torch.arange(5), ModelConfig(architecture="progressive", resolution=64)))


def test_evenly_spaced_indices():
    assert evenly_spaced(10, 20).tolist() == list(range(10))
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]


def test_grey_images_are_repeated_to_rgb(features):
    grey = torch.randint(256, (5, 1, 32, 32), dtype=torch.uint8)
    of_grey, of_rgb = (features_of([x], features)["pool"] for x in (grey, grey.repeat(1, 3, 1, 1)))
    assert torch.equal(of_grey, of_rgb)
